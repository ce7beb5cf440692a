// A few queries of each block against every key: no pooling, so no bias, but few. Both paths'
// selections mix their shares with the pooled masses.
//
// A thread block scores 128 sampled queries (f32: 64) of one head against a chunk of its keys, in products of
// the element type. Keys come through a ring of slabs in shared memory. What stays is the log-sum-exp
// of every (query, key block).
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/call.cuh"
#include "sparge/slabs.cuh"

namespace sparge {

constexpr float MINUS_INFINITY = -1.f / 0.f;
static_assert(SLAB_ROWS == BLOCK_KV, "a tile of keys is a key block");

template <class T> constexpr int SIZE = 2;
template <> constexpr int SIZE<F32> = 4;
/// Slabs of queries: an Ada GPU has no room for two of f32.
template <class T> constexpr int HALVES = 2;
template <> constexpr int HALVES<F32> = 1;

/// The query that is sample `at` of a sequence, `count` to a block: the middles of equal parts.
__device__ __forceinline__ int place_of(int at, int count, int q_len) {
    const int start = at / count * BLOCK_Q, rows = min(BLOCK_Q, q_len - start);
    return start + (2 * (at % count) + 1) * rows / (2 * count);
}

/// Sums over each four lanes: lane t gets that of parts[t % N].
template <int N> __device__ __forceinline__ float sum_of_four(const float (&parts)[N]) {
    static_assert(N == 2 || N == 4, "a lane's rows");
    const bool is_odd = threadIdx.x % 2 == 1, is_upper = threadIdx.x / 2 % 2 == 1;
    float pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        pairs[i] = (is_odd ? parts[2 * i + 1] : parts[2 * i]) +
                   __shfl_xor_sync(FULL, is_odd ? parts[2 * i] : parts[2 * i + 1], 1);
    if (N == 2) return pairs[0] + __shfl_xor_sync(FULL, pairs[0], 2);
    return (is_upper ? pairs[N / 2 - 1] : pairs[0]) +
           __shfl_xor_sync(FULL, is_upper ? pairs[0] : pairs[N / 2 - 1], 2);
}

/// Grid: x: groups of 64 · HALVES samples, then heads from `first_head` on, then sequences, then chunks of
/// `sample_chunk` key blocks. Dynamic shared memory: the queries' slabs, then the ring.
template <class T, bool HAS_MASK>
__global__ void __launch_bounds__(SLAB_THREADS, 3) sample(const __grid_constant__ Call a) {
    constexpr int ROWS = HALVES<T> * SLAB_ROWS;
    extern __shared__ __align__(1024) u8 tiles[];
    __shared__ int places[ROWS];
    wait_for_predecessor();
    const int count = a.sampled_rows, groups = ceil_div(a.q_blocks * count, ROWS);
    int item = blockIdx.x;
    // The last queries first: where it is causal they see the most.
    const int first = (groups - 1 - item % groups) * ROWS;
    item /= groups;
    const int head = a.first_head + item % a.some_heads;
    item /= a.some_heads;
    const int sequence = item % a.n_sequences;
    const int block0 = item / a.n_sequences * a.sample_chunk;
    const Sequence s = a.sequences[sequence];
    const int samples = ceil_div(s.q_len, BLOCK_Q) * count, kv_blocks = ceil_div(s.kv_len, BLOCK_KV);
    if (keeps_all(a.head[head], s) || first >= samples || block0 >= kv_blocks) return;
    const int block_end = min(kv_blocks, block0 + a.sample_chunk);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const View view(a, s);

    // The samples' query blocks see more than they do.
    const int from = first / count * BLOCK_Q;
    const int to = min(s.q_len, (min(samples, first + ROWS) - 1) / count * BLOCK_Q + BLOCK_Q);
    float *lse = samples_of(a, s, head) + static_cast<i64>(first) * kv_blocks;
    const int most = min(ROWS, samples - first);
    // Four lanes have the products of a few rows; one row each (of two, the first two lanes) is theirs to write.
    constexpr int LANE_ROWS = 2 * HALVES<T>;
    const auto row_of = [&](int e) { return e / 2 * SLAB_ROWS + warp * 16 + g + e % 2 * 8; };
    const bool writes = t < LANE_ROWS && row_of(t % LANE_ROWS) < most;
    float *own = lse + static_cast<i64>(row_of(t % LANE_ROWS)) * kv_blocks;
    const auto coverage = [&](int key, int key_end) {
        const bool crosses = key < view.sink && view.sink < key_end;
        return crosses ? PARTIAL_TILE : view.tile(from, to, key, key_end);
    };
    if (coverage(block0 * BLOCK_KV, min(s.kv_len, block_end * BLOCK_KV)) == EMPTY_TILE) {
        for (int j = block0; j < block_end; j++)
            if (writes) own[j] = MINUS_INFINITY;
        return;
    }

    const int width = a.dim * SIZE<T>, slabs = ceil_div(width, 128);
    const u32 queries = smem(tiles), ring = queries + HALVES<T> * slabs * SLAB;
    const u8 *q = static_cast<const u8 *>(a.q) +
                  SIZE<T> * (s.batch * a.qs.batch + head * a.qs.head + s.q_start * a.qs.token);
    const u8 *k = static_cast<const u8 *>(a.k) +
                  SIZE<T> * (s.batch * a.ks.batch + head / (a.heads / a.kv_heads) * a.ks.head +
                             (s.kv_start + slab_row()) * a.ks.token) + 16 * slab_chunk();
    if (threadIdx.x < ROWS)
        places[threadIdx.x] = place_of(first + min(static_cast<int>(threadIdx.x), most - 1), count, s.q_len);
    __syncthreads();
    for (int i = 0; i < HALVES<T> * slabs; i++) {
        const int row = i / slabs * SLAB_ROWS, byte = 128 * (i % slabs);
        copy_slab(queries + i * SLAB, most - row, width - byte, [&](int j) {
            return q + SIZE<T> * a.qs.token * places[row + slab_row() + SLAB_STEP * j] + byte + 16 * slab_chunk();
        });
    }
    Ring keys{ring, k, SIZE<T> * a.ks.token, width, s.kv_len, slabs, block0 * BLOCK_KV, block_end * BLOCK_KV};
    keys.start();

    // What a row's exponentials are relative to: the largest score of a block before, as long as the sums that
    // gives stay within 2^±16. Then no block needs its own, nor waits for all of its products to know it. A row's
    // numbers depend on no other row.
    float base[LANE_ROWS], own_base = as_float(0x7fc00000u);  // NaN: none yet
#pragma unroll
    for (int e = 0; e < LANE_ROWS; e++) base[e] = own_base;
    for (int block = block0; block < block_end; block++) {
        float c[HALVES<T>][8][4] = {};
#pragma unroll 1
        for (int slab = 0; slab < slabs; slab++) {
            const u32 taken = keys.take();
            multiply_slabs<T, 1>(c, {queries + slab * SLAB}, slabs * SLAB, taken);
        }
        const int key = block * BLOCK_KV, key_end = min(s.kv_len, key + BLOCK_KV);
        const bool plain =
            !HAS_MASK && key_end - key == BLOCK_KV && a.scale_log2 > 0.f && coverage(key, key_end) == FULL_TILE;
        float scale = a.scale_log2;
        bool sees = true;  // whether the lane's own row may see any of it
        if (!plain) {
            scale = 1.f;
            const int own_place = places[row_of(t % LANE_ROWS)];
            sees = key < view.hi(own_place) && (key_end > view.lo(own_place) || key < view.sink);
            const ElementMask mask(a, sequence, a.element_heads == 1 ? 0 : head);
#pragma unroll
            for (int e = 0; e < LANE_ROWS; e++) {
                const int place = places[row_of(e)], lo = view.lo(place), hi = view.hi(place);
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    float &x = c[e / 2][i / 2][e % 2 * 2 + i % 2];
                    const int at = key + 8 * (i / 2) + 2 * t + i % 2;
                    x *= a.scale_log2;
                    bool seen = at < hi && (at >= lo || at < view.sink);
                    if (HAS_MASK && seen) {
                        float bias;
                        seen = mask.sees(place, at, bias);
                        x += bias_log2(bias);
                        // One at a time: sixteen loads in flight take too many registers.
                        asm volatile("" ::: "memory");
                    }
                    if (!seen) x = MINUS_INFINITY;
                }
            }
        }
        float parts[LANE_ROWS];
#pragma unroll
        for (int e = 0; e < LANE_ROWS; e++) {
            parts[e] = 0.f;
#pragma unroll
            for (int i = 0; i < 16; i++)
                parts[e] += ex2(fmaf(c[e / 2][i / 2][e % 2 * 2 + i % 2], scale, -base[e]));
        }
        const float sum = sum_of_four<LANE_ROWS>(parts);
        const u32 fits = __ballot_sync(FULL, !sees || (sum > 1.f / 65536.f && sum < 65536.f));
        float result = sees ? own_base + lg2(sum) : MINUS_INFINITY;
        if (fits != FULL) {
#pragma unroll
            for (int e = 0; e < LANE_ROWS; e++) {
                float top = c[e / 2][0][e % 2 * 2], exact = 0.f;
#pragma unroll
                for (int i = 1; i < 16; i++) top = fmaxf(top, c[e / 2][i / 2][e % 2 * 2 + i % 2]);
                top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
                top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
                top *= scale;
                const float from = top == MINUS_INFINITY ? 0.f : top;
#pragma unroll
                for (int i = 0; i < 16; i++)
                    exact += ex2(fmaf(c[e / 2][i / 2][e % 2 * 2 + i % 2], scale, -from));
                exact += __shfl_xor_sync(FULL, exact, 1);
                exact += __shfl_xor_sync(FULL, exact, 2);
                if (fits >> (lane - t + e) & 1) continue;
                const bool is_number = fabsf(top) < 3e38f;
                if (is_number) base[e] = top;
                if (t % LANE_ROWS != e) continue;
                if (is_number) own_base = top;
                result = top == MINUS_INFINITY && exact == 0.f ? MINUS_INFINITY : top + lg2(exact);
            }
        }
        if (writes) own[block] = result;
    }
}

}  // namespace sparge
