// A warp's part of a block in registers: its load, sums, maxima and stores, and pooled rows.
#pragma once
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"

namespace sparge {

constexpr int SUB = 16;  // rows of a warp

__device__ __forceinline__ u32 magnitude(float x) { return as_bits(x) & 0x7fffffffu; }
__device__ __forceinline__ u32 umax(u32 a, u32 b) { return a > b ? a : b; }

/// Bits of the least 16-bit magnitude that is not finite.
template <class T> constexpr u32 ENDLESS = 0;
template <> constexpr u32 ENDLESS<Bf16> = 0x7f80;
template <> constexpr u32 ENDLESS<F16> = 0x7c00;

/// From the top: the low half of `above`, a byte of `hi`, a byte of `lo`.
__device__ __forceinline__ u32 pack_s8(i32 hi, i32 lo, u32 above) {
    u32 y;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(hi), "r"(lo), "r"(above));
    return y;
}

/// A warp's 16 rows: each lane holds ROWS rows of 8 neighbouring channels.
template <int D> struct Part {
    static constexpr int LANES = D / 8, ROWS = SUB * LANES / 32;
    float x[ROWS][8];
    u32 tops[ROWS];    // largest magnitude of a row's even and odd channels here, as bits of T
    int channel, row;  // row: of the warp's 16

    /// Loads rows `first..first + 16` of which those below `end` exist; the others are zero.
    template <class T>
    __device__ __forceinline__ void load(const u16 *from, i64 stride, int first, int end) {
        const int lane = threadIdx.x % 32;
        channel = lane % LANES * 8;
        row = lane / LANES * ROWS;
        uint4 raw[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            raw[i] = uint4{0, 0, 0, 0};
            const int token = first + row + i;
            if (token < end) raw[i] = load16(from + token * stride + channel);
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            unpack8<T>(raw[i], x[i]);
            const u32 m = 0x7fff7fff;
            tops[i] = __vmaxu2(__vmaxu2(raw[i].x & m, raw[i].y & m),
                               __vmaxu2(raw[i].z & m, raw[i].w & m));
        }
    }
    /// The largest magnitude of a row in its lower or, for odd rows, upper half: of rows 2i and 2i + 1.
    __device__ __forceinline__ void row_tops(u32 (&most)[ROWS / 2]) const {
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) {
            const u32 even = __vmaxu2(tops[2 * i], tops[2 * i] >> 16);
            const u32 odd = __vmaxu2(tops[2 * i + 1], tops[2 * i + 1] >> 16);
            most[i] = __byte_perm(even, odd, 0x5410);
#pragma unroll
            for (int step = 1; step < LANES; step *= 2)
                most[i] = __vmaxu2(most[i], __shfl_xor_sync(FULL, most[i], step));
        }
    }
    /// Sums of each channel over the warp's rows, in every lane.
    __device__ __forceinline__ void column_sums(float (&sum)[8]) const {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum[j] = 0.f;
#pragma unroll
            for (int i = 0; i < ROWS; i++) sum[j] += x[i][j];
#pragma unroll
            for (int step = LANES; step < 32; step *= 2)
                sum[j] += __shfl_xor_sync(FULL, sum[j], step);
        }
    }
    /// The largest sum of squares of a row of the warp's, in every lane; NaN or ∞ where one is.
    __device__ __forceinline__ float largest_square() const {
        float sum[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            sum[i] = 0.f;
#pragma unroll
            for (int j = 0; j < 8; j++) sum[i] = fmaf(x[i][j], x[i][j], sum[i]);
        }
        // Lanes that share rows divide them: half of the rows at every step.
        const int lane = threadIdx.x % 32;
        int step = 1;
#pragma unroll
        for (int n = ROWS / 2; n > 0; n /= 2, step *= 2)
#pragma unroll
            for (int i = 0; i < n; i++) {
                const bool upper = lane & step;
                const float theirs = upper ? sum[i] : sum[i + n];
                sum[i] = (upper ? sum[i + n] : sum[i]) + __shfl_xor_sync(FULL, theirs, step);
            }
#pragma unroll
        for (; step < LANES; step *= 2) sum[0] += __shfl_xor_sync(FULL, sum[0], step);
        return as_float(__reduce_max_sync(FULL, magnitude(sum[0])));
    }
    /// Writes row i as int8 into a tile image whose first row is the warp's.
    __device__ __forceinline__ void store_int8(i8 *image, int first, int i, float by) const {
        u32 word[2];
#pragma unroll
        for (int w = 0; w < 2; w++) {
            i32 b[4];
#pragma unroll
            for (int j = 0; j < 4; j++) b[j] = __float2int_rn(x[i][4 * w + j] * by);
            word[w] = pack_s8(b[1], b[0], pack_s8(b[3], b[2], 0));
        }
        i8 *to = image + swizzled<D>(first + row + i, channel / 16) + channel % 16;
        *reinterpret_cast<uint2 *>(to) = uint2{word[0], word[1]};
    }
};

/// Writes a pooled row as bf16 high and low parts: 16 bits of mantissa in all.
__device__ __forceinline__ void store_pooled(u16 *high, int dim, int channel, const float (&x)[8]) {
    u32 h[4], l[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        h[i] = Half2<Bf16>::pack(x[2 * i], x[2 * i + 1]);
        l[i] = Half2<Bf16>::pack(x[2 * i] - Half2<Bf16>::lo(h[i]),
                                 x[2 * i + 1] - Half2<Bf16>::hi(h[i]));
    }
    *reinterpret_cast<uint4 *>(high + channel) = uint4{h[0], h[1], h[2], h[3]};
    *reinterpret_cast<uint4 *>(high + dim + channel) = uint4{l[0], l[1], l[2], l[3]};
}

/// Pools a block whose 16-row sums are `sum` (one per warp) and writes it: per sub-block, or, where
/// POOL is 2, one mean for the block. `centre` is subtracted. All warps of the block take part.
template <int D, int POOL>
__device__ __forceinline__ void pool(u16 *to, int block, int rows, int warp, int warps,
                                     float (&sum)[8], int channel, const float *centre, float by,
                                     float (*scratch)[D]) {
    const int lane = threadIdx.x % 32;
    if (POOL == 1) {
        const int count = min(SUB, rows - warp * SUB);
        if (lane >= D / 8 || count <= 0) return;
#pragma unroll
        for (int j = 0; j < 8; j++)
            sum[j] = (sum[j] / count - (centre ? centre[channel + j] : 0.f)) * by;
        store_pooled(to + (static_cast<i64>(block) * warps + warp) * 2 * D, D, channel, sum);
    } else if (POOL == 2) {
        if (lane < D / 8)
#pragma unroll
            for (int j = 0; j < 8; j++) scratch[warp][channel + j] = sum[j];
        __syncthreads();
        if (warp != 0 || lane >= D / 8) return;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float total = 0.f;
            for (int w = 0; w < warps; w++) total += scratch[w][channel + j];
            sum[j] = (total / rows - (centre ? centre[channel + j] : 0.f)) * by;
        }
        store_pooled(to + static_cast<i64>(block) * 2 * D, D, channel, sum);
    }
}

}  // namespace sparge
