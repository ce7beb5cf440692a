// Warp-level matrix instructions, matrix loads and asynchronous copies (sm_80 and later).
#pragma once
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"

namespace sparge {

__device__ __forceinline__ u32 smem(const void *p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}
/// Copies 16 bytes to shared memory, or writes zeros there.
__device__ __forceinline__ void copy16(u32 to, const void *from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(exists ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
/// Four 8 × 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

template <class T> struct IsHalf { static constexpr bool value = true; };
template <> struct IsHalf<F32> { static constexpr bool value = false; };
template <class T> struct IsF16 { static constexpr bool value = false; };
template <> struct IsF16<F16> { static constexpr bool value = true; };
/// What Q·Kᵀ sums in.
template <bool INT8> struct QkSum { using Type = float; };
template <> struct QkSum<true> { using Type = i32; };

/// c += a·bᵀ, 16 × 8 × 16, f32 sums.
template <class T> __device__ __forceinline__ void mma_half(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
__device__ __forceinline__ void mma_half<F16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_half<Bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// c += a·bᵀ, 16 × 8 × 32, int8.
__device__ __forceinline__ void mma_s8(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// c += a·bᵀ, 16 × 8 × 32, e4m3 (sm_89 and later).
__device__ __forceinline__ void mma_e4m3(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// c += a·bᵀ, 16 × 8 × 8, tf32: the low 13 bits of a factor are not read.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Where the 16-byte chunk of a tile's row lies: rows of ROW bytes, placed so that eight rows'
/// equal chunks fall into different banks.
template <int ROW> struct Placed {
    static_assert(ROW % 32 == 0, "row bytes");
    static constexpr int PITCH = ROW % 128 == 0 ? ROW : ROW + 16;
    static constexpr bool IS_SWIZZLED = ROW % 128 == 0;
    static __device__ __forceinline__ int at(int row, int chunk) {
        return IS_SWIZZLED ? row * ROW + ((chunk ^ (row & 7)) << 4) : row * PITCH + (chunk << 4);
    }
    /// The address 32·`step` bytes further in the row than `address`, the place of chunk 0 or 1 in a
    /// tile that starts at a multiple of 128. One instruction from one register: addresses that a
    /// loop keeps cost registers.
    static __device__ __forceinline__ u32 step(u32 address, int step) {
        return IS_SWIZZLED ? (address + step / 4 * 128) ^ (step % 4 * 32) : address + 32 * step;
    }
};

/// All THREADS start the copy of a tile of N rows of D two-byte elements, of which `rows` rows of
/// `dim` elements exist, `stride` elements apart; the rest becomes zero.
template <int D, int N, int THREADS, class P>
__device__ __forceinline__ void copy_rows(u8 *to, const void *from, i64 stride, int rows, int dim) {
    const u16 *start = static_cast<const u16 *>(from);
    constexpr int CHUNKS = D / 8;
#pragma unroll 2
    for (int i = threadIdx.x; i < N * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS, c = i % CHUNKS;
        const bool exists = r < rows && 8 * c < dim;
        copy16(smem(to + P::at(r, c)), exists ? start + r * stride + 8 * c : start, exists);
    }
}
/// The same for N rows of ROW bytes that lie one after another and all exist.
template <int N, int ROW, int THREADS, class P>
__device__ __forceinline__ void copy_image(u8 *to, const void *from) {
    const u8 *start = static_cast<const u8 *>(from);
#pragma unroll 2
    for (int i = threadIdx.x; i < N * ROW / 16; i += THREADS)
        copy16(smem(to + P::at(i / (ROW / 16), i % (ROW / 16))), start + 16 * i, true);
}

}  // namespace sparge
