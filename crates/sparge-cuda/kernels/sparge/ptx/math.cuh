// Conversions and single instructions.
#pragma once
#include "sparge/types.cuh"

namespace sparge {

constexpr u32 FULL = 0xffffffffu;

/// Waits for the kernel before in the stream: kernels that are launched before it has ended
/// (`enqueue_early`, sm_90 and later) do so before they exit, read or write device memory. None lets its successor start while it runs
/// (`launch_dependents`): waiting thread blocks take shared memory from the cache of those that work.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float as_float(u32 x) { return __uint_as_float(x); }
__device__ __forceinline__ u32 as_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ bool is_finite(float x) {
    return (as_bits(x) & 0x7f800000u) != 0x7f800000u;
}

template <class X> __device__ __forceinline__ X warp_sum(X x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, step));
    return x;
}

/// Whether 448 / x leaves f32's range: a tensor that small counts as zero.
__device__ __forceinline__ bool is_tiny(float x) { return x < 1.4e-36f; }

/// Two e4m3 values, saturated: `lo` in the low byte.
__device__ __forceinline__ u32 e4m3x2(float lo, float hi) {
    u16 y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(hi), "f"(lo));
    return y;
}
__device__ __forceinline__ u32 e4m3x4(float a, float b, float c, float d) {
    return e4m3x2(a, b) | e4m3x2(c, d) << 16;
}

/// Two e4m3 values as f16, exactly.
__device__ __forceinline__ u32 f16x2_of_e4m3x2(u32 x) {
    u32 y;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(static_cast<u16>(x)));
    return y;
}

template <class T> struct Half2;
template <> struct Half2<Bf16> {
    static __device__ __forceinline__ u32 pack(float lo, float hi) {
        u32 y;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
        return y;
    }
    static __device__ __forceinline__ float lo(u32 x) { return as_float(x << 16); }
    static __device__ __forceinline__ float hi(u32 x) { return as_float(x & 0xffff0000u); }
};
template <> struct Half2<F16> {
    static __device__ __forceinline__ u32 pack(float lo, float hi) {
        u32 y;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
        return y;
    }
    static __device__ __forceinline__ float lo(u32 x) {
        float y;
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(x));
        return y;
    }
    static __device__ __forceinline__ float hi(u32 x) {
        float y;
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(x));
        return y;
    }
};

template <class T>
__device__ __forceinline__ void unpack8(const uint4 &x, float *y) {
    const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        y[2 * i] = Half2<T>::lo(w[i]);
        y[2 * i + 1] = Half2<T>::hi(w[i]);
    }
}

__device__ __forceinline__ uint4 load16(const void *p) {
    uint4 x;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p));
    return x;
}

}  // namespace sparge
