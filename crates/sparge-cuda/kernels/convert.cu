// The general path's other preparation: its tables, f32 tensors in bf16, int8 Q and K, e4m3 V.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/call.cuh"
#include "sparge/rows.cuh"

namespace sparge {

constexpr int THREADS = 256;

/// Words that travel in the arguments of a launch: no copy from host memory that a captured graph
/// would have to find again. The same struct as `launch::Upload`.
struct Upload {
    u32 *to;
    i32 count, unused;
    u32 words[1000];
};
static_assert(sizeof(Upload) == 4016, "Upload");

template <int> __global__ void upload(const __grid_constant__ Upload u) {
    for (int i = threadIdx.x; i < u.count; i += blockDim.x) u.to[i] = u.words[i];
}

/// q, k or v (WHICH) from f32 to bf16, contiguous [batch, heads, tokens, dim]. Grid: tokens.
template <int WHICH> __global__ void __launch_bounds__(128, 1) cast(const __grid_constant__ Call a) {
    const int heads = WHICH == 0 ? a.heads : a.kv_heads, dim = WHICH == 2 ? a.dim_v : a.dim;
    const int len = WHICH == 0 ? a.q_len_tensor : a.kv_len_tensor;
    const Strides &s = WHICH == 0 ? a.qs : WHICH == 1 ? a.ks : a.vs;
    const void *x = WHICH == 0 ? a.q : WHICH == 1 ? a.k : a.v;
    const i64 row = blockIdx.x;
    const i64 from = row / len / heads * s.batch + row / len % heads * s.head + row % len * s.token;
    for (int c = 2 * threadIdx.x; c < dim; c += 2 * blockDim.x) {
        const float2 y = Reader<F32>::two(x, from + c);
        *reinterpret_cast<u32 *>(a.cast + row * dim + c) = Half2<Bf16>::pack(y.x, y.y);
    }
}

/// int8 rows of a block, a warp per row: q by its largest element, k less the mean likewise.
template <class T, bool IS_Q>
__device__ __forceinline__ void quantize_block(const Call &a, int at) {
    constexpr int SIZE = IS_Q ? BLOCK_Q : BLOCK_KV;
    const Block b = Block::of<IS_Q>(a, at, IS_Q ? a.qs : a.ks);
    const void *x = IS_Q ? a.q : a.k;
    const int lane = threadIdx.x % 32;
    const int kv_head = IS_Q ? b.head / (a.heads / a.kv_heads) : b.head;
    const float *mean = a.k_mean + (static_cast<i64>(kv_head) * a.n_sequences + b.sequence) * a.dim;
    for (int r = threadIdx.x / 32; r < SIZE; r += THREADS / 32) {
        float2 y[4];
        u32 top = 0;
        float shift = 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = 64 * i + 2 * lane;
            y[i] = float2{0.f, 0.f};
            if (r >= b.rows || c >= a.dim) continue;
            y[i] = Reader<T>::two(x, b.start + r * b.stride + c);
            const float m0 = mean[c], m1 = mean[c + 1];
            if (IS_Q) shift += y[i].x * m0 + y[i].y * m1;
            else y[i] = float2{__fadd_rn(y[i].x, -m0), __fadd_rn(y[i].y, -m1)};
            const u32 x0 = as_bits(y[i].x) & 0x7fffffffu, x1 = as_bits(y[i].y) & 0x7fffffffu;
            top = top > x0 ? top : x0;
            top = top > x1 ? top : x1;
        }
        top = __reduce_max_sync(FULL, top);
        if (IS_Q) shift = warp_sum(shift);
        const float most = as_float(top), inverse = is_tiny(most) ? 0.f : __fdiv_rn(127.f, most);
        i8 *to = (IS_Q ? a.q8 : a.k8) + (static_cast<i64>(at) * SIZE + r) * a.padded;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = 64 * i + 2 * lane;
            if (c >= a.padded) continue;
            const int v0 = __float2int_rn(__fmul_rn(y[i].x, inverse));
            const int v1 = __float2int_rn(__fmul_rn(y[i].y, inverse));
            *reinterpret_cast<u16 *>(to + c) = static_cast<u16>((v0 & 0xff) | (v1 & 0xff) << 8);
        }
        if (lane == 0) {
            const i64 to_scale = static_cast<i64>(at) * SIZE + r;
            const float scale = __fdiv_rn(most, 127.f);
            if (IS_Q) {
                a.q_scale[to_scale] = scale * a.scale_log2;
                a.q_shift[to_scale] = shift * a.scale_log2;
            } else {
                a.k_scale[to_scale] = scale;
            }
        }
    }
}

/// Grid: all query blocks of all heads, then all key blocks.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) quantize_rows(const __grid_constant__ Call a) {
    const int q = a.heads * a.all_q_blocks;
    if (blockIdx.x < q) quantize_block<T, true>(a, blockIdx.x);
    else quantize_block<T, false>(a, blockIdx.x - q);
}

/// The largest |v| of each channel; what is not finite does not enter. Grid: all key blocks.
template <class T>
__global__ void __launch_bounds__(128, 1) largest_v(const __grid_constant__ Call a) {
    const Block b = Block::of<false>(a, blockIdx.x, a.vs);
    const int c = 2 * threadIdx.x;
    if (c >= a.dim_v) return;
    float top[2] = {};
    for (int r = 0; r < b.rows; r++) {
        const float2 y = Reader<T>::two(a.v, b.start + r * b.stride + c);
        if (is_finite(y.x)) top[0] = fmaxf(top[0], fabsf(y.x));
        if (is_finite(y.y)) top[1] = fmaxf(top[1], fabsf(y.y));
    }
    u32 *to = a.v_amax + (static_cast<i64>(b.head) * a.n_sequences + b.sequence) * a.padded + c;
    atomicMax(to, as_bits(top[0]));
    atomicMax(to + 1, as_bits(top[1]));
}

/// e4m3 V, a channel's 64 keys together, in the order in which the attention kernel's registers
/// hold P: of 16 keys, word t has keys 2t, 2t + 1, 2t + 8, 2t + 9. Grid: all key blocks.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) quantize_v(const __grid_constant__ Call a) {
    const Block b = Block::of<false>(a, blockIdx.x, a.vs);
    const u32 *amax = a.v_amax + (static_cast<i64>(b.head) * a.n_sequences + b.sequence) * a.padded;
    for (int i = threadIdx.x; i < 4 * (a.padded / 2); i += THREADS) {
        const int c = i % (a.padded / 2) * 2, group = i / (a.padded / 2);
        float by[2] = {};
        if (c < a.dim_v)
            for (int e = 0; e < 2; e++) by[e] = is_tiny(as_float(amax[c + e])) ? 0.f : 448.f / as_float(amax[c + e]);
        u32 words[2][4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            float y[2][4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int r = 16 * group + 2 * t + e % 2 + e / 2 * 8;
                float2 z{0.f, 0.f};
                if (r < b.rows && c < a.dim_v) z = Reader<T>::two(a.v, b.start + r * b.stride + c);
                y[0][e] = is_finite(z.x) ? z.x * by[0] : as_float(0x7fc00000u);
                y[1][e] = is_finite(z.y) ? z.y * by[1] : as_float(0x7fc00000u);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) words[e][t] = e4m3x4(y[e][0], y[e][1], y[e][2], y[e][3]);
        }
#pragma unroll
        for (int e = 0; e < 2; e++)
            *reinterpret_cast<uint4 *>(a.v8 + (static_cast<i64>(blockIdx.x) * a.padded + c + e) * BLOCK_KV +
                                       16 * group) =
                uint4{words[e][0], words[e][1], words[e][2], words[e][3]};
    }
}

}  // namespace sparge
