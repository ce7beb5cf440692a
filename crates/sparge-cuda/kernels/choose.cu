// The general path's selection: pooled scores, their softmax and the choice of key blocks, for every
// pooling, mask and window.
//
// Scores are tf32 products of both parts of each factor (hi·hi + hi·lo + lo·hi: 22 bits of
// mantissa), with the pooled keys on the long side of the instruction: a query block has few pooled
// rows. A thread block owns at least 32 pooled queries, keeps the log-sum-exp of every (pooled query,
// key block) in its own piece of the workspace, and then chooses as `select` does.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/ptx/mma.cuh"
#include "sparge/call.cuh"
#include "sparge/choice.cuh"
#include "sparge/rows.cuh"
#include "sparge/samples.cuh"

namespace sparge {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PASS = 32;  // pooled queries that are scored together
constexpr float MINUS_INFINITY = -1.f / 0.f;

// A key block as a query block sees it.
enum : u8 { REACHABLE = 1, FORCED = 2, SCORED = 4, KNOWN = 8 };

__device__ __forceinline__ u8 kind_of(const Call &a, const Sequence &s, const View &view,
                                      int sequence, int head, int q_block, int j, float theta,
                                      const u32 *allowed) {
    const int row = q_block * BLOCK_Q, last = min(s.q_len, row + BLOCK_Q) - 1;
    const int key = j * BLOCK_KV, key_end = min(s.kv_len, key + BLOCK_KV);
    bool reachable = !allowed || has_bit(allowed, j);
    if (reachable)
        reachable = a.element_kind == NO_MASK
            ? view.tile(row, last + 1, key, key_end) != EMPTY_TILE
            : reaching_groups(a, view, sequence, head, q_block, s.q_len, j, allowed) != 0;
    if (!reachable) return 0;
    const bool has_diagonal = view.right >= 0;
    const bool frontier = has_diagonal && key_end > view.hi(last);
    const int from = clamp(static_cast<i64>(row) + s.diagonal, s.kv_len);
    const i64 local = from - static_cast<i64>(a.keep_local) * BLOCK_KV;
    const int to = clamp(static_cast<i64>(last) + s.diagonal + 1, s.kv_len);
    const bool forced =
        j < a.keep_first || frontier || (has_diagonal && key < to && local < key_end);
    const i64 at = static_cast<i64>(head / (a.heads / a.kv_heads)) * a.all_kv_blocks + s.kv_block0 + j;
    const bool known = a.k_known[at] && (theta == 0.f || a.k_cosine[at] > theta);
    return REACHABLE | (forced ? FORCED : 0) | (known ? KNOWN : 0) |
           (known && !frontier ? SCORED : 0);
}

/// Scores of 16 pooled keys from `k0` on against the 32 pooled queries in `q` (pitch floats apart):
/// c[n][i] is key lane / 4 + 8 · (i / 2), query 8n + 2 · (lane % 4) + i % 2.
__device__ __forceinline__ void score(const Call &a, const float *q, int pitch, const float *k,
                                      int k0, int k_end, float (&c)[4][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr int AHEAD = 2;  // loads of this many steps are in flight
    float4 loaded[AHEAD][2];
    auto load = [&](int d, float4 (&x)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            x[r] = float4{0.f, 0.f, 0.f, 0.f};
            if (k0 + g + 8 * r < k_end && d < a.width)
                x[r] = *reinterpret_cast<const float4 *>(
                    k + static_cast<i64>(k0 + g + 8 * r) * a.width + d + 4 * t);
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load(16 * i, loaded[i]);
#pragma unroll 1
    for (int d0 = 0; d0 < a.width; d0 += 16 * AHEAD)
#pragma unroll
    for (int ahead = 0; ahead < AHEAD; ahead++) {
        const int d = d0 + 16 * ahead;
        if (d >= a.width) break;
        u32 hi[2][4], lo[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float4 x = loaded[ahead][r];
            const float y[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {  // element 2s + h is column t + 4h of step s
                const u32 top = as_bits(y[i]) & 0xffffe000u;
                hi[i / 2][i % 2 * 2 + r] = top;
                lo[i / 2][i % 2 * 2 + r] = as_bits(y[i] - as_float(top));
            }
        }
        load(d + 16 * AHEAD, loaded[ahead]);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float4 x =
                *reinterpret_cast<const float4 *>(q + (8 * n + g) * pitch + d + 4 * t);
            const float y[4] = {x.x, x.y, x.z, x.w};
            u32 top[4], rest[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                top[i] = as_bits(y[i]) & 0xffffe000u;
                rest[i] = as_bits(y[i] - as_float(top[i]));
            }
#pragma unroll
            for (int s = 0; s < 2; s++) {
                mma_tf32(c[n], lo[s], top[2 * s], top[2 * s + 1]);
                mma_tf32(c[n], hi[s], rest[2 * s], rest[2 * s + 1]);
                mma_tf32(c[n], hi[s], top[2 * s], top[2 * s + 1]);
            }
        }
    }
}

/// Grid: any; thread blocks share the groups of query blocks. Dynamic shared memory: 32 pooled
/// queries of `pitch` floats. Q_ROWS and KV_ROWS: the pooling; 0 for what `a` says.
template <int Q_ROWS, int KV_ROWS>
__global__ void __launch_bounds__(THREADS, Q_ROWS == 0 ? 1 : 2)
choose(const __grid_constant__ Call a) {
    const int q_rows = Q_ROWS == 0 ? a.q_rows : Q_ROWS, kv_rows = KV_ROWS == 0 ? a.kv_rows : KV_ROWS;
    extern __shared__ float4 q_tile4[];
    float *q_tile = reinterpret_cast<float *>(q_tile4);
    __shared__ float tops[BLOCK_Q], weights[BLOCK_Q];
    __shared__ int unknown[PASS];
    __shared__ float2 scores[WARPS][8][32];
    __shared__ Sequence s;
    __shared__ Head head;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
    const int subs = BLOCK_Q / q_rows, per_block = BLOCK_KV / kv_rows;
    const int rows = max(PASS, subs), blocks = rows / subs;  // of an item
    const int unit = min(per_block, 16), entries = per_block / unit;  // pooled keys per entry
    const int pitch = a.kv_blocks * entries;
    const int q_pitch = a.width + (a.width % 32 == 0 ? 16 : 0);
    float *lse = a.scratch + static_cast<i64>(blockIdx.x) *
                                 (static_cast<i64>(rows) * pitch + blocks * a.kv_blocks +
                                  ceil_div(blocks * a.kv_blocks, 4));
    float *masses = lse + static_cast<i64>(rows) * pitch;
    u8 *kinds = reinterpret_cast<u8 *>(masses + blocks * a.kv_blocks);
    const int chunks = ceil_div(a.q_blocks, blocks);

    for (int item = blockIdx.x; item < a.n_sequences * a.some_heads * chunks; item += gridDim.x) {
        const int first = item % chunks * blocks, head_index = a.first_head + item / chunks % a.some_heads;
        const int sequence = item / chunks / a.some_heads;
        __syncthreads();
        if (threadIdx.x == 0) {
            s = a.sequences[sequence];
            head = a.head[head_index];
        }
        __syncthreads();
        const View view(a, s);
        const bool dense = keeps_all(head, s);
        const int q_blocks = ceil_div(s.q_len, BLOCK_Q), kv_blocks = ceil_div(s.kv_len, BLOCK_KV);
        const int kv_head = head_index / (a.heads / a.kv_heads);
        const i64 q_block0 = static_cast<i64>(head_index) * a.all_q_blocks + s.q_block0;

        // What each block is; rows of the mask that are known without scores.
        for (int b = warp; b < blocks; b += WARPS) {
            const int q_block = first + b;
            if (q_block >= a.q_blocks) break;
            const u32 *allowed = allowed_words(a, sequence, head_index, q_block);
            u32 *words = mask_row(a, a.mask, sequence, head_index, q_block);
            const bool exists = q_block < q_blocks;
            bool known = exists;
            if (exists && !dense) {
                known = a.q_known[q_block0 + q_block];
                if (head.theta > 0.f) known &= a.q_cosine[q_block0 + q_block] > head.theta;
            }
            if (lane == 0) unknown[b] = !known;
            for (int w = 0; w < a.mask_words; w++) {
                const int j = 32 * w + lane;
                u8 kind = 0;
                if (exists && j < kv_blocks)
                    kind = dense ? reaching_groups(a, view, sequence, head_index, q_block, s.q_len,
                                                   j, allowed) != 0
                                 : kind_of(a, s, view, sequence, head_index, q_block, j, head.theta,
                                           allowed);
                if (j < a.kv_blocks) kinds[b * a.kv_blocks + j] = kind;
                const u32 word = __ballot_sync(FULL, kind != 0);
                if (lane == 0) words[w] = word;
            }
        }
        if (dense || first >= q_blocks) continue;

        const int row = first * BLOCK_Q, row_end = min(s.q_len, row + blocks * BLOCK_Q);
        const float *k = a.k_features +
                         (static_cast<i64>(kv_head) * a.all_kv_blocks + s.kv_block0) * per_block * a.width;
        const int k_end = kv_blocks * per_block;
        for (int pass = 0; pass < rows; pass += PASS) {
            const float *q = a.q_features + ((q_block0 + first) * subs + pass) * a.width;
            const int q_end = (q_blocks - first) * subs - pass;
            __syncthreads();
            for (int i = threadIdx.x; i < PASS * a.width; i += THREADS) {
                const int r = i / a.width;
                q_tile[r * q_pitch + i % a.width] = r < q_end ? q[i] : 0.f;
            }
            __syncthreads();
            for (int k0 = 16 * warp; k0 < k_end; k0 += 16 * WARPS) {
                const int key = k0 * kv_rows, key_end = min(s.kv_len, key + 16 * kv_rows);
                // The tile may cross the end of the sinks; then it is not plain.
                const bool crosses = key < view.sink && view.sink < key_end;
                const Coverage whole = crosses ? PARTIAL_TILE : view.tile(row, row_end, key, key_end);
                if (whole == EMPTY_TILE) {
                    // No block of it is reachable, where it holds a whole one; else it is an entry
                    // of a block whose other keys may be.
                    if (per_block > 16) lse[static_cast<i64>(pass + lane) * pitch + k0 / 16] = MINUS_INFINITY;
                    continue;
                }
                const bool plain = whole == FULL_TILE && key + 16 * kv_rows <= s.kv_len &&
                                   a.element_kind == NO_MASK;
                float c[4][4] = {};
                score(a, q_tile, q_pitch, k, k0, k_end, c);
                // Through shared memory, so that one copy of what follows serves all columns.
#pragma unroll
                for (int e = 0; e < 8; e++)
                    scores[warp][e][lane] = float2{c[e / 2][e % 2], c[e / 2][2 + e % 2]};
#pragma unroll 1
                for (int e = 0; e < 8; e++) {
                        const int column = 8 * (e / 2) + 2 * t + e % 2, sub = pass + column;
                        float x[2] = {scores[warp][e][lane].x, scores[warp][e][lane].y};
                        if (!plain) {
                            const int from = row + sub * q_rows;
                            const int to = min(s.q_len, from + q_rows);
#pragma unroll
                            for (int r = 0; r < 2; r++) {
                                const int index = k0 + lane / 4 + 8 * r, at = index * kv_rows;
                                const int end = min(s.kv_len, at + kv_rows);
                                bool seen = view.tile(from, to, at, end) != EMPTY_TILE;
                                if (seen && end - at < kv_rows)
                                    x[r] += lg2(static_cast<float>(end - at) / kv_rows);
                                if (seen && a.element_kind != NO_MASK) {
                                    const int h = a.element_heads == 1 ? 0 : head_index;
                                    const float bias = a.element_pool
                                        [((static_cast<i64>(sequence) * a.element_heads + h) *
                                              a.q_blocks * subs + first * subs + sub) *
                                             a.kv_blocks * per_block + index];
                                    seen = bias != MINUS_INFINITY;
                                    x[r] += bias;
                                }
                                if (!seen) x[r] = MINUS_INFINITY;
                            }
                        }
                        // The log-sum-exp of each entry.
                        float top[2] = {x[0], x[1]};
                        if (unit == 16) top[0] = top[1] = fmaxf(x[0], x[1]);
                        for (int step = 1; step < min(unit, 8); step *= 2)
#pragma unroll
                            for (int r = 0; r < 2; r++)
                                top[r] = fmaxf(top[r], __shfl_xor_sync(FULL, top[r], 4 * step));
                        float sum[2];
#pragma unroll
                        for (int r = 0; r < 2; r++)
                            sum[r] = ex2(x[r] - (top[r] == MINUS_INFINITY ? 0.f : top[r]));
                        if (unit == 16) sum[0] = sum[1] = sum[0] + sum[1];
                        for (int step = 1; step < min(unit, 8); step *= 2)
#pragma unroll
                            for (int r = 0; r < 2; r++)
                                sum[r] += __shfl_xor_sync(FULL, sum[r], 4 * step);
#pragma unroll
                        for (int r = 0; r < 2; r++) {
                            const int at = k0 + lane / 4 + 8 * r;
                            if (at < k_end && at % unit == 0)
                                lse[static_cast<i64>(sub) * pitch + at / unit] =
                                    unit == 1 ? x[r]
                                    : top[r] == MINUS_INFINITY && sum[r] == 0.f
                                        ? MINUS_INFINITY : top[r] + lg2(sum[r]);
                        }
                    }
            }
        }
        __syncthreads();

        // Each pooled query's normaliser, and its share of the query block's rows.
        for (int r = warp; r < rows; r += WARPS) {
            const int b = r / subs;
            if (first + b >= q_blocks) break;
            const int count = min(q_rows, s.q_len - (first + b) * BLOCK_Q - r % subs * q_rows);
            const float *in = lse + static_cast<i64>(r) * pitch;
            const u8 *kind = kinds + b * a.kv_blocks;
            float top = MINUS_INFINITY, sum = 0.f;
            for (int j = lane; j < kv_blocks * entries; j += 32)
                if (kind[j / entries] & SCORED) top = fmaxf(top, in[j]);
            top = warp_max(top);
            const float base = top == MINUS_INFINITY ? 0.f : top;
            for (int j = lane; j < kv_blocks * entries; j += 32)
                if (kind[j / entries] & SCORED) sum += ex2(in[j] - base);
            sum = warp_sum(sum);
            if (lane == 0) {
                const bool some = count > 0 && sum > 0.f;
                tops[r] = base;
                weights[r] = some ? count / sum : 0.f;
                if (count > 0 && (!(sum < 3e38f) || top > 3e38f)) unknown[b] = 1;
            }
        }
        __syncthreads();

        for (int b = warp; b < blocks; b += WARPS) {
            const int q_block = first + b;
            if (q_block >= q_blocks) break;
            const u8 *kind = kinds + b * a.kv_blocks;
            float *mass = masses + b * a.kv_blocks;
            float total = 0.f;
            for (int r = 0; r < subs; r++)
                if (weights[b * subs + r] > 0.f)
                    total += min(q_rows, s.q_len - q_block * BLOCK_Q - r * q_rows);
            int reachable = 0, forced = 0, scored = 0;
            double forced_mass = 0.;
            for (int j = lane; j < kv_blocks; j += 32) {
                float m = 0.f;
                if (kind[j] & SCORED) {
                    for (int e = 0; e < entries; e++)
                        for (int r = b * subs; r < (b + 1) * subs; r++)
                            if (weights[r] > 0.f)
                                m += ex2(lse[static_cast<i64>(r) * pitch + j * entries + e] - tops[r]) *
                                     weights[r];
                    m /= total;
                    scored++;
                }
                reachable += (kind[j] & REACHABLE) != 0;
                forced += (kind[j] & FORCED) != 0;
                mass[j] = m;
            }
            float *shares = nullptr;
            if (a.samples) {
                shares = samples_of(a, s, head_index) +
                         static_cast<i64>(q_block) * a.sampled_rows * kv_blocks;
                // Summed in the place of the first.
                for (int i = 0; i < a.sampled_rows; i++)
                    add_share(shares, shares + static_cast<i64>(i) * kv_blocks, kv_blocks, i == 0);
            }
            float sampled = 0.f;
            for (int j = lane; shares && j < kv_blocks; j += 32)
                if (kind[j] & SCORED) sampled += shares[j];
            sampled = warp_sum(sampled);
            for (int j = lane; j < kv_blocks; j += 32) {
                const float m = sampled > 0.f ? 0.5f * (mass[j] + shares[j] / sampled) : mass[j];
                if (kind[j] & FORCED) {
                    if (kind[j] & SCORED) forced_mass += m;
                    mass[j] = FORCED_MASS;
                } else {
                    mass[j] = kind[j] & SCORED ? m : kind[j] & REACHABLE ? APART_MASS : NO_MASS;
                }
            }
            reachable = warp_sum(reachable);
            forced = warp_sum(forced);
            scored = warp_sum(scored);
            forced_mass = warp_sum(forced_mass);
            __syncwarp();
            // Where nothing can be told, every reachable block stays: it is written already.
            if (unknown[b] || sampled != sampled || (scored > 0 && total == 0.f)) continue;
            choose_blocks(mass, kv_blocks, count_of(head.top_k, reachable), head.cdf, forced, forced_mass,
                          false, mask_row(a, a.mask, sequence, head_index, q_block), a.mask_words);
        }
    }
}

}  // namespace sparge
