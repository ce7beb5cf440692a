// Products of a few rows and many keys, both in slabs: 128 bytes of 64 rows in shared memory.
#pragma once
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/ptx/mma.cuh"
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "sparge/ptx/wgmma.cuh"
#endif

namespace sparge {

constexpr int SLAB_ROWS = 64;
constexpr int SLAB_THREADS = 128;  // each warp has 16 rows
constexpr int SLAB = SLAB_ROWS * 128;
static_assert(SLAB % 1024 == 0, "warpgroup products read slabs that start at a multiple of 1024");
constexpr int SLAB_STAGES = 3;     // slabs of keys in flight

/// The row and the 16-byte chunk of a slab that a thread copies first; its next rows are SLAB_STEP apart.
__device__ __forceinline__ int slab_row() { return threadIdx.x / 8; }
__device__ __forceinline__ int slab_chunk() { return threadIdx.x % 8; }
constexpr int SLAB_STEP = SLAB_THREADS / 8;

/// All threads start the copy of a slab, of which `rows` rows of `bytes` bytes exist; the rest becomes
/// zero. `from(i)`: where this thread's i-th chunk is, where it exists.
template <class From>
__device__ __forceinline__ void copy_slab(u32 to, int rows, int bytes, const From &from) {
    const bool is_inside = 16 * slab_chunk() < bytes;
#pragma unroll
    for (int i = 0; i < SLAB_ROWS / SLAB_STEP; i++) {
        const int r = slab_row() + SLAB_STEP * i;
        copy16(to + Placed<128>::at(r, slab_chunk()), from(i), is_inside && r < rows);
    }
}

/// Rows of keys on their way through a ring of slabs, 64 rows at a time, each row in `slabs` slabs. All
/// threads call what it has.
struct Ring {
    u32 ring;          // in shared memory
    const u8 *from;    // the thread's chunk of row 0: `slab_row`, `slab_chunk`
    i64 pitch;         // bytes from one row to the next
    int width, rows;   // bytes of a row and rows that exist; zeros stand for what does not
    int slabs;
    int next, end;     // rows that are asked for next, a multiple of 64; where that ends
    int next_slab = 0, next_stage = 0, stage = 0;

    /// Asks for the first slabs.
    __device__ __forceinline__ void start() {
        for (int i = 0; i < SLAB_STAGES - 1; i++) fetch();
    }
    /// Waits for the next slab and asks for another, in the place of the one before.
    __device__ __forceinline__ u32 take() {
        copy_wait<SLAB_STAGES - 2>();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        shared_fence();
#endif
        __syncthreads();  // the slab is there, and all are done with the one before
        fetch();
        const u32 slab = ring + stage * SLAB;
        if (++stage == SLAB_STAGES) stage = 0;
        return slab;
    }
    __device__ __forceinline__ void fetch() {
        if (next < end) {
            const u8 *slab = from + next * pitch + 128 * next_slab;
            copy_slab(ring + next_stage * SLAB, rows - next, width - 128 * next_slab,
                      [&](int i) { return slab + i * (SLAB_STEP * pitch); });
            if (++next_slab == slabs) next_slab = 0, next += SLAB_ROWS;
            if (++next_stage == SLAB_STAGES) next_stage = 0;
        }
        copy_commit();
    }
};

/// c += a·bᵀ over the 32 bytes of a row that the fragments hold; f32 in three tf32 products of both
/// parts of each factor.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma_half<T>(c, a, b0, b1);
}
template <>
__device__ __forceinline__ void multiply<F32>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32 top[4], rest[4];
    const auto split = [](u32 x, u32 &hi, u32 &lo) {
        hi = x & 0xffffe000u;
        lo = as_bits(as_float(x) - as_float(hi));
    };
#pragma unroll
    for (int i = 0; i < 4; i++) split(a[i], top[i], rest[i]);
    u32 top0, rest0, top1, rest1;
    split(b0, top0, rest0);
    split(b1, top1, rest1);
    mma_tf32(c, rest, top0, top1);
    mma_tf32(c, top, rest0, rest1);
    mma_tf32(c, top, top0, top1);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/// `multiply_slabs` of two-byte elements where there are warpgroup products: the thread block is one.
template <class T, int PARTS, int HALVES>
__device__ __forceinline__ void multiply_slabs_wgmma(float (&c)[HALVES][8][4], const u32 (&rows)[PARTS],
                                                     int apart, u32 keys) {
    const auto pin = [&] {
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int n = 0; n < 8; n++) pin_registers(c[h][n]);
    };
    pin();
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
                wgmma_half<T>(c[h], descriptor(rows[p] + h * apart) + 2 * step,
                              descriptor(keys) + 2 * step);
    wgmma_commit();
    wgmma_wait<0>();
    pin();
}
#endif

/// f32 has no registers for more.
template <class T> constexpr int STEPS_AT_ONCE = 4;
template <> constexpr int STEPS_AT_ONCE<F32> = 1;

/// A warp adds the products of its rows with 64 keys over one slab's 128 bytes: c[h][n][2r + i] is row
/// lane / 4 + 8r of the warp's 16 of the h-th slab of rows, key 8n + 2 · (lane % 4) + i. Each of PARTS
/// slabs in `rows` is the first of HALVES that are `apart` bytes apart.
template <class T, int PARTS, int HALVES>
__device__ __forceinline__ void multiply_slabs(float (&c)[HALVES][8][4], const u32 (&rows)[PARTS], int apart,
                                               u32 keys) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (IsHalf<T>::value) {
        multiply_slabs_wgmma<T>(c, rows, apart, keys);
        return;
    }
#endif
    const int lane = threadIdx.x % 32;
    // Of matrices 0 to 3: rows + 0, + 8, + 0, + 8 of 32 bytes' first, first, second, second half.
    const u32 a_at = Placed<128>::at(threadIdx.x / 32 * 16 + lane % 16, lane / 16);
    // Rows + 0, + 0, + 8, + 8; halves in turns.
    const u32 b_at = Placed<128>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    // Slabs and eights of rows come on top of a step's place: they leave its low bits alone, and an instruction
    // has room for a constant.
#pragma unroll STEPS_AT_ONCE<T>
    for (int step = 0; step < 4; step++) {
        u32 x[HALVES][PARTS][4];
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int p = 0; p < PARTS; p++)
                load_matrices(x[h][p], Placed<128>::step(rows[p] + a_at, step) + h * apart);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            u32 y[4];
            load_matrices(y, Placed<128>::step(keys + b_at, step) + 16 * 128 * n);
#pragma unroll
            for (int p = 0; p < PARTS; p++)
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    multiply<T>(c[h][2 * n], x[h][p], y[0], y[1]);
                    multiply<T>(c[h][2 * n + 1], x[h][p], y[2], y[3]);
                }
        }
    }
}

}  // namespace sparge
