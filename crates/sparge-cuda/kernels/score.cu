// The fast path's pooled scores: of every pooled query, the log-sum-exp of each key block, and what
// `select` needs to know of a row before it reads it: a number near its maximum and a sum of exponentials.
//
// Products are of bf16 with both parts of each factor (q·k = hi·hi + lo·hi + hi·lo, 16 bits of
// mantissa). A thread block has 128 pooled queries of a head and a chunk of its pooled keys, which come
// through a ring of slabs.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/row.cuh"
#include "sparge/slabs.cuh"

namespace sparge {

constexpr float MINUS_INFINITY = -1.f / 0.f;

/// Grid (groups of 128 pooled queries, then chunks of `score_chunk` key blocks; heads from
/// `first_head` on, then batch entries). SUBS_Q, SUBS_K: pooled rows per query block and per key block.
/// Dynamic shared memory: the queries' slabs, then the ring.
template <int D, int SUBS_Q, int SUBS_K>
__global__ void __launch_bounds__(SLAB_THREADS, D == 64 ? 3 : 2) score(const __grid_constant__ Args a) {
    static_assert(SUBS_K == 1 || SUBS_K == 4, "a block's pooled keys are those of two lanes");
    constexpr int SUB_Q = BLOCK_Q / SUBS_Q, SUB_K = BLOCK_KV / SUBS_K;
    constexpr int PART = D / 64, SLABS = 2 * PART;  // of the high or the low parts; of a pooled row
    constexpr int WIDTH = 128 * SLABS, ROWS = 2 * SLAB_ROWS;
    extern __shared__ __align__(1024) u8 tiles[];
    wait_for_predecessor();
    const int some_heads = gridDim.y / a.batch, batch = blockIdx.y / some_heads;
    const int head = a.first_head + blockIdx.y % some_heads, pair = batch * a.heads + head;
    const int kv_pair = batch * a.kv_heads + head / (a.heads / a.kv_heads);
    const int subs = a.q_blocks * SUBS_Q, groups = ceil_div(subs, ROWS);
    // The last queries first: where it is causal they see the most.
    const int first = (groups - 1 - static_cast<int>(blockIdx.x) % groups) * ROWS;
    const Row nearest(a, first / SUBS_Q);
    const Row furthest(a, min(a.q_blocks, ceil_div(first + ROWS, SUBS_Q)) - 1);
    const int chunk = static_cast<int>(blockIdx.x) / groups, begin = chunk * a.score_chunk * SUBS_K;
    const int sub_end = min(furthest.scored * SUBS_K, ceil_div(a.kv_len, SUB_K));
    const int end = min(sub_end, begin + a.score_chunk * SUBS_K);
    if (begin >= end || a.budget[head].top_k >= 1.f) return;

    const u32 queries = smem(tiles), ring = queries + 2 * SLABS * SLAB;
    const int mine = slab_row() * WIDTH + 16 * slab_chunk();
    const u8 *q = reinterpret_cast<const u8 *>(a.q_pool) + (static_cast<i64>(pair) * subs + first) * WIDTH + mine;
    const u8 *k = reinterpret_cast<const u8 *>(a.k_pool) +
                  static_cast<i64>(kv_pair) * a.kv_blocks * SUBS_K * WIDTH + mine;
    for (int i = 0; i < 2 * SLABS; i++) {
        const int row = i / SLABS * SLAB_ROWS;
        copy_slab(queries + i * SLAB, ceil_div(a.qo_len, SUB_Q) - first - row, 128, [&](int j) {
            return q + (row + SLAB_STEP * j) * WIDTH + 128 * (i % SLABS);
        });
    }
    Ring keys{ring, k, WIDTH, WIDTH, sub_end, SLABS, begin, end};
    keys.start();

    const int lane = threadIdx.x % 32, t = lane % 4;
    const int row0 = threadIdx.x / 32 * 16 + lane / 4;
    const i64 out_row = (static_cast<i64>(head - a.first_head) * a.batch + batch) * subs + first + row0;
    float *out = a.scores + out_row * a.kv_blocks;
    // The first of a tile's key blocks that a lane writes: 2 · (lane % 4), or of the two that two lanes share
    // in each of 16 pooled keys the even lane's, the odd lane's.
    const bool is_odd = t % 2 == 1;
    const int column = SUBS_K == 1 ? 2 * t : 2 * is_odd + t / 2;
    // Of the key blocks that a lane writes, per row: a number that is not below the scores, and the sum of
    // 2^(score - it). What is not a number counts as nothing.
    float tops[4], sums[4];
#pragma unroll
    for (int e = 0; e < 4; e++) tops[e] = LOWEST, sums[e] = 0.f;
    // Keys before this one are whole, scored and seen by every row: no masks.
    const int plain = min(visible_end(a, nearest.first), nearest.scored * BLOCK_KV);
    for (int k0 = begin; k0 < end; k0 += SLAB_ROWS) {
        float c[2][8][4] = {};
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
            const u32 taken = keys.take(), high = queries + slab % PART * SLAB;
            constexpr int APART = SLABS * SLAB;
            if (slab < PART) multiply_slabs<Bf16, 2>(c, {high + PART * SLAB, high}, APART, taken);
            else multiply_slabs<Bf16, 1>(c, {high}, APART, taken);
        }
        const bool is_plain = (k0 + SLAB_ROWS) * SUB_K <= plain;
        // Before all else, so that what follows is one stretch of code for all rows.
        if (!is_plain) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int q_sub = first + row0 + e / 2 * SLAB_ROWS + 8 * (e % 2);
                const int last = min(a.qo_len, q_sub / SUBS_Q * BLOCK_Q + (q_sub % SUBS_Q + 1) * SUB_Q) - 1;
                // Only blocks that `select` scores may count in the sums.
                const int seen = min(visible_end(a, last), Row(a, q_sub / SUBS_Q).scored * BLOCK_KV);
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    float &x = c[e / 2][i / 2][2 * (e % 2) + i % 2];
                    const int key = (k0 + 8 * (i / 2) + 2 * t + i % 2) * SUB_K;
                    const int count = min(SUB_K, a.kv_len - key);
                    if (count <= 0 || key >= seen) x = MINUS_INFINITY;
                    else if (count < SUB_K) x += lg2(static_cast<float>(count) / SUB_K);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int r = e % 2, row = e / 2 * SLAB_ROWS + 8 * r;
            float top = tops[e];
#pragma unroll
            for (int i = 0; i < 16; i++) top = fmaxf(top, c[e / 2][i / 2][2 * r + i % 2]);
            // Two lanes share a block.
            if (SUBS_K > 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
            top = fminf(top, HIGHEST);
            sums[e] *= ex2(tops[e] - top);
            tops[e] = top;
            // Where its blocks are, and how far from there the tile goes.
            const int at = k0 + SUBS_K * column;
            const int left = first + row0 + row < subs ? sub_end - at : 0;
            float *to = out + static_cast<i64>(row) * a.kv_blocks + at / SUBS_K;
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                float p[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float x = c[e / 2][n + i / 2][2 * r + i % 2];
                    p[i] = ex2(x - top);
                    if (SUBS_K > 1) continue;
                    const int past = 8 * (n + i / 2) + i % 2;
                    sums[e] += fmaxf(p[i], 0.f);
                    if (past < left) to[past] = x;
                }
                if (SUBS_K == 1) continue;
                const float part[2] = {p[0] + p[1], p[2] + p[3]};
                const float sum = (is_odd ? part[1] : part[0]) +
                                  __shfl_xor_sync(FULL, is_odd ? part[0] : part[1], 1);
                sums[e] += fmaxf(sum, 0.f);
                const float lse = top + lg2(sum);
                if (8 * n < left) to[2 * n] = lse;
            }
        }
    }

    const int chunks = ceil_div(a.kv_blocks, a.score_chunk);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = e / 2 * SLAB_ROWS + 8 * (e % 2);
        float top = fmaxf(tops[e], __shfl_xor_sync(FULL, tops[e], 1));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
        float sum = sums[e] * ex2(tops[e] - top);
        sum += __shfl_xor_sync(FULL, sum, 1);
        sum += __shfl_xor_sync(FULL, sum, 2);
        if (t == 0 && first + row0 + row < subs) a.sums[(out_row + row) * chunks + chunk] = float2{top, sum};
    }
}

}  // namespace sparge
