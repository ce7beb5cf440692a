// The general path's stage 1 up to the scores: means and variances of Q and K, the judge's cosines,
// and what the element mask lets through. Sums run in the order of the CPU's, so that means are
// the same numbers.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/call.cuh"
#include "sparge/rows.cuh"

namespace sparge {

constexpr int THREADS = 256;

/// Features of one block: per sub-block the mean and (second order) its square or the variance.
template <class T, bool IS_Q>
__device__ __forceinline__ void pool_block(const Call &a, int at) {
    const Block b = Block::of<IS_Q>(a, at, IS_Q ? a.qs : a.ks);
    const void *x = IS_Q ? a.q : a.k;
    const int sub_rows = IS_Q ? a.q_rows : a.kv_rows;
    const int subs = (IS_Q ? BLOCK_Q : BLOCK_KV) / sub_rows;
    float *out = (IS_Q ? a.q_features : a.k_features) + static_cast<i64>(at) * subs * a.width;
    const int pairs = a.dim / 2;
    bool known = true;
    for (int i = threadIdx.x; i < subs * pairs; i += THREADS) {
        const int sub = i / pairs, c = i % pairs * 2;
        const int rows = min(sub_rows, b.rows - sub * sub_rows);
        float mean[2] = {}, second[2] = {};
        if (rows > 0) {
            const i64 from = b.start + sub * sub_rows * b.stride + c;
#pragma unroll 4
            for (int r = 0; r < rows; r++) {
                const float2 y = Reader<T>::two(x, from + r * b.stride);
                mean[0] = __fadd_rn(mean[0], y.x);
                mean[1] = __fadd_rn(mean[1], y.y);
            }
            const float inverse = __fdiv_rn(1.f, static_cast<float>(rows));
            mean[0] = __fmul_rn(mean[0], inverse);
            mean[1] = __fmul_rn(mean[1], inverse);
            if (!IS_Q && a.second_order) {
#pragma unroll 4
                for (int r = 0; r < rows; r++) {
                    const float2 y = Reader<T>::two(x, from + r * b.stride);
                    const float d0 = __fadd_rn(y.x, -mean[0]), d1 = __fadd_rn(y.y, -mean[1]);
                    second[0] = __fadd_rn(second[0], __fmul_rn(d0, d0));
                    second[1] = __fadd_rn(second[1], __fmul_rn(d1, d1));
                }
                second[0] = __fmul_rn(second[0], inverse);
                second[1] = __fmul_rn(second[1], inverse);
            }
            if (IS_Q) {
                second[0] = __fmul_rn(__fmul_rn(mean[0], mean[0]), a.square_scale);
                second[1] = __fmul_rn(__fmul_rn(mean[1], mean[1]), a.square_scale);
                mean[0] = __fmul_rn(mean[0], a.scale_log2);
                mean[1] = __fmul_rn(mean[1], a.scale_log2);
            }
            known &= is_finite(mean[0]) && is_finite(mean[1]);
            if (a.second_order) known &= is_finite(second[0]) && is_finite(second[1]);
        }
        float *to = out + static_cast<i64>(sub) * a.width + c;
        *reinterpret_cast<float2 *>(to) = float2{mean[0], mean[1]};
        if (a.second_order) *reinterpret_cast<float2 *>(to + a.dim) = float2{second[0], second[1]};
    }
    const int used = a.second_order ? 2 * a.dim : a.dim;
    for (int i = threadIdx.x; i < subs * (a.width - used); i += THREADS)
        out[i / (a.width - used) * a.width + used + i % (a.width - used)] = 0.f;
    known = __syncthreads_and(known);
    if (threadIdx.x == 0) (IS_Q ? a.q_known : a.k_known)[at] = known;
}

/// Grid: all query blocks of all heads, then all key blocks.
template <class T> __global__ void __launch_bounds__(THREADS, 1) pool(const __grid_constant__ Call a) {
    const int q = a.heads * a.all_q_blocks;
    if (blockIdx.x < q) pool_block<T, true>(a, blockIdx.x);
    else pool_block<T, false>(a, blockIdx.x - q);
}

/// Sums of K over each block. CLEAN: elements that are not finite do not enter.
/// Grid: all key blocks of all heads.
template <class T, bool CLEAN>
__global__ void __launch_bounds__(128, 1) sums(const __grid_constant__ Call a) {
    const Block b = Block::of<false>(a, blockIdx.x, a.ks);
    const int c = 2 * threadIdx.x;
    if (c >= a.dim) return;
    double sum[2] = {};
#pragma unroll 4
    for (int r = 0; r < b.rows; r++) {
        const float2 y = Reader<T>::two(a.k, b.start + r * b.stride + c);
        sum[0] += !CLEAN || is_finite(y.x) ? y.x : 0.f;
        sum[1] += !CLEAN || is_finite(y.y) ? y.y : 0.f;
    }
    double *to = a.k_sums + static_cast<i64>(blockIdx.x) * a.dim + c;
    to[0] = sum[0];
    to[1] = sum[1];
}

/// The means that K is centred by: for the judge (PER_BLOCK) of the sequence, or, where later
/// tokens must not be seen, up to the end of each block; for int8 of the sequence.
/// Grid: sequences · kv_heads, a thread per channel.
template <bool PER_BLOCK>
__global__ void __launch_bounds__(THREADS, 1) centres(const __grid_constant__ Call a) {
    const int c = threadIdx.x, sequence = blockIdx.x % a.n_sequences, head = blockIdx.x / a.n_sequences;
    if (c >= a.dim) return;
    const Sequence s = a.sequences[sequence];
    const int blocks = ceil_div(s.kv_len, BLOCK_KV);
    const i64 first = (static_cast<i64>(head) * a.all_kv_blocks + s.kv_block0) * a.dim + c;
    const double *sums = a.k_sums + first;
    const bool prefix = PER_BLOCK && a.right >= 0;
    double total = 0.;
    for (int j = 0; j < blocks; j++) {
        total += sums[static_cast<i64>(j) * a.dim];
        if (prefix)
            a.k_centre[first + static_cast<i64>(j) * a.dim] =
                static_cast<float>(total / min(s.kv_len, (j + 1) * BLOCK_KV));
    }
    const float mean = s.kv_len > 0 ? static_cast<float>(total / s.kv_len) : 0.f;
    if (PER_BLOCK && !prefix)
        for (int j = 0; j < blocks; j++) a.k_centre[first + static_cast<i64>(j) * a.dim] = mean;
    if (!PER_BLOCK) a.k_mean[(static_cast<i64>(head) * a.n_sequences + sequence) * a.dim + c] = mean;
}

/// Mean pairwise cosine of a block's rows: the squared norm of the mean of its unit rows.
template <class T, bool IS_Q>
__device__ __forceinline__ void judge_block(const Call &a, int at) {
    __shared__ float inverse[BLOCK_Q], centre[256], squares[THREADS / 32];
    const Block b = Block::of<IS_Q>(a, at, IS_Q ? a.qs : a.ks);
    const void *x = IS_Q ? a.q : a.k;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int c = threadIdx.x; c < a.dim; c += THREADS)
        centre[c] = IS_Q ? 0.f : a.k_centre[static_cast<i64>(at) * a.dim + c];
    __syncthreads();
    for (int r = warp; r < b.rows; r += THREADS / 32) {
        float norm = 0.f;
        for (int c = 2 * lane; c < a.dim; c += 64) {
            const float2 y = Reader<T>::two(x, b.start + r * b.stride + c);
            norm += (y.x - centre[c]) * (y.x - centre[c]);
            norm += (y.y - centre[c + 1]) * (y.y - centre[c + 1]);
        }
        norm = warp_sum(norm);
        // A zero row has cosine 0 with everything.
        if (lane == 0) inverse[r] = norm == 0.f ? 0.f : __fdiv_rn(1.f, __fsqrt_rn(norm));
    }
    __syncthreads();
    float square = 0.f;
    for (int c = 2 * threadIdx.x; c < a.dim; c += 2 * THREADS) {
        float sum[2] = {};
        for (int r = 0; r < b.rows; r++) {
            const float2 y = Reader<T>::two(x, b.start + r * b.stride + c);
            sum[0] += (y.x - centre[c]) * inverse[r];
            sum[1] += (y.y - centre[c + 1]) * inverse[r];
        }
        square += sum[0] * sum[0] + sum[1] * sum[1];
    }
    square = warp_sum(square);
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0.f;
        for (int i = 0; i < THREADS / 32; i++) total += squares[i];
        const float rows = static_cast<float>(b.rows);
        (IS_Q ? a.q_cosine : a.k_cosine)[at] = total / (rows * rows);
    }
}

/// Grid as `pool`.
template <class T> __global__ void __launch_bounds__(THREADS, 1) judge(const __grid_constant__ Call a) {
    const int q = a.heads * a.all_q_blocks;
    if (blockIdx.x < q) judge_block<T, true>(a, blockIdx.x);
    else judge_block<T, false>(a, blockIdx.x - q);
}

/// Which 16-row groups of which blocks hold a pair that may be attended: bits of `groups`, zero
/// before. Grid: 8 · q_blocks · sequences · element_heads; warps share the key blocks.
template <int>
__global__ void __launch_bounds__(THREADS, 1) reach(const __grid_constant__ Call a) {
    const int q_block = blockIdx.x / 8 % a.q_blocks, group = blockIdx.x % 8;
    const int row_of_heads = blockIdx.x / 8 / a.q_blocks;
    const int sequence = row_of_heads / a.element_heads, head = row_of_heads % a.element_heads;
    const Sequence s = a.sequences[sequence];
    const View view(a, s);
    const ElementMask mask(a, sequence, head);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = q_block * BLOCK_Q + 16 * group, row_end = min(s.q_len, row + 16);
    u32 *words = a.groups +
                 static_cast<i64>(blockIdx.x) * a.mask_words;
    for (int j = warp; j < ceil_div(s.kv_len, BLOCK_KV); j += THREADS / 32) {
        bool any = false;
        for (int i = row; i < row_end && !any; i++)
            for (int c = lane; c < BLOCK_KV; c += 32) {
                const int key = j * BLOCK_KV + c;
                float bias;
                any |= key < s.kv_len && view.sees(i, key) && mask.sees(i, key, bias);
            }
        if (__any_sync(FULL, any) && lane == 0) atomicOr(words + (j >> 5), 1u << (j & 31));
    }
}

/// What the element mask adds to the score of each pair of pooled rows: log2 of the mean of
/// exp(bias) over the pairs that are seen; −∞ where none is.
/// Grid: q_subs · sequences · element_heads; warps share the pooled keys.
template <int>
__global__ void __launch_bounds__(THREADS, 1) pool_mask(const __grid_constant__ Call a) {
    const int subs = a.q_blocks * (BLOCK_Q / a.q_rows);
    const int sub = blockIdx.x % subs, row_of_heads = blockIdx.x / subs;
    const int sequence = row_of_heads / a.element_heads, head = row_of_heads % a.element_heads;
    const Sequence s = a.sequences[sequence];
    const View view(a, s);
    const ElementMask mask(a, sequence, head);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = sub * a.q_rows, row_end = min(s.q_len, row + a.q_rows);
    const int pitch = a.kv_blocks * (BLOCK_KV / a.kv_rows);
    float *out = a.element_pool + static_cast<i64>(blockIdx.x) * pitch;
    for (int k = warp; k < pitch; k += THREADS / 32) {
        const int key = k * a.kv_rows, count = min(a.kv_rows, s.kv_len - key);
        // Past the last row or key there are no pairs, and no product of two negative counts.
        if (row >= row_end || count <= 0) {
            if (lane == 0) out[k] = as_float(0xff800000u);
            continue;
        }
        float top = as_float(0xff800000u), sum = 0.f;
        int seen = 0;
        for (int e = lane; e < (row_end - row) * count; e += 32) {
            const int i = row + e / count, j = key + e % count;
            float bias;
            if (!view.sees(i, j) || !mask.sees(i, j, bias)) continue;
            seen++;
            // In natural-log units: times log2(e) the lowest biases leave f32's range.
            const float base = fmaxf(top, bias);
            sum = sum * ex2((top - base) * 1.4426950408889634f) + ex2((bias - base) * 1.4426950408889634f);
            top = base;
        }
        const float most = warp_max(top);
        if (seen) sum *= ex2((top - most) * 1.4426950408889634f);
        sum = warp_sum(sum);
        seen = warp_sum(seen);
        if (lane == 0)
            out[k] = seen == 0 ? as_float(0xff800000u)
                               : (most + lg2(sum / seen) * 0.69314718055994531f) * 1.4426950408889634f;
    }
}

/// both = mask (null: every block) ∧ the caller's block mask. Grid: any.
template <int>
__global__ void __launch_bounds__(THREADS, 1) intersect(const __grid_constant__ Call a) {
    const i64 row_words = a.mask_words, end = static_cast<i64>(a.n_sequences) * a.heads * a.q_blocks * row_words;
    for (i64 i = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x; i < end;
         i += static_cast<i64>(gridDim.x) * THREADS) {
        const int q_block = static_cast<int>(i / row_words % a.q_blocks);
        const int row_of_heads = static_cast<int>(i / row_words / a.q_blocks);
        const u32 *allowed = allowed_words(a, row_of_heads / a.heads, row_of_heads % a.heads, q_block);
        u32 word = a.mask ? a.mask[i] : FULL;
        if (allowed) word &= allowed[i % row_words];
        a.both[i] = word;
    }
}

/// Counts of each head: blocks that are reachable and that are computed, 16-row groups likewise
/// (the latter where the attention kernel does not count them). A warp per query block.
template <int>
__global__ void __launch_bounds__(THREADS, 1) count(const __grid_constant__ Call a) {
    const int item = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (item >= a.n_sequences * a.heads * a.q_blocks) return;
    const int q_block = item % a.q_blocks, head = item / a.q_blocks % a.heads;
    const int sequence = item / a.q_blocks / a.heads;
    const Sequence s = a.sequences[sequence];
    if (q_block * BLOCK_Q >= s.q_len) return;
    const View view(a, s);
    const u32 *allowed = allowed_words(a, sequence, head, q_block);
    const u32 *mask = a.mask ? mask_row(a, a.mask, sequence, head, q_block) : nullptr;
    int counts[4] = {};
    for (int j = lane; j < ceil_div(s.kv_len, BLOCK_KV); j += 32) {
        const int groups =
            __popc(reaching_groups(a, view, sequence, head, q_block, s.q_len, j, allowed));
        if (groups == 0) continue;
        const bool kept = !mask || has_bit(mask, j);
        counts[0]++;
        counts[1] += kept;
        counts[2] += groups;
        if (a.counts_products && kept) counts[3] += groups;
    }
    u64 *to = a.stats + (static_cast<i64>(sequence) * a.heads + head) * 4;
    for (int i = 0; i < 4; i++) {
        const int total = warp_sum(counts[i]);
        if (lane == 0 && total > 0) atomicAdd(to + i, static_cast<u64>(total));
    }
}

}  // namespace sparge
