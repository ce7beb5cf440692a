// Stage 1 of the fast path: the softmax of the pooled scores, and the choice of key blocks.
//
// A warp owns a query block. `score` left what a row's normaliser is made of, so that scores, which no cache
// holds any more, are read once.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/choice.cuh"
#include "sparge/row.cuh"
#include "sparge/samples.cuh"

namespace sparge {

__device__ __forceinline__ bool has_bad(const uint4 &x) {  // any bf16 that is not finite
    bool bad = false;
    const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        bad |= (w[i] & 0x7f80u) == 0x7f80u || (w[i] & 0x7f800000u) == 0x7f800000u;
    return bad;
}

/// Grid (groups of query blocks, one a warp; heads from `first_head` on, then batch entries). Dynamic
/// shared memory: masses and shares, `kv_blocks` numbers each, of each warp. SUBS_Q: pooled rows per query block.
template <int D, int SUBS_Q>
__global__ void __launch_bounds__(128, 8) select(const __grid_constant__ Args a) {
    constexpr int SUB_Q = BLOCK_Q / SUBS_Q;
    constexpr int AT_ONCE = 8 / SUBS_Q;  // key blocks of a lane whose scores are loaded together
    extern __shared__ float masses[];
    wait_for_predecessor();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int some_heads = gridDim.y / a.batch, batch = blockIdx.y / some_heads;
    const int head = a.first_head + blockIdx.y % some_heads, pair = batch * a.heads + head;
    const int q_block = blockIdx.x * (blockDim.x / 32) + warp;
    if (q_block >= a.q_blocks) return;
    const Row row(a, q_block);
    const i64 in_pass = (static_cast<i64>(head - a.first_head) * a.batch + batch) * a.q_blocks + q_block;
    u32 *words = a.mask + (static_cast<i64>(pair) * a.q_blocks + q_block) * a.mask_words;
    float *mass = masses + 2 * warp * a.kv_blocks, *shares = mass + a.kv_blocks;
    if (a.budget[head].top_k >= 1.f) {
        for (int j = lane; j < row.reachable; j += 32) mass[j] = 0.f;
        __syncwarp();
        choose_blocks(mass, row.reachable, 0, 0.f, 0, 0.f, true, words, a.mask_words);
        return;
    }

    // A pooled query that is not finite says nothing; no more does its block. Its high part tells.
    const int last_row = min(BLOCK_Q, a.qo_len - q_block * BLOCK_Q), rows = ceil_div(last_row, SUB_Q);
    const u16 *pooled = a.q_pool + (static_cast<i64>(pair) * a.q_blocks + q_block) * SUBS_Q * 2 * D;
    bool bad = false;
    for (int i = lane; i < rows * (D / 8); i += 32)
        bad |= has_bad(load16(pooled + i / (D / 8) * 2 * D + i % (D / 8) * 8));

    // Each pooled query's normaliser and its number of rows: a few lanes have a query.
    constexpr int LANES = 32 / SUBS_Q;
    const int own = lane / LANES, chunks = ceil_div(a.kv_blocks, a.score_chunk);
    const float2 *parts = a.sums + (in_pass * SUBS_Q + own) * chunks;
    float top = LOWEST, sum = 0.f;
    if (own < rows)
        for (int i = lane % LANES; i < ceil_div(row.scored, a.score_chunk); i += LANES) {
            const float2 part = parts[i];
            const float higher = fmaxf(top, part.x);
            sum = sum * ex2(top - higher) + part.y * ex2(part.x - higher);
            top = higher;
        }
    float highest = top;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, step));
    sum *= ex2(top - highest);
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(FULL, sum, step);
    const float own_norm = sum > 0.f ? highest + lg2(sum) : 0.f;
    const float own_weight = sum > 0.f ? static_cast<float>(min(SUB_Q, last_row - own * SUB_Q)) : 0.f;
    bad = __any_sync(FULL, bad || !(fabsf(own_norm) < 1e30f));
    float total = 0.f, norm[SUBS_Q], weight[SUBS_Q];
#pragma unroll
    for (int r = 0; r < SUBS_Q; r++) {
        norm[r] = __shfl_sync(FULL, own_norm, r * LANES);
        weight[r] = __shfl_sync(FULL, own_weight, r * LANES);
        total += weight[r];
    }
    for (int i = 0; a.samples && i < a.sampled_rows; i++) {
        // Masses are not there yet: their place keeps what would be read three times.
        const float *in = a.samples + (in_pass * a.sampled_rows + i) * a.kv_blocks;
        load_row(mass, in, row.reachable);
        add_share(shares, mass, row.reachable, i == 0);
    }

    const float *scores = a.scores + in_pass * SUBS_Q * a.kv_blocks;
    const float by = total > 0.f ? 1.f / total : 0.f;
    float sampled = 0.f;
    const int last_scored = max(row.scored, 1) - 1;
    for (int j0 = lane; j0 < row.reachable; j0 += 32 * AT_ONCE) {
        // All loads before the first use, and unconditional: else they wait for each other.
        float x[AT_ONCE][SUBS_Q];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int r = 0; r < SUBS_Q; r++) x[i][r] = scores[r * a.kv_blocks + min(j0 + 32 * i, last_scored)];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int j = j0 + 32 * i;
            float m = 0.f;
            bool is_known = j < row.scored;
#pragma unroll
            for (int r = 0; r < SUBS_Q; r++) {
                const bool counts = weight[r] > 0.f;
                is_known &= x[i][r] == x[i][r] || !counts;
                m += counts ? ex2(x[i][r] - norm[r]) * weight[r] : 0.f;
            }
            if (j >= row.reachable) continue;
            mass[j] = is_known ? m * by : APART_MASS;
            if (a.samples && is_known) sampled += shares[j];
        }
    }
    sampled = warp_sum(sampled);
    const float by_sampled = sampled > 0.f ? 1.f / sampled : 0.f;
    int forced = 0;
    float forced_mass = 0.f;
    for (int j = lane; j < row.reachable; j += 32) {
        float m = mass[j];
        if (sampled > 0.f && m != APART_MASS) m = 0.5f * (m + shares[j] * by_sampled);
        const bool is_forced = row.forced(a, j);
        forced += is_forced;
        if (is_forced && m != APART_MASS) forced_mass += m;
        mass[j] = is_forced ? FORCED_MASS : m;
    }
    forced = __reduce_add_sync(FULL, forced);
    forced_mass = warp_sum(forced_mass);
    __syncwarp();
    const Budget &budget = a.budget[head];
    choose_blocks(mass, row.reachable, count_of(budget.top_k, row.reachable), budget.cdf, forced, forced_mass,
                  bad || sampled != sampled || (row.scored > 0 && total == 0.f), words, a.mask_words);
}

}  // namespace sparge
