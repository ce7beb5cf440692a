// Own typedefs: NVRTC brings no headers. Included first by every kernel.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

namespace sparge {

constexpr int BLOCK_Q = 128;
constexpr int BLOCK_KV = 64;
constexpr int MAX_HEADS = 128;

/// Element types of q, k, v and o.
struct F16 {};
struct Bf16 {};
struct F32 {};

/// Distances between neighbours, in elements.
struct Strides {
    i64 batch, head, token;
};

/// What a head selects: blocks until the mass reaches `cdf`, at least the `top_k` share.
struct Budget {
    float cdf, top_k;
};

/// Arguments of every kernel. The same struct as `launch::Args` on the Rust side, which checks
/// size and offsets.
struct Args {
    const void *q, *k, *v;
    void *o;
    float *lse;           // may be null
    Strides qs, ks, vs, os;
    i8 *q8;               // [batch, heads, q_blocks] images of 128 x d, swizzled
    float *q_scale;       // [batch, heads, q_blocks * 128], softmax scale and log2(e) included
    float *q_shift;       // the same shape: what the mean of K adds to each row's scores, log2;
                          // null for `quantize`: not wanted
    i8 *k8;               // [batch, kv_heads, kv_blocks] images of 64 x d, swizzled
    float *k_scale;       // [batch, kv_heads, kv_blocks, 2, 4], of four: the scale, then 64 bits of
                          // keys whose K or V is not finite (such elements count as 0), nothing.
                          // First for tiles that every row sees, where the scale is NaN if there is
                          // such a key, then for tiles that are cut.
    u8 *v8;               // [batch, kv_heads, kv_blocks] images of d x 64, keys permuted, swizzled
    float *partial;       // [batch, kv_heads, chunks, d] sums of K
    float *k_mean;        // [batch, kv_heads, d]
    u32 *v_amax;          // [batch, kv_heads, d] bits of the largest |v|
    u32 *k_norm;          // [batch, kv_heads] bits of the largest norm of a key less the mean
    u32 *q_norm;          // [batch, heads, q_blocks] the same of a query, scaled as q_scale
    u16 *q_pool;          // [batch, heads, q_subs, 2, d] bf16: high part, low part
    u16 *k_pool;          // [batch, kv_heads, kv_subs, 2, d]
    u32 *mask;            // [batch, heads, q_blocks, mask_words]; null: every reachable block
    u32 *counters;        // [1 + batch * kv_heads], zero before the first kernel
    float *samples;       // [heads of a pass, batch, q_blocks, sampled_rows, kv_blocks]: log-sum-exp of
                          // sampled queries' scores; null: none are sampled
    float *scores;        // [heads of a pass, batch, q_subs, kv_blocks]: the same of pooled queries
    float2 *sums;         // [heads of a pass, batch, q_subs, chunks of `score`]: a number x and the sum of
                          // 2^(score - x) over a chunk's scored key blocks
    i32 batch, heads, kv_heads;
    i32 qo_len, kv_len;
    i32 q_blocks, kv_blocks, mask_words;
    i32 chunk, chunks;    // keys per partial sum, and how many
    i32 causal;           // 0 or 1
    i32 diagonal;         // key on the diagonal of row 0 (causal)
    i32 keep_first, keep_local;
    float scale_log2;     // softmax scale times log2(e)
    i32 sampled_rows;     // of a query block
    i32 first_head;       // of those that are selected for together
    i32 score_chunk;      // key blocks of a thread block of `score`, of whole tiles of 64 pooled keys
    Budget budget[MAX_HEADS];
};
// src/launch/mod.rs asserts the same size; it orders its fields the same way.
static_assert(sizeof(Args) == 1376, "Args");

__device__ __forceinline__ int min(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int max(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// One past the last key that row `i` sees.
__device__ __forceinline__ int visible_end(const Args &a, int i) {
    if (!a.causal) return a.kv_len;
    return max(0, min(a.kv_len, i + a.diagonal + 1));
}

/// Key blocks that the rows before `row_end` of a query block reach.
__device__ __forceinline__ int reachable_blocks(const Args &a, int row_end) {
    return ceil_div(visible_end(a, row_end - 1), BLOCK_KV);
}

// A 16-byte chunk's place in the image of a tile whose rows are ROW bytes (64 or 128), as the
// matrix descriptors' 64- and 128-byte swizzles read it.
template <int ROW>
__device__ __forceinline__ int swizzled(int row, int chunk) {
    static_assert(ROW == 64 || ROW == 128, "row bytes");
    return ROW == 128 ? row * 128 + ((chunk ^ (row & 7)) << 4)
                      : row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
}

}  // namespace sparge
