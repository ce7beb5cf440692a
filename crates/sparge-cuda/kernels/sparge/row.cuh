// A row of the fast path's block mask.
#pragma once
#include "sparge/types.cuh"

namespace sparge {

// What sums of exponentials are relative to lies between these, so that differences of two are never NaN. A
// score above the highest leaves its row no finite sum.
constexpr float LOWEST = -3e38f, HIGHEST = 3e38f;

/// A query block's view of the key blocks.
struct Row {
    int first, last;    // query rows: first, last
    int reachable;      // key blocks before this one
    int scored;         // ... before this one, those whose keys some row sees entirely
    int diagonal, past; // key blocks on the diagonal and `keep_local` before it: from, to
    __device__ __forceinline__ Row(const Args &a, int q_block) {
        first = q_block * BLOCK_Q;
        last = min(a.qo_len, first + BLOCK_Q) - 1;
        const int end = visible_end(a, last);
        reachable = ceil_div(end, BLOCK_KV);
        scored = end == a.kv_len ? reachable : end / BLOCK_KV;
        const i64 from = max(0, min(a.kv_len, first + a.diagonal));
        const i64 local = from - static_cast<i64>(a.keep_local) * BLOCK_KV;
        diagonal = local > 0 ? static_cast<int>(local / BLOCK_KV) : 0;
        past = a.causal && local < end ? reachable : 0;
    }
    __device__ __forceinline__ bool forced(const Args &a, int j) const {
        return j < a.keep_first || j >= scored || (j >= diagonal && j < past);
    }
};

}  // namespace sparge
