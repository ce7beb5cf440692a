// Stage 1 of the fast path: the softmax of the pooled scores, and the choice of key blocks.
//
// A warp owns a query block. Its key blocks are chosen by a binary search for the smallest mass to
// keep: the largest threshold whose blocks reach the mass and the count that were asked for. No sort.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/row.cuh"
#include "sparge/samples.cuh"

namespace sparge {

constexpr float MINUS_INFINITY = -1.f / 0.f;

__device__ __forceinline__ bool has_bad(const uint4 &x) {  // any bf16 that is not finite
    bool bad = false;
    const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        bad |= (w[i] & 0x7f80u) == 0x7f80u || (w[i] & 0x7f800000u) == 0x7f800000u;
    return bad;
}

/// How many of `reachable` blocks a share of them is: the ceiling, where a product that is whole
/// up to rounding counts as that number.
__device__ __forceinline__ int count_of(float share, int reachable) {
    if (!(share > 0.f)) return 1;
    const double exact = static_cast<double>(share) * reachable, near = rint(exact);
    const double count = fabs(exact - near) <= 1e-6 * reachable ? near : ceil(exact);
    return max(1, min(reachable, static_cast<int>(count)));
}

// What stands in a mass's place.
constexpr float UNKNOWN = -2.f;  // a mean is not finite: kept, apart from the budget
constexpr float FORCED = -3.f;   // kept, counted in the budget

/// Writes the mask words of one query block: the forced blocks (whose number and mass are given),
/// then others in descending mass until all of them reach the budget.
__device__ __forceinline__ void choose(const Args &a, const Row &row, const Budget &budget,
                                       const float *mass, int forced, float forced_mass, bool all,
                                       u32 *words) {
    const int lane = threadIdx.x % 32, n = row.reachable;
    const int at_least = count_of(budget.top_k, n);
    const float cdf = budget.cdf;
    // The largest threshold (as bits: masses are not negative) that keeps enough.
    u32 low = 0, high = 0x40000000u;
    while (!all && high - low > 1) {
        const u32 middle = (low + high) / 2;
        const float threshold = as_float(middle);
        int count = 0;
        float sum = 0.f;
        for (int j = lane; j < n; j += 32)
            if (mass[j] >= threshold) {
                count++;
                sum += mass[j];
            }
        const bool enough =
            forced + static_cast<int>(__reduce_add_sync(FULL, count)) >= at_least &&
            forced_mass + warp_sum(sum) >= cdf;
        if (enough) low = middle; else high = middle;
    }
    // Of the blocks at the threshold itself, the first ones, as many as are needed.
    const float threshold = as_float(low);
    int above = 0;
    float sum = 0.f;
    for (int j = lane; j < n; j += 32)
        if (mass[j] > threshold) {
            above++;
            sum += mass[j];
        }
    above = forced + __reduce_add_sync(FULL, above);
    sum = forced_mass + warp_sum(sum);
    int ties = max(0, at_least - above);
    if (low == 0) ties = sum >= cdf ? ties : n;
    else if (sum < cdf) ties = max(ties, static_cast<int>(ceilf((cdf - sum) / threshold)));
    int seen = 0;
    for (int w = 0; w < a.mask_words; w++) {
        const int j = 32 * w + lane;
        const float m = j < n ? mass[j] : -1.f;
        const u32 equal = __ballot_sync(FULL, m == threshold);
        const int before = seen + __popc(equal & ((1u << lane) - 1));
        seen += __popc(equal);
        const bool keep = j < n && (all || m > threshold || (m == threshold && before < ties) ||
                                    m == UNKNOWN || m == FORCED);
        const u32 word = __ballot_sync(FULL, keep);
        if (lane == 0) words[w] = word;
    }
}

/// Grid (groups of query blocks, one a warp; heads from `first_head` on, then batch entries). Dynamic
/// shared memory: masses and shares, `kv_blocks` numbers each, of each warp. SUBS_Q: pooled rows per query block.
template <int D, int SUBS_Q>
__global__ void __launch_bounds__(128, 8) select(const __grid_constant__ Args a) {
    constexpr int SUB_Q = BLOCK_Q / SUBS_Q;
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
        choose(a, row, a.budget[head], mass, 0, 0.f, true, words);
        return;
    }

    // A pooled query that is not finite says nothing; no more does its block.
    const int last_row = min(BLOCK_Q, a.qo_len - q_block * BLOCK_Q), rows = ceil_div(last_row, SUB_Q);
    const u16 *pooled = a.q_pool + (static_cast<i64>(pair) * a.q_blocks + q_block) * SUBS_Q * 2 * D;
    bool bad = false;
    for (int i = 8 * lane; i < rows * 2 * D; i += 8 * 32) bad |= has_bad(load16(pooled + i));
    bad = __any_sync(FULL, bad);

    // Each pooled query's normaliser and its number of rows.
    const float *scores = a.scores + in_pass * SUBS_Q * a.kv_blocks;
    float top[SUBS_Q], sum[SUBS_Q];
#pragma unroll
    for (int r = 0; r < SUBS_Q; r++) top[r] = MINUS_INFINITY, sum[r] = 0.f;
#pragma unroll 2
    for (int j = lane; j < row.scored; j += 32)
#pragma unroll
        for (int r = 0; r < SUBS_Q; r++) {
            const float x = r < rows ? scores[r * a.kv_blocks + j] : MINUS_INFINITY;
            const float higher = fmaxf(top[r], x), base = higher == MINUS_INFINITY ? 0.f : higher;
            if (x == x) sum[r] = sum[r] * ex2(top[r] - base) + ex2(x - base);
            top[r] = higher;
        }
    float total = 0.f, norm[SUBS_Q], weight[SUBS_Q];
#pragma unroll
    for (int r = 0; r < SUBS_Q; r++) {
        const float highest = warp_max(top[r]), base = highest == MINUS_INFINITY ? 0.f : highest;
        const float all = warp_sum(sum[r] * ex2(top[r] - base));
        norm[r] = base + (all > 0.f ? lg2(all) : 0.f);
        weight[r] = all > 0.f && r < rows ? static_cast<float>(min(SUB_Q, last_row - r * SUB_Q)) : 0.f;
        bad |= r < rows && !(fabsf(norm[r]) < 1e30f);
        total += weight[r];
    }
    if (a.samples)
        sum_shares(shares, a.samples + in_pass * a.sampled_rows * a.kv_blocks, a.sampled_rows,
                   a.kv_blocks, row.reachable);

    const float by = total > 0.f ? 1.f / total : 0.f;
    float sampled = 0.f;
#pragma unroll 2
    for (int j = lane; j < row.reachable; j += 32) {
        float m = 0.f;
        bool is_known = j < row.scored;
#pragma unroll
        for (int r = 0; r < SUBS_Q; r++) {
            if (j >= row.scored || weight[r] == 0.f) continue;
            const float x = scores[r * a.kv_blocks + j];
            is_known &= x == x;
            m += ex2(x - norm[r]) * weight[r];
        }
        mass[j] = is_known ? m * by : UNKNOWN;
        if (a.samples && is_known) sampled += shares[j];
    }
    sampled = warp_sum(sampled);
    int forced = 0;
    float forced_mass = 0.f;
    for (int j = lane; j < row.reachable; j += 32) {
        float m = mass[j];
        if (sampled > 0.f && m != UNKNOWN) m = 0.5f * (m + shares[j] / sampled);
        const bool is_forced = row.forced(a, j);
        forced += is_forced;
        if (is_forced && m != UNKNOWN) forced_mass += m;
        mass[j] = is_forced ? FORCED : m;
    }
    forced = __reduce_add_sync(FULL, forced);
    forced_mass = warp_sum(forced_mass);
    __syncwarp();
    choose(a, row, a.budget[head], mass, forced, forced_mass,
           bad || sampled != sampled || (row.scored > 0 && total == 0.f), words);
}

}  // namespace sparge
