// What the attention kernel's producer and consumers share: work items, the walk over kept blocks,
// tiles in shared memory, and the producer itself.
#pragma once
#include "sparge/types.cuh"
#include "sparge/ptx/mbarrier.cuh"
#include "sparge/ptx/math.cuh"

namespace sparge {

constexpr int CONSUMERS = 256;
constexpr int Q_STAGES = 2;

/// What the producer tells the consumers about a tile.
struct Tile {
    int item;      // work item, -1: no more work
    int first_key; // of the first block
    int second_key; // of the second block, -1: there is none
    int flags;
};
constexpr int LAST = 1, CUT = 2, EMPTY = 4, FAR = 8;
/// No score exceeds ‖q‖·‖k‖ (log2 units). Where that may exceed this, tiles are FAR.
constexpr float MOST_NORM = 4096.f;

template <int D, int STAGES> struct alignas(1024) Smem {
    i8 q[Q_STAGES][BLOCK_Q * D];
    i8 k[STAGES][2][BLOCK_KV * D];
    u8 v[STAGES][2][(D + 8) * BLOCK_KV];  // row D is ones, the rest zeros: it sums P
    Tile tile[STAGES];
    float k_scale[STAGES][2][4];  // the scale, bits of bad keys, nothing
    // The producer's own: it has only 24 registers.
    int index, uncut, base, end, items, far;
    // Of an item: scales of its queries, largest |v| of its channels, ‖q‖·‖k‖.
    alignas(16) float q_scale[Q_STAGES][BLOCK_Q];
    u32 v_amax[Q_STAGES][D];
    float norms[Q_STAGES];
    u64 q_full[Q_STAGES], q_empty[Q_STAGES];
    u64 full[STAGES], empty[STAGES];
};

/// A work item: a query block of a head. Heads that share keys are neighbours; within a head the
/// longest causal rows come first.
struct Item {
    int head, q_block;
    __device__ __forceinline__ Item(const Args &a, int item)
        : head(item / a.q_blocks), q_block(a.q_blocks - 1 - item % a.q_blocks) {}
};

/// Position in a ring of N (a power of two): slot and parity.
template <int N> struct Ring {
    u32 count = 0;
    __device__ __forceinline__ u32 slot() const { return count % N; }
    __device__ __forceinline__ u32 parity() const { return count / N % 2; }
    __device__ __forceinline__ void next() { count++; }
};

/// Walks the kept key blocks of a query block, ascending.
struct Blocks {
    const u32 *words;  // null: all of them
    u32 word;
    int at;
    volatile int &end;
    __device__ __forceinline__ Blocks(const Args &a, const Item &item, volatile int &end)
        : at(0), end(end) {
        words = nullptr;
        if (a.mask) words = a.mask + static_cast<u32>(item.head * a.q_blocks + item.q_block) * static_cast<u64>(a.mask_words);
        word = words && end > 0 ? words[0] : 0;
    }
    /// The next block, or -1.
    __device__ __forceinline__ int next() {
        if (!words) return at < end ? at++ : -1;
        while (word == 0) {
            at += 32;
            if (at >= end) return -1;
            word = words[at >> 5];
        }
        const int block = at + __ffs(word) - 1;
        word &= word - 1;
        return block < end ? block : -1;
    }
};

template <int D, int STAGES>
__device__ __forceinline__ void produce(const Args &a, Smem<D, STAGES> &s) {
    constexpr u32 BYTES = BLOCK_KV * D;
    Ring<STAGES> ring;
    volatile Smem<D, STAGES> &mine = s;
    mine.items = 0;
    while ((mine.index = atomicAdd(a.counters, 1)) < a.batch * a.heads * a.q_blocks) {
        const Item item(a, mine.index);
        Ring<Q_STAGES> q_ring;
        q_ring.count = mine.items;
        mine.items = q_ring.count + 1;
        const u32 q_block = item.head * a.q_blocks + item.q_block;  // of all heads'
        const u32 kv_head = item.head / (a.heads / a.kv_heads);
        const float norms = as_float(a.q_norm[q_block]) * as_float(a.k_norm[kv_head]);
        mbar_wait(shared_address(&s.q_empty[q_ring.slot()]), q_ring.parity() ^ 1);
        const u32 q_full = shared_address(&s.q_full[q_ring.slot()]);
        s.norms[q_ring.slot()] = norms;
        mbar_expect(q_full, BLOCK_Q * (D + 4) + 4 * D);
        bulk_load(shared_address(s.q[q_ring.slot()]), a.q8 + static_cast<u64>(q_block) * (BLOCK_Q * D),
                  BLOCK_Q * D, q_full);
        bulk_load(shared_address(s.q_scale[q_ring.slot()]),
                  a.q_scale + static_cast<u64>(q_block) * BLOCK_Q, 4 * BLOCK_Q, q_full);
        bulk_load(shared_address(s.v_amax[q_ring.slot()]), a.v_amax + static_cast<u64>(kv_head) * D,
                  4 * D, q_full);

        // Blocks before this one are seen whole by every row.
        mine.uncut = visible_end(a, item.q_block * BLOCK_Q) / BLOCK_KV;
        mine.base = kv_head * a.kv_blocks;
        mine.end = reachable_blocks(a, min(a.qo_len, (item.q_block + 1) * BLOCK_Q));
        Blocks blocks(a, item, mine.end);
        int b0 = blocks.next();
        mine.far = norms <= MOST_NORM ? 0 : FAR;
        int flags = mine.far;
        do {
            const int b1 = b0 < 0 ? -1 : blocks.next();
            const int upcoming = b1 < 0 ? -1 : blocks.next();
            if (upcoming < 0) flags |= LAST;
            if (b0 < 0) flags |= EMPTY;
            if (b1 < 0 || b1 >= mine.uncut) flags |= CUT;
            mbar_wait(shared_address(&s.empty[ring.slot()]), ring.parity() ^ 1);
            s.tile[ring.slot()] =
                Tile{mine.index, b0 * BLOCK_KV, b1 < 0 ? -1 : b1 * BLOCK_KV, flags};
            const u32 i0 = mine.base + max(b0, 0);
            const u32 i1 = b1 < 0 ? i0 : mine.base + b1;
            u32 to = shared_address(s.k_scale[ring.slot()]);
            u32 full = shared_address(&s.full[ring.slot()]);
            mbar_expect(full, 4 * BYTES + 32);
            const float *scales = a.k_scale + (flags & CUT ? 4 : 0);
            bulk_load(to, scales + static_cast<u64>(i0) * 8, 16, full);
            bulk_load(to + 16, scales + static_cast<u64>(i1) * 8, 16, full);
            to = shared_address(s.k[ring.slot()][0]);
            bulk_load(to, a.k8 + static_cast<u64>(i0) * BYTES, BYTES, full);
            bulk_load(to + BYTES, a.k8 + static_cast<u64>(i1) * BYTES, BYTES, full);
            to = shared_address(s.v[ring.slot()][0]);
            bulk_load(to, a.v8 + static_cast<u64>(i0) * BYTES, BYTES, full);
            bulk_load(to + sizeof(s.v[0][0]), a.v8 + static_cast<u64>(i1) * BYTES, BYTES, full);
            ring.next();
            b0 = upcoming;
            flags = mine.far;
        } while (b0 >= 0);
    }
    mbar_wait(shared_address(&s.empty[ring.slot()]), ring.parity() ^ 1);
    s.tile[ring.slot()].item = -1;
    mbar_arrive(shared_address(&s.full[ring.slot()]));
}

}  // namespace sparge
