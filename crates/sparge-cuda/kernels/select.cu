// Stage 1: pooled scores, their softmax, and the choice of key blocks, in one kernel.
//
// A block of 256 threads owns ROWS pooled queries of one head. Its warps split the keys; scores are
// bf16 products with both parts of each factor (q·k = hi·hi + hi·lo + lo·hi, 16 bits of mantissa).
// Only the log-sum-exp of every (pooled query, key block) is kept, so that one pass over the keys
// is enough. A row's blocks are then chosen by a binary search for the smallest mass to keep: the
// largest threshold whose blocks reach the mass and the count that were asked for. No sort.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/ptx/mma.cuh"
#include "sparge/samples.cuh"

namespace sparge {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr u32 MINUS_INFINITY = 0xff800000u;

__device__ __forceinline__ bool has_bad(const uint4 &x) {  // any bf16 that is not finite
    bool bad = false;
    const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        bad |= (w[i] & 0x7f80u) == 0x7f80u || (w[i] & 0x7f800000u) == 0x7f800000u;
    return bad;
}

/// A query block's view of the key blocks.
struct Row {
    int first, last;    // query rows: first, last
    int reachable;      // key blocks before this one
    int scored;         // ... before this one, those whose keys some row sees entirely
    int diagonal, past; // key blocks on the diagonal and `keep_local` before it: from, to
    __device__ __forceinline__ Row(const Args &a, int q_block) {
        first = q_block * BLOCK_Q;
        last = min(a.qo_len, first + BLOCK_Q) - 1;
        const int end = visible_end(a, last);
        reachable = ceil_div(end, BLOCK_KV);
        scored = end == a.kv_len ? reachable : end / BLOCK_KV;
        const i64 from = max(0, min(a.kv_len, first + a.diagonal));
        const i64 local = from - static_cast<i64>(a.keep_local) * BLOCK_KV;
        diagonal = local > 0 ? static_cast<int>(local / BLOCK_KV) : 0;
        past = a.causal && local < end ? reachable : 0;
    }
    __device__ __forceinline__ bool forced(const Args &a, int j) const {
        return j < a.keep_first || j >= scored || (j >= diagonal && j < past);
    }
};

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
    if (low == 0) ties = n;
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

/// Grid (tiles of ROWS pooled queries, batch * heads from `first_head` on). SUBS_Q, SUBS_K: pooled rows per query block
/// and per key block. GROUPS: row groups of 16 * TILES rows among the warps.
template <int D, int SUBS_Q, int SUBS_K, int TILES, int GROUPS>
__global__ void __launch_bounds__(THREADS) select(const __grid_constant__ Args a) {
    constexpr int ROWS = 16 * TILES * GROUPS;
    constexpr int SUB_Q = BLOCK_Q / SUBS_Q, SUB_K = BLOCK_KV / SUBS_K;
    constexpr int KEY_WARPS = WARPS / GROUPS;
    extern __shared__ float lse[];  // [ROWS][pitch]
    __shared__ float weight[ROWS], norm[ROWS];
    __shared__ int bad[ROWS];
    const int pitch = a.kv_blocks | 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    const int some_heads = gridDim.y / a.batch, batch = blockIdx.y / some_heads;
    const int head = a.first_head + blockIdx.y % some_heads, pair = batch * a.heads + head;
    const int kv_pair = batch * a.kv_heads + head / (a.heads / a.kv_heads);
    const int subs = a.q_blocks * SUBS_Q, first = blockIdx.x * ROWS;
    const Row furthest(a, min(a.q_blocks, ceil_div(first + ROWS, SUBS_Q)) - 1);
    const int key_end = furthest.scored;  // key blocks that some row scores

    if (threadIdx.x < ROWS) bad[threadIdx.x] = 0;
    __syncthreads();
    // Two registers of a lane's 16 bytes make one k16 step: both factors permute d the same way.
    u32 q[2][TILES][D / 16][4];
    const int row0 = warp % GROUPS * 16 * TILES + lane / 4;
#pragma unroll
    for (int part = 0; part < 2; part++)
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = row0 + 16 * m + 8 * r, sub = first + row;
                const bool exists = sub < subs && sub % SUBS_Q * SUB_Q + sub / SUBS_Q * BLOCK_Q < a.qo_len;
#pragma unroll
                for (int i = 0; i < D / 32; i++) {
                    uint4 x{0, 0, 0, 0};
                    if (exists)
                        x = load16(a.q_pool + (static_cast<i64>(pair) * subs + sub) * 2 * D +
                                   part * D + 32 * i + 8 * t);
                    if (has_bad(x)) bad[row / SUBS_Q] = 1;
                    q[part][m][2 * i][r] = x.x;
                    q[part][m][2 * i][2 + r] = x.y;
                    q[part][m][2 * i + 1][r] = x.z;
                    q[part][m][2 * i + 1][2 + r] = x.w;
                }
            }
    const u16 *keys = a.k_pool + static_cast<i64>(kv_pair) * a.kv_blocks * SUBS_K * 2 * D;
    const int sub_end = min(key_end * SUBS_K, ceil_div(a.kv_len, SUB_K));
    // Keys before this one are whole, scored and seen by every row: no masks.
    const Row nearest(a, min(a.q_blocks - 1, first / SUBS_Q));
    const int plain = min(visible_end(a, nearest.first), nearest.scored * BLOCK_KV);
    uint4 k[2][D / 32];
    auto fetch = [&](int k0) {
        const int sub = k0 + lane / 4;
#pragma unroll
        for (int part = 0; part < 2; part++)
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                k[part][i] = uint4{0, 0, 0, 0};
                if (sub < sub_end)
                    k[part][i] =
                        load16(keys + static_cast<i64>(sub) * 2 * D + part * D + 32 * i + 8 * t);
            }
    };
    constexpr int STEP = KEY_WARPS * 8;
    fetch(warp / GROUPS * 8);
    for (int k0 = warp / GROUPS * 8; k0 < key_end * SUBS_K; k0 += STEP) {
        float scores[TILES][4] = {};
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float (&s)[4] = scores[m];
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                mma_half<Bf16>(s, q[1][m][2 * i], k[0][i].x, k[0][i].y);
                mma_half<Bf16>(s, q[1][m][2 * i + 1], k[0][i].z, k[0][i].w);
                mma_half<Bf16>(s, q[0][m][2 * i], k[1][i].x, k[1][i].y);
                mma_half<Bf16>(s, q[0][m][2 * i + 1], k[1][i].z, k[1][i].w);
            }
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                mma_half<Bf16>(s, q[0][m][2 * i], k[0][i].x, k[0][i].y);
                mma_half<Bf16>(s, q[0][m][2 * i + 1], k[0][i].z, k[0][i].w);
            }
        }
        fetch(k0 + STEP);  // arrives while the scores are reduced
        const bool is_plain = (k0 + 8) * SUB_K <= plain;
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = row0 + 16 * m + 8 * r, q_sub = first + row;
                const int q_block = q_sub / SUBS_Q;
                const bool exists = q_sub < subs;
                float x[2] = {scores[m][2 * r], scores[m][2 * r + 1]};
                int scored = key_end;
                if (!is_plain) {
                    const int sub_last =
                        min(a.qo_len, q_block * BLOCK_Q + (q_sub % SUBS_Q + 1) * SUB_Q) - 1;
                    const int seen = visible_end(a, sub_last);
                    scored = exists ? Row(a, q_block).scored : 0;
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int key = (k0 + 2 * t + j) * SUB_K;
                        const int count = min(SUB_K, a.kv_len - key);
                        if (count <= 0 || key >= seen) x[j] = as_float(MINUS_INFINITY);
                        else if (count < SUB_K) x[j] += lg2(static_cast<float>(count) / SUB_K);
                    }
                }
                float *out = lse + row * pitch;
                if (SUBS_K == 1) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int block = k0 + 2 * t + j;
                        if (exists && block < key_end)
                            out[block] = block < scored ? x[j] : as_float(MINUS_INFINITY);
                    }
                } else {
                    float top = fmaxf(x[0], x[1]);
                    top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
                    const float base = top == as_float(MINUS_INFINITY) ? 0.f : top;
                    float sum = ex2(x[0] - base) + ex2(x[1] - base);
                    sum += __shfl_xor_sync(FULL, sum, 1);
                    const int block = (k0 + 2 * t) / SUBS_K;
                    if (exists && t % 2 == 0 && block < key_end)
                        out[block] = block < scored ? base + lg2(sum) : as_float(MINUS_INFINITY);
                }
            }
    }
    __syncthreads();

    // Each row's normaliser, and its share of the query block's rows.
    for (int row = warp; row < ROWS; row += WARPS) {
        const int q_sub = first + row, q_block = q_sub / SUBS_Q;
        if (q_sub >= subs) break;
        const float *in = lse + row * pitch;
        float top = as_float(MINUS_INFINITY), sum = 0.f;
        for (int j = lane; j < key_end; j += 32) top = fmaxf(top, in[j]);
        top = warp_max(top);
        const float base = top == as_float(MINUS_INFINITY) ? 0.f : top;
        for (int j = lane; j < key_end; j += 32)
            if (in[j] == in[j]) sum += ex2(in[j] - base);
        sum = warp_sum(sum);
        if (lane == 0) {
            const int count =
                min(SUB_Q, a.qo_len - q_block * BLOCK_Q - q_sub % SUBS_Q * SUB_Q);
            norm[row] = base + (sum > 0.f ? lg2(sum) : 0.f);
            weight[row] = sum > 0.f && count > 0 ? static_cast<float>(count) : 0.f;
            if (!(fabsf(norm[row]) < 1e30f)) bad[row / SUBS_Q] = 1;
        }
    }
    __syncthreads();

    for (int block = warp; block < ROWS / SUBS_Q; block += WARPS) {
        const int q_block = first / SUBS_Q + block;
        if (q_block >= a.q_blocks) break;
        const Row row(a, q_block);
        float *mass = lse + block * SUBS_Q * pitch;
        float total = 0.f;
        for (int r = 0; r < SUBS_Q; r++) total += weight[block * SUBS_Q + r];
        const float by = total > 0.f ? 1.f / total : 0.f;
        const i64 q_block_at = (static_cast<i64>(head - a.first_head) * a.batch + batch) * a.q_blocks + q_block;
        const float *shares = nullptr;
        if (a.samples && a.budget[head].top_k < 1.f)
            shares = sum_shares(a.samples + q_block_at * a.sampled_rows * a.kv_blocks,
                                a.sampled_rows, a.kv_blocks, row.reachable);
        float sampled = 0.f;
        for (int j = lane; j < row.reachable; j += 32) {
            float m = 0.f;
            bool is_known = j < row.scored;
            for (int r = 0; j < row.scored && r < SUBS_Q; r++) {
                const int at = block * SUBS_Q + r;
                if (weight[at] == 0.f) continue;
                const float x = lse[at * pitch + j];
                is_known &= x == x;
                m += ex2(x - norm[at]) * weight[at];
            }
            mass[j] = is_known ? m * by : UNKNOWN;
            if (shares && is_known) sampled += shares[j];
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
               bad[block] != 0 || sampled != sampled || (row.scored > 0 && total == 0.f) ||
                   a.budget[head].top_k >= 1.f,
               a.mask + (static_cast<i64>(pair) * a.q_blocks + q_block) * a.mask_words);
    }
}

}  // namespace sparge
