// What sampled queries say of the key blocks, for both paths' selections.
#pragma once
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"

namespace sparge {

/// From the log-sum-exps of a query block's `count` samples in each of `n` key blocks, rows of `pitch`
/// numbers: their shares of the key blocks, summed, to `out` (which may be the first row). NaN where one
/// of them has no finite softmax; a sample that sees nothing adds nothing. A warp.
__device__ __forceinline__ void sum_shares(float *out, const float *lse, int count, int pitch, int n) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < count; i++) {
        const float *in = lse + static_cast<i64>(i) * pitch;
        float top = -1.f / 0.f, sum = 0.f;
#pragma unroll 4
        for (int j = lane; j < n; j += 32) top = fmaxf(top, in[j]);
        top = warp_max(top);
        const float base = top == -1.f / 0.f ? 0.f : top;
#pragma unroll 4
        for (int j = lane; j < n; j += 32) sum += ex2(in[j] - base);
        sum = warp_sum(sum);
        const float by = sum == 0.f ? 0.f : __fdiv_rn(1.f, sum);
        // A lane reads and writes its own numbers alone.
#pragma unroll 4
        for (int j = lane; j < n; j += 32) {
            const float share = ex2(in[j] - base) * by;
            out[j] = i == 0 ? share : out[j] + share;
        }
    }
}

}  // namespace sparge
