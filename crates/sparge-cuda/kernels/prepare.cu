// Preparation: the mean of K and the largest |V| per channel (`statistics`), then everything in one
// pass (`quantize`): int8 Q and K, e4m3 V, and pooled Q and K for the selection. Outputs are images
// of the attention kernel's shared-memory tiles, so that it can fetch them with plain bulk copies.
#include "sparge/part.cuh"

namespace sparge {

constexpr int THREADS = 256;

/// Grid (chunks, batch * kv_heads). Non-finite elements do not enter: they stay in their blocks.
template <int D, class T>
__global__ void __launch_bounds__(THREADS) statistics(const __grid_constant__ Args a) {
    constexpr int LANES = D / 8, ROWS = THREADS / LANES;
    __shared__ float sums[ROWS][D];
    __shared__ u32 tops[ROWS][D];
    __shared__ u32 is_last;
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
    const int pair = blockIdx.y, batch = pair / a.kv_heads, head = pair % a.kv_heads;
    const u16 *k = static_cast<const u16 *>(a.k) + batch * a.ks.batch + head * a.ks.head + lane * 8;
    const u16 *v = static_cast<const u16 *>(a.v) + batch * a.vs.batch + head * a.vs.head + lane * 8;
    float sum[8] = {};
    u32 top[8] = {};
    const int start = blockIdx.x * a.chunk, end = min(a.kv_len, start + a.chunk);
#pragma unroll 4
    for (int i = start + row; i < end; i += ROWS) {
        float x[8], y[8];
        unpack8<T>(load16(k + i * a.ks.token), x);
        unpack8<T>(load16(v + i * a.vs.token), y);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum[j] += is_finite(x[j]) ? x[j] : 0.f;
            top[j] = umax(top[j], is_finite(y[j]) ? magnitude(y[j]) : 0);
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        sums[row][lane * 8 + j] = sum[j];
        tops[row][lane * 8 + j] = top[j];
    }
    __syncthreads();
    const int d = threadIdx.x;
    if (d < D) {
        float total = 0.f;
        u32 most = 0;
        for (int i = 0; i < ROWS; i++) {
            total += sums[i][d];
            most = umax(most, tops[i][d]);
        }
        a.partial[(static_cast<i64>(pair) * a.chunks + blockIdx.x) * D + d] = total;
        atomicMax(a.v_amax + pair * D + d, most);
        __threadfence();
    }
    __syncthreads();
    // The last block of a head adds the chunks up, always in the same order.
    if (threadIdx.x == 0) is_last = atomicAdd(a.counters + 1 + pair, 1) == gridDim.x - 1;
    __syncthreads();
    if (is_last && d < D) {
        __threadfence();
        float total = 0.f;
        for (int i = 0; i < a.chunks; i++)
            total += __ldcg(a.partial + (static_cast<i64>(pair) * a.chunks + i) * D + d);
        a.k_mean[pair * D + d] = total / a.kv_len;
    }
}

template <int D, class T, int POOL>
__device__ __forceinline__ void quantize_q(const Args &a, int index, float (*scratch)[D]) {
    const int pair = index / a.q_blocks, block = index % a.q_blocks;
    const int batch = pair / a.heads, head = pair % a.heads;
    const int warp = threadIdx.x / 32, first = block * BLOCK_Q + warp * SUB;
    Part<D> part;
    part.template load<T>(
        static_cast<const u16 *>(a.q) + batch * a.qs.batch + head * a.qs.head, a.qs.token, first,
        a.qo_len);
    i8 *image = a.q8 + static_cast<i64>(index) * (BLOCK_Q * D);
    const float sign = a.scale_log2 < 0.f ? -1.f : 1.f;
    constexpr int ROWS = Part<D>::ROWS, LANES = Part<D>::LANES;
    u32 tops[ROWS / 2];
    part.row_tops(tops);
    // Lanes that share rows divide them.
    const int lane = threadIdx.x % 32, mine = lane % ROWS;
    u32 top = tops[0];
#pragma unroll
    for (int i = 1; i < ROWS / 2; i++) top = mine / 2 == i ? tops[i] : top;
    const float most = mine % 2 ? Half2<T>::hi(top) : Half2<T>::lo(top);
    // Never zero: a cut score is −∞ times this. Rows of smaller ones count as zero.
    const float scale = most / 127.f * fabsf(a.scale_log2);
    const bool is_zero = is_tiny(most) || scale < 1e-20f;
    const float by = is_zero ? 0.f : sign * 127.f / most;
    const i64 at = static_cast<i64>(index) * BLOCK_Q + warp * SUB + part.row;
    if (lane % LANES < ROWS) a.q_scale[at + mine] = scale < 1e-20f ? 1e-20f : scale;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        part.store_int8(image, warp * SUB, i, __shfl_sync(FULL, by, lane / LANES * LANES + i));
    if (a.q_shift) {
        const int kv_pair = batch * a.kv_heads + head / (a.heads / a.kv_heads);
        float shift[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) shift[i] = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float mean = a.k_mean[kv_pair * D + part.channel + j];
#pragma unroll
            for (int i = 0; i < ROWS; i++) shift[i] = fmaf(part.x[i][j], mean, shift[i]);
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int step = 1; step < LANES; step *= 2)
                shift[i] += __shfl_xor_sync(FULL, shift[i], step);
            if (part.channel == 0) a.q_shift[at + i] = shift[i] * a.scale_log2;
        }
    }
    const float norm = sqrtf(part.largest_square()) * fabsf(a.scale_log2);
    if (threadIdx.x % 32 == 0) atomicMax(a.q_norm + index, as_bits(norm));
    if (POOL) {
        float sum[8];
        part.column_sums(sum);
        pool<D, POOL>(a.q_pool, index, min(BLOCK_Q, a.qo_len - block * BLOCK_Q), warp, 8, sum,
                      part.channel, nullptr, a.scale_log2, scratch);
    }
}

template <int D, class T, int POOL>
__device__ __forceinline__ void quantize_kv(const Args &a, int index, float (*scratch)[D],
                                            uint4 *image, u32 *tops, u32 *bad_rows) {
    const int pair = index / a.kv_blocks, block = index % a.kv_blocks;
    const int batch = pair / a.kv_heads, head = pair % a.kv_heads;
    const int warp = threadIdx.x / 32 % 4, first = block * BLOCK_KV + warp * SUB;
    const bool is_key = threadIdx.x < THREADS / 2;
    const Strides &s = is_key ? a.ks : a.vs;
    Part<D> part;
    part.template load<T>(static_cast<const u16 *>(is_key ? a.k : a.v) + batch * s.batch +
                              head * s.head, s.token, first, a.kv_len);
    const float *mean = a.k_mean + pair * D;
    float sum[8];
    // Keys whose K or V is not finite: they count as zero here, and the attention kernel is told.
    u32 bad = 0;
    if (is_key) {
        if (POOL) part.column_sums(sum);
        float most = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float centre = mean[part.channel + j];
#pragma unroll
            for (int i = 0; i < Part<D>::ROWS; i++) part.x[i][j] -= centre;
        }
        if (first + SUB > a.kv_len)
#pragma unroll
            for (int i = 0; i < Part<D>::ROWS; i++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (first + part.row + i >= a.kv_len) part.x[i][j] = 0.f;
#pragma unroll
        for (int i = 0; i < Part<D>::ROWS; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(part.x[i][j]));
        u32 top = __reduce_max_sync(FULL, as_bits(most));
        float square = part.largest_square();
        if (!is_finite(square)) {
            top = 0;
#pragma unroll
            for (int i = 0; i < Part<D>::ROWS; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    if (!is_finite(part.x[i][j])) {
                        part.x[i][j] = 0.f;
                        bad |= 1u << (part.row + i);
                    }
                    top = umax(top, magnitude(part.x[i][j]));
                }
            top = __reduce_max_sync(FULL, top);
            square = part.largest_square();
        }
        const float norm = sqrtf(square);
        if (threadIdx.x % 32 == 0) {
            tops[warp] = top;
            atomicMax(a.k_norm + pair, as_bits(norm));
        }
    } else {
        // e4m3, keys in the order in which the attention kernel's registers hold P: of 16 keys,
        // word t of a chunk has keys 2t, 2t + 1, 2t + 8, 2t + 9. Lanes 16 apart hold the two halves.
        // Part of a channel's rounding error is taken off its next keys (of this thread's): attention
        // weights neighbours alike, so the errors cancel in the sum. A fifth less error of O.
        constexpr int ROWS = Part<D>::ROWS, WORDS = ROWS / 4;
        u32 top = part.tops[0];
#pragma unroll
        for (int i = 1; i < ROWS; i++) top = __vmaxu2(top, part.tops[i]);
        if (umax(top >> 16, top & 0xffff) >= ENDLESS<T>)
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (!is_finite(part.x[i][j])) {
                        part.x[i][j] = 0.f;
                        bad |= 1u << (part.row + i);
                    }
        // Each lane divides for D / 32 channels and gets its own eight from those that did.
        constexpr int OWN = D / 32;
        const int lane = threadIdx.x % 32;
        float own[OWN], by[8], carry[8];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const float most = as_float(a.v_amax[pair * D + lane * OWN + i]);
            own[i] = is_tiny(most) ? 0.f : 448.f / most;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            by[j] = __shfl_sync(FULL, own[j % OWN], part.channel / OWN + j / OWN);
            carry[j] = 0.f;
        }
        u32 packed[8][WORDS];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            u32 code[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                float y[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    y[j] = fmaf(part.x[i][2 * p + j], by[2 * p + j], carry[2 * p + j]);
                }
                code[i] = e4m3x2(y[0], y[1]);
                const u32 back = f16x2_of_e4m3x2(code[i]);
                const float rest[2] = {y[0] - Half2<F16>::lo(back), y[1] - Half2<F16>::hi(back)};
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float &c = carry[2 * p + j];
                    c = fmaf(0.3f, rest[j], 0.5f * c);
                }
            }
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                const u32 first = __byte_perm(code[4 * w], code[4 * w + 1], 0x5140);
                const u32 second = __byte_perm(code[4 * w + 2], code[4 * w + 3], 0x5140);
                packed[2 * p][w] = __byte_perm(first, second, 0x5410);
                packed[2 * p + 1][w] = __byte_perm(first, second, 0x7632);
            }
        }
        const bool low = threadIdx.x % 32 < 16;
        const int word = D == 128 ? 0 : threadIdx.x % 32 / 8 % 2 * 2;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int channel = part.channel + (low ? j : j + 4);
            u32 out[2 * WORDS];
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
                const u32 mine = low ? packed[j][w] : packed[j + 4][w];
                const u32 theirs = __shfl_xor_sync(FULL, low ? packed[j + 4][w] : packed[j][w], 16);
                const u32 l = low ? mine : theirs, h = low ? theirs : mine;
                out[2 * w] = __byte_perm(l, h, 0x5410);
                out[2 * w + 1] = __byte_perm(l, h, 0x7632);
            }
            // The image's 16-byte slots, spread over the banks.
            const int slot = swizzled<64>(channel, warp) / 16;
            u32 *to = reinterpret_cast<u32 *>(image + (slot ^ (slot >> 5 & 7))) + word;
            if constexpr (D == 128) *reinterpret_cast<uint4 *>(to) = uint4{out[0], out[1], out[2], out[3]};
            else *reinterpret_cast<uint2 *>(to) = uint2{out[0], out[1]};
        }
    }
    bad = __reduce_or_sync(FULL, bad);
    if (threadIdx.x % 32 == 0) bad_rows[threadIdx.x / 32] = bad;
    __syncthreads();
    if (is_key) {
        const float most = as_float(umax(umax(tops[0], tops[1]), umax(tops[2], tops[3])));
        i8 *to = a.k8 + static_cast<i64>(index) * (BLOCK_KV * D);
#pragma unroll
        for (int i = 0; i < Part<D>::ROWS; i++)
            part.store_int8(to, warp * SUB, i, most / 127.f < 1e-15f ? 0.f : 127.f / most);
        if (threadIdx.x == 0) {
            const float scale = most / 127.f < 1e-15f ? 1e-15f : most / 127.f;
            u32 keys[2];
#pragma unroll
            for (int i = 0; i < 2; i++)
                keys[i] = bad_rows[2 * i] | bad_rows[2 * i + 4] |
                          (bad_rows[2 * i + 1] | bad_rows[2 * i + 5]) << SUB;
            uint4 *to = reinterpret_cast<uint4 *>(a.k_scale) + static_cast<i64>(index) * 2;
            // Where every row sees the block, its scale says it.
            to[0] = uint4{keys[0] | keys[1] ? 0x7fc00000u : as_bits(scale), 0, 0, 0};
            to[1] = uint4{as_bits(scale), keys[0], keys[1], 0};
        }
    } else {
        uint4 *to = reinterpret_cast<uint4 *>(a.v8 + static_cast<i64>(index) * (D * BLOCK_KV));
        for (int slot = threadIdx.x - THREADS / 2; slot < D * BLOCK_KV / 16; slot += THREADS / 2)
            to[slot] = image[slot ^ (slot >> 5 & 7)];
    }
    if (POOL == 1 && is_key || POOL == 2)
        pool<D, POOL>(a.k_pool, index, min(BLOCK_KV, a.kv_len - block * BLOCK_KV),
                      threadIdx.x / 32, 4, sum, part.channel, mean, 1.f, scratch);
}

/// Grid: all query blocks, then all key blocks. POOL: 0 none, 1 every 16 rows, 2 whole blocks.
template <int D, class T, int POOL>
__global__ void __launch_bounds__(THREADS, D == 64 ? 3 : 2) quantize(const __grid_constant__ Args a) {
    __shared__ float scratch[8][D];
    __shared__ uint4 image[D * BLOCK_KV / 16];
    __shared__ u32 tops[4], bad_rows[THREADS / 32];
    wait_for_predecessor();
    const int q_blocks = a.batch * a.heads * a.q_blocks;
    if (blockIdx.x < q_blocks) quantize_q<D, T, POOL>(a, blockIdx.x, scratch);
    else quantize_kv<D, T, POOL>(a, blockIdx.x - q_blocks, scratch, image, tops, bad_rows);
}

}  // namespace sparge
