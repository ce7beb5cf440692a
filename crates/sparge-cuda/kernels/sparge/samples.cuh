// What sampled queries say of the key blocks, for both paths' selections.
#pragma once
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"

namespace sparge {

/// Copies `n` numbers, of which a lane takes every 32nd; several loads are in flight. A warp.
__device__ __forceinline__ void load_row(float *to, const float *from, int n) {
    constexpr int AT_ONCE = 8;
    for (int j0 = threadIdx.x % 32; j0 < n; j0 += 32 * AT_ONCE) {
        float x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) x[i] = j0 + 32 * i < n ? from[j0 + 32 * i] : 0.f;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (j0 + 32 * i < n) to[j0 + 32 * i] = x[i];
    }
}

/// From the log-sum-exps of a sample in each of `n` key blocks: its shares of them to `out`, added to what is
/// there unless it is the `first`. NaN where it has no finite softmax; a sample that sees nothing adds
/// nothing. A lane reads and writes every 32nd number and no other, so `out` may be `in`. A warp.
__device__ __forceinline__ void add_share(float *out, const float *in, int n, bool first) {
    const int lane = threadIdx.x % 32;
    float top = -1.f / 0.f, sum = 0.f;
#pragma unroll 4
    for (int j = lane; j < n; j += 32) top = fmaxf(top, in[j]);
    top = warp_max(top);
    const float base = top == -1.f / 0.f ? 0.f : top;
#pragma unroll 4
    for (int j = lane; j < n; j += 32) sum += ex2(in[j] - base);
    sum = warp_sum(sum);
    const float by = sum == 0.f ? 0.f : __fdiv_rn(1.f, sum);
#pragma unroll 4
    for (int j = lane; j < n; j += 32) {
        const float share = ex2(in[j] - base) * by;
        out[j] = first ? share : out[j] + share;
    }
}

}  // namespace sparge
