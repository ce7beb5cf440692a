// Attention over kept blocks on Hopper: int8 Q·Kᵀ, fp32 online softmax, e4m3 P·V.
//
// A persistent block of 384 threads: one producer thread copies tiles of two 64-key blocks (any
// two: they need not be neighbours) into rings in shared memory (sparge/tiles.cuh); two consumer
// warpgroups own 64 query rows each. The softmax of a tile runs beside P·V of the one before, and,
// where registers allow, beside Q·Kᵀ of the next.
//
// The accumulator of Q·Kᵀ starts at MAGIC, the bits of 1.5·2²³: |acc| < 2²² then makes its bits the
// float 1.5·2²³ + acc, and no conversion is needed. P·V of a tile has its own accumulator, because
// the e4m3 units round sums to fewer bits than fp32; O = O·alpha + P·V is fp32. Sums of P come out
// of the same product, from a column of ones, so that they are of p as rounded.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/ptx/mbarrier.cuh"
#include "sparge/ptx/wgmma.cuh"
#include "sparge/tiles.cuh"

namespace sparge {

constexpr u32 MAGIC_BITS = 0x4B400000u;
constexpr float MAGIC = 12582912.0f;
constexpr float P_SCALE_LOG2 = 8.807354922057604f;  // log2(448): P is stored as 448·p
constexpr float NEVER = -1e30f;                     // running maximum before any key

/// The largest of four neighbouring lanes.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}

/// One consumer warpgroup's state for 64 query rows: a thread holds rows `row` and `row + 8`.
///
/// DEEP: Q·Kᵀ of the next tile runs beside the softmax of this one, in a second set of score
/// registers. With D = 128 there is no room for it.
template <int D, class T, int STAGES> struct Consumer {
    static constexpr int N = BLOCK_KV;
    static constexpr bool DEEP = D == 64;
    using Scores = u32[N];
    const Args &a;
    Smem<D, STAGES> &s;
    Ring<STAGES> ring;
    Ring<Q_STAGES> q_ring;
    u32 p[N / 4];
    float o[D / 2], part[D / 2 + 4];
    float running[2], sum[2], alpha[2], q_scale[2];
    const int group;  // 0 or 1: uniform

    __device__ __forceinline__ Consumer(const Args &a, Smem<D, STAGES> &s)
        : a(a), s(s), group(__shfl_sync(FULL, threadIdx.x / 128, 0)) {}

    // Read again at every use: registers are scarce.
    static __device__ __forceinline__ int thread() {
        int x;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
        return x;
    }
    static __device__ __forceinline__ int lane() { return thread() % 32; }
    static __device__ __forceinline__ int row() {  // within the query block
        const int t = thread();
        return t / 32 * 16 + t % 32 / 4;
    }

    __device__ __forceinline__ void begin(const Item &item) {
        const float *scales =
            a.q_scale + (static_cast<i64>(item.head) * a.q_blocks + item.q_block) * BLOCK_Q;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            running[r] = NEVER;
            sum[r] = 0.f;
            q_scale[r] = scales[row() + 8 * r];
        }
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0.f;
    }

    /// Waits for the keys of the ring's tile and starts scores = MAGIC + Q·Kᵀ. Returns its flags.
    __device__ __forceinline__ int issue_qk(Scores &scores) {
        const int slot = ring.slot();
        mbar_wait(shared_address(&s.k_full[slot]), ring.parity());
#pragma unroll
        for (int i = 0; i < N; i++) scores[i] = MAGIC_BITS;
        const u32 q = descriptor(shared_address(s.q[q_ring.slot()]) + group * 64 * D);
        const u32 k = descriptor(shared_address(s.k[slot][0]));
        pin_registers(scores);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 32; i++) wgmma_s8<D>(scores, q + 2 * i, k + 2 * i);
        wgmma_commit();
        return s.tile[slot].flags;
    }

    /// After Q·Kᵀ of the ring's tile: masks, scales, and the slot goes back.
    __device__ __forceinline__ void take_scores(Scores &scores, int flags) {
        const int slot = ring.slot();
        pin_registers(scores);
        if (flags & CUT) cut(scores, slot);
    }

    /// Starts part = P·V, or part += P·V, for the tile in `slot`.
    __device__ __forceinline__ void issue_pv(int slot) {
        const u32 v = descriptor(shared_address(s.v[slot][0]));
        pin_registers(p);
        pin_registers(part);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // Two steps in each half tile.
            const u32 at = v + (i / 2) * ((D + 8) * BLOCK_KV >> 4) + 2 * (i % 2);
            wgmma_e4m3(part, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], at,
                       i > 0);
        }
        wgmma_commit();
    }

    /// Takes pairs that are masked out of the scores.
    __device__ __forceinline__ void cut(Scores &scores, int slot) {
        const Tile tile = s.tile[slot];
        const int column = 2 * (lane() % 4);
        const int first = tile.flags & EMPTY ? a.kv_len : tile.first_key;
        const int second = tile.second_key < 0 ? a.kv_len : tile.second_key;
        const int token = Item(a, tile.item).q_block * BLOCK_Q + row();
        const int limit[2] = {visible_end(a, token), visible_end(a, token + 8)};
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int half = i / 32;
            const int key = (half ? second : first) + i % 32 / 4 * 8 + column + i % 2;
            if (key >= limit[i / 2 % 2]) scores[i] = 0xff800000u;
        }
        // Keys that are not finite are stored as 0: NaN to the rows that see them.
#pragma unroll 1
        for (int w = 0; w < 4; w++) {
            u32 bad = as_bits(s.k_scale[slot][w / 2][1 + w % 2]);
            if (bad == 0) continue;
            bad >>= column;
#pragma unroll
            for (int i = 0; i < N; i++)
                if (i / 16 == w && bad >> (i % 16 / 4 * 8 + i % 2) & 1 && scores[i] != 0xff800000u)
                    scores[i] = 0x7fc00000u;
        }
    }

    /// The largest raw score of row r in half h among this lane's. Scores are positive floats or
    /// −∞, which as integers order alike.
    static __device__ __forceinline__ float top_of(const Scores &scores, int r, int h) {
        auto at = [&](int i) {
            return static_cast<i32>(scores[32 * h + i / 2 * 4 + 2 * r + i % 2]);
        };
        i32 x = max(max(at(0), at(1)), at(2));
#pragma unroll
        for (int i = 3; i < 15; i += 2) x = max(max(x, at(i)), at(i + 1));
        return as_float(max(x, at(15)));
    }

    struct Exponent {
        float c, bias;  // log2(448·p) = raw score · c + bias
    };
    __device__ __forceinline__ Exponent exponent(float c, int r) const {
        return Exponent{c, fmaf(-MAGIC, c, P_SCALE_LOG2 - running[r])};
    }
    /// Scores of row r and half h become 448·p, as floats.
    static __device__ __forceinline__ void exponentials(Scores &scores, int r, int h, Exponent e) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            u32 &x = scores[32 * h + i / 2 * 4 + 2 * r + i % 2];
            x = as_bits(ex2(fmaf(as_float(x), e.c, e.bias)));
        }
    }
    /// The running maximum takes in `top`, a lane's; alpha is what earlier sums are worth beside it.
    __device__ __forceinline__ void raise(int r, float top) {
        const float m = fmaxf(quad_max(top), running[r]);
        alpha[r] = ex2(running[r] - m);
        running[r] = m;
    }

    /// Scores of the ring's tile become 448·p.
    __device__ __forceinline__ void softmax(Scores &scores) {
        const int slot = ring.slot();
        const float k_scale[2] = {s.k_scale[slot][0][0], s.k_scale[slot][1][0]};
        mbar_arrive_warp(shared_address(&s.k_empty[slot]));
        Exponent e[2][2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float c[2] = {q_scale[r] * k_scale[0], q_scale[r] * k_scale[1]};
            raise(r, fmaxf((top_of(scores, r, 0) - MAGIC) * c[0],
                           (top_of(scores, r, 1) - MAGIC) * c[1]));
#pragma unroll
            for (int h = 0; h < 2; h++) {
                e[r][h] = exponent(c[h], r);
                // Measured: one row after the other where the exponential unit is the limit, both
                // rows' maxima first where latency is.
                if (DEEP) exponentials(scores, r, h, e[r][h]);
            }
        }
        if (!DEEP)
#pragma unroll
            for (int i = 0; i < 4; i++) exponentials(scores, i / 2, i % 2, e[i / 2][i % 2]);
        // The assembler would move the wait for P·V up, before the softmax that is to run beside
        // it; it does not move it over the loop in this wait.
        pin_registers(scores);
        mbar_wait(shared_address(&s.v_full[slot]), ring.parity());
    }

    /// O and its sums, worth `by` now, take in `part`.
    __device__ __forceinline__ void accumulate(const float (&by)[2]) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = fmaf(o[i], by[i / 2 % 2], part[i]);
        // Only the first lane of four has the sums: column D.
        sum[0] = fmaf(sum[0], by[0], part[D / 2]);
        sum[1] = fmaf(sum[1], by[1], part[D / 2 + 2]);
    }

    /// P in the A operand's layout: V's keys are stored in the matching order.
    __device__ __forceinline__ void pack(Scores &scores) {
        pin_registers(p);
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            const int at = i / 2 * 8 + i % 2 * 2;
            p[i] = e4m3x4(as_float(scores[at]), as_float(scores[at + 1]),
                          as_float(scores[at + 4]), as_float(scores[at + 5]));
        }
    }

    __device__ __forceinline__ void finish(const Item &item) {
        const int batch = item.head / a.heads, head = item.head % a.heads;
        const int row = this->row(), lane = this->lane();
        const u32 *amax = a.v_amax + static_cast<i64>(item.head / (a.heads / a.kv_heads)) * D;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float l = __shfl_sync(FULL, sum[r], lane & ~3);
            const int token = item.q_block * BLOCK_Q + row + 8 * r;
            if (token >= a.qo_len) continue;
            const float by = l == 0.f ? 0.f : 1.f / (448.f * l);
            u32 *to = reinterpret_cast<u32 *>(
                static_cast<u16 *>(a.o) + batch * a.os.batch + head * a.os.head +
                token * a.os.token) + lane % 4;
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                const uint2 m = *reinterpret_cast<const uint2 *>(amax + 8 * i + 2 * (lane % 4));
                to[4 * i] = Half2<T>::pack(o[4 * i + 2 * r] * by * as_float(m.x),
                                           o[4 * i + 2 * r + 1] * by * as_float(m.y));
            }
            if (a.lse && lane % 4 == 0) {
                // Scores were taken of K less its mean.
                const float shift = a.q_shift[(static_cast<i64>(item.head) * a.q_blocks +
                                               item.q_block) * BLOCK_Q + row + 8 * r];
                const float lse =
                    (running[r] + shift + lg2(l) - P_SCALE_LOG2) * 0.69314718055994531f;
                a.lse[static_cast<i64>(item.head) * a.qo_len + token] =
                    l == 0.f ? as_float(0xff800000u) : lse;
            }
        }
    }

    /// The softmax of the ring's tile beside the products in flight, then P and what P·V of the
    /// tile before brings.
    __device__ __forceinline__ void finish_tile(Scores &now, bool is_first) {
        const float before[2] = {alpha[0], alpha[1]};
        softmax(now);
        wgmma_wait<0>();
        if (!is_first) {
            pin_registers(part);
            mbar_arrive_warp(shared_address(&s.v_empty[(ring.count - 1) % STAGES]));
            accumulate(before);
        }
        pack(now);
    }

    /// DEEP. One tile, whose scores are in `now`: starts Q·Kᵀ of the next tile into `next` and P·V
    /// of the tile before. Returns the next tile's flags.
    __device__ __forceinline__ int step(Scores &now, Scores &next, bool is_first) {
        ring.next();
        const int flags = issue_qk(next);
        ring.count--;
        if (!is_first) issue_pv((ring.count - 1) % STAGES);
        finish_tile(now, is_first);
        ring.next();
        take_scores(next, flags);
        return flags;
    }

    /// DEEP. The last tile of an item.
    __device__ __forceinline__ void last(Scores &now, bool is_first) {
        if (!is_first) issue_pv((ring.count - 1) % STAGES);
        finish_tile(now, is_first);
        finish_products();
    }

    /// P·V of an item's last tile.
    __device__ __forceinline__ void finish_products() {
        issue_pv(ring.slot());
        wgmma_wait<0>();
        pin_registers(part);
        mbar_arrive_warp(shared_address(&s.v_empty[ring.slot()]));
        accumulate(alpha);
        ring.next();
    }

    /// All tiles of an item; `even` holds the scores of the first, whose flags are given.
    __device__ __forceinline__ void tiles(Scores &even, int flags) {
        if constexpr (DEEP) {
            Scores odd;
            if (flags & LAST) return last(even, true);
            flags = step(even, odd, true);
            while (true) {
                if (flags & LAST) return last(odd, false);
                flags = step(odd, even, false);
                if (flags & LAST) return last(even, false);
                flags = step(even, odd, false);
            }
        } else {
            finish_tile(even, true);
            while (!(flags & LAST)) {
                ring.next();
                flags = issue_qk(even);
                issue_pv((ring.count - 1) % STAGES);
                wgmma_wait<1>();
                take_scores(even, flags);
                finish_tile(even, false);
            }
            finish_products();
        }
    }

    __device__ __forceinline__ void run() {
        while (true) {
            mbar_wait(shared_address(&s.k_full[ring.slot()]), ring.parity());
            int index = s.tile[ring.slot()].item;
            if (index < 0) break;
            begin(Item(a, index));
            mbar_wait(shared_address(&s.q_full[q_ring.slot()]), q_ring.parity());
            Scores scores;
            const int flags = issue_qk(scores);
            wgmma_wait<0>();
            take_scores(scores, flags);
            tiles(scores, flags);
            mbar_arrive_warp(shared_address(&s.q_empty[q_ring.slot()]));
            q_ring.next();
            asm volatile("" : "+r"(index));  // not to keep what `begin` made of it
            finish(Item(a, index));
        }
    }
};

template <int D, class T, int STAGES>
__global__ void __launch_bounds__(384, 1) attend_sm90(const __grid_constant__ Args a) {
    static_assert(sizeof(Smem<D, STAGES>) <= SPARGE_SHARED_BYTES, "src/spec.rs");
    extern __shared__ __align__(1024) u8 raw[];
    auto &s = *reinterpret_cast<Smem<D, STAGES> *>(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbar_init(shared_address(&s.k_full[i]), 1);
            mbar_init(shared_address(&s.v_full[i]), 1);
            mbar_init(shared_address(&s.k_empty[i]), CONSUMERS / 32);
            mbar_init(shared_address(&s.v_empty[i]), CONSUMERS / 32);
        }
        for (int i = 0; i < Q_STAGES; i++) {
            mbar_init(shared_address(&s.q_full[i]), 1);
            mbar_init(shared_address(&s.q_empty[i]), CONSUMERS / 32);
        }
        mbar_init_fence();
    }
    for (int i = threadIdx.x; i < STAGES * 2 * 8 * BLOCK_KV; i += blockDim.x) {
        const int tile = i / (8 * BLOCK_KV), at = i % (8 * BLOCK_KV);
        s.v[tile / 2][tile % 2][D * BLOCK_KV + at] = at < BLOCK_KV ? 0x38 : 0;  // 1.0 in e4m3
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    wait_for_predecessor();
    if (threadIdx.x >= CONSUMERS) {
        registers_down<24>();
        if (threadIdx.x == CONSUMERS) produce<D, STAGES>(a, s);
    } else {
        registers_up<240>();
        Consumer<D, T, STAGES>(a, s).run();
    }
}

}  // namespace sparge
