// Arguments of the general path's kernels, and which keys a row may see.
#pragma once
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"

namespace sparge {

/// An attention problem of its own: a batch entry or a packed sequence.
struct Sequence {
    i32 batch;
    i32 q_start, q_len;      // query tokens in the tensor
    i32 kv_start, kv_len;
    i32 diagonal;            // key on the diagonal of row 0
    i32 q_block0, kv_block0; // blocks of the sequences before it
    i32 is_short;            // heads that select automatically run dense here
    i32 unused;
    i64 sample0;             // numbers of `samples` that a head has before it
};
static_assert(sizeof(Sequence) == 48, "Sequence");

/// What a query head skips.
struct Head {
    double cdf, top_k;
    float theta, lambda;     // lambda in log2 units
    i32 keeps_all, is_auto;
};
static_assert(sizeof(Head) == 32, "Head");

/// Element types of a mask or of the output.
enum Kind : i32 { NO_MASK, BOOL_MASK, IN_F32, IN_F16, IN_BF16 };

/// Arguments of every general kernel. The same struct as `launch::Call` on the Rust side.
struct Call {
    const void *q, *k, *v;
    void *o;
    float *lse;              // may be null
    u64 *stats;              // [sequences, heads, 4], may be null
    Strides qs, ks, vs, os;
    const void *element;     // element mask
    Strides es;              // batch: sequence, token: row; keys are neighbours
    const u32 *allowed;      // block mask of the caller, may be null
    i64 allowed_sequence, allowed_head;  // words from one to the next, 0 to broadcast
    u32 *mask;               // [sequences, heads, q_blocks, mask_words]; null: every reachable block
    const Sequence *sequences;
    const Head *head;
    u32 *groups;             // [sequences, element_heads, q_blocks, 8, mask_words]: 16-row groups
                             // that the element mask lets reach a block
    float *element_pool;     // [sequences, element_heads, q_subs, kv_subs], log2 units;
                             // −∞ where no pair is seen
    float *q_features;       // [heads, all q blocks, q_subs of a block, width]
    float *k_features;       // [kv_heads, all kv blocks, kv_subs of a block, width]
    u32 *q_known, *k_known;  // [heads, all blocks]: means are finite
    double *k_sums;          // [kv_heads, all kv blocks, dim]
    float *k_centre;         // the same shape: what the judge takes off
    float *q_cosine, *k_cosine;  // [heads, all blocks]
    float *scratch;          // [thread blocks of choose, rows, kv_blocks]
    float *samples;          // [some_heads, sequences, samples of one, kv blocks of one]: log-sum-exp
                             // of sampled queries' scores, log2 units; null: none are sampled
    i64 head_samples;        // numbers from one head to the next
    i8 *q8;                  // [heads, all q blocks, 128, padded dim]
    float *q_scale, *q_shift;    // [heads, all q blocks, 128], log2 units
    i8 *k8;                  // [kv_heads, all kv blocks, 64, padded dim]
    float *k_scale;          // [kv_heads, all kv blocks, 64]
    float *k_mean;           // [kv_heads, sequences, dim]
    u8 *v8;                  // [kv_heads, all kv blocks, padded dim, 64 keys permuted]
    u32 *v_amax;             // [kv_heads, sequences, padded dim]
    u16 *cast;               // f32 q, k or v in bf16
    i32 n_sequences, heads, kv_heads;
    i32 dim, dim_v, padded;
    i32 all_q_blocks, all_kv_blocks;  // of all sequences
    i32 q_blocks, kv_blocks, mask_words;  // of the longest
    i32 left, right;         // window, -1: none
    i32 sink, keep_first, keep_local;  // keys, blocks, blocks
    i32 element_kind, element_heads;
    i32 q_rows, kv_rows, second_order, width;
    i32 sampled_rows, sample_chunk;  // of a query block; key blocks of a thread block of `sample`
    i32 first_head, some_heads;      // those that are selected for together
    i32 unused;
    i32 q_len_tensor, kv_len_tensor, batch;
    i32 o_kind, counts_products;
    float scale_log2, square_scale;
};
static_assert(sizeof(Call) == 536, "Call");

enum Coverage { EMPTY_TILE, PARTIAL_TILE, FULL_TILE };

__device__ __forceinline__ int clamp(i64 x, int most) {
    return x < 0 ? 0 : x > most ? most : static_cast<int>(x);
}

/// The keys the rows of a sequence see, element mask aside: those before `hi(i)` that are before
/// `sink` or from `lo(i)` on. Neither falls from one row to the next.
struct View {
    int diagonal, left, right, sink, kv_len;
    __device__ __forceinline__ View(const Call &a, const Sequence &s)
        : diagonal(s.diagonal), left(a.left), right(a.right), sink(a.sink), kv_len(s.kv_len) {}
    __device__ __forceinline__ int hi(int i) const {
        return right < 0 ? kv_len : clamp(static_cast<i64>(i) + diagonal + right + 1, kv_len);
    }
    __device__ __forceinline__ int lo(int i) const {
        return left < 0 ? 0 : clamp(static_cast<i64>(i) + diagonal - left, kv_len);
    }
    __device__ __forceinline__ bool sees(int i, int j) const {
        return j < hi(i) && (j >= lo(i) || j < sink);
    }
    /// How much of rows × keys is seen. The keys do not cross the end of the sinks.
    __device__ __forceinline__ Coverage tile(int row, int row_end, int key, int key_end) const {
        if (row >= row_end || key >= key_end) return EMPTY_TILE;
        const bool in_sink = key_end <= sink;
        if (hi(row) >= key_end && (in_sink || lo(row_end - 1) <= key)) return FULL_TILE;
        // The first row whose hi passes `key` has the smallest lo of those that do.
        int reaching = row;
        if (right >= 0) {
            const i64 first = static_cast<i64>(key) - diagonal - right;
            if (first > row) reaching = first >= row_end ? row_end : static_cast<int>(first);
        }
        if (reaching >= row_end || hi(reaching) <= key) return EMPTY_TILE;
        return in_sink || lo(reaching) < key_end ? PARTIAL_TILE : EMPTY_TILE;
    }
};

/// One head's element mask.
struct ElementMask {
    const void *data;
    i64 stride;
    i32 kind;
    __device__ __forceinline__ ElementMask(const Call &a, int sequence, int head)
        : data(a.element), stride(a.es.token), kind(a.element_kind) {
        const i64 at = sequence * a.es.batch + head * a.es.head;
        const int size = kind == BOOL_MASK ? 1 : kind == IN_F32 ? 4 : 2;
        data = static_cast<const u8 *>(data) + at * size;
    }
    /// Whether the pair takes part; the bias, natural-log units.
    __device__ __forceinline__ bool sees(int i, int j, float &bias) const {
        const i64 at = i * stride + j;
        bias = 0.f;
        if (kind == NO_MASK) return true;
        if (kind == BOOL_MASK) return static_cast<const u8 *>(data)[at] != 0;
        if (kind == IN_F32) bias = static_cast<const float *>(data)[at];
        else {
            const u32 x = static_cast<const u16 *>(data)[at];
            bias = kind == IN_F16 ? Half2<F16>::lo(x) : Half2<Bf16>::lo(x);
        }
        return bias != as_float(0xff800000u);
    }
};

/// A pair's bias in log2 units. f32's lowest number, which many mask with, stays a number.
__device__ __forceinline__ float bias_log2(float bias) {
    const float x = bias * 1.4426950408889634f;
    return x < -1.7014117e38f ? -1.7014117e38f : x > 3.4028234e38f ? 3.4028234e38f : x;
}

/// The sequence that block `block` of all belongs to.
template <bool IS_Q> __device__ __forceinline__ int sequence_of(const Call &a, int block) {
    int low = 0, high = a.n_sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        const int first = IS_Q ? a.sequences[middle].q_block0 : a.sequences[middle].kv_block0;
        if (first <= block) low = middle; else high = middle;
    }
    return low;
}

__device__ __forceinline__ bool keeps_all(const Head &head, const Sequence &s) {
    return head.keeps_all || (head.is_auto && s.is_short);
}

/// Words of the caller's block mask for a query block, or null.
__device__ __forceinline__ const u32 *allowed_words(const Call &a, int sequence, int head,
                                                    int q_block) {
    if (!a.allowed) return nullptr;
    return a.allowed + sequence * a.allowed_sequence + head * a.allowed_head +
           static_cast<i64>(q_block) * a.mask_words;
}

/// Words of the block mask for a query block.
__device__ __forceinline__ u32 *mask_row(const Call &a, u32 *mask, int sequence, int head,
                                         int q_block) {
    return mask + ((static_cast<i64>(sequence) * a.heads + head) * a.q_blocks + q_block) *
                      a.mask_words;
}

/// The first sample's log-sum-exps, one for each key block of the sequence.
__device__ __forceinline__ float *samples_of(const Call &a, const Sequence &s, int head) {
    return a.samples + (head - a.first_head) * a.head_samples + s.sample0;
}

__device__ __forceinline__ bool has_bit(const u32 *words, int j) {
    return words[j >> 5] >> (j & 31) & 1;
}

/// Which of a query block's 16-row groups hold a pair of key block j that may be attended, as
/// bits; 0: the block is not reachable.
__device__ __forceinline__ u32 reaching_groups(const Call &a, const View &view, int sequence,
                                               int head, int q_block, int q_len, int j,
                                               const u32 *allowed) {
    if (allowed && !has_bit(allowed, j)) return 0;
    u32 bits = 0;
    const int key = j * BLOCK_KV, key_end = min(view.kv_len, key + BLOCK_KV);
    if (a.element_kind != NO_MASK) {
        const int element_head = a.element_heads == 1 ? 0 : head;
        const u32 *words = a.groups + ((static_cast<i64>(sequence) * a.element_heads +
                                        element_head) * a.q_blocks + q_block) * 8 * a.mask_words;
        for (int g = 0; g < 8; g++) bits |= (words[g * a.mask_words + (j >> 5)] >> (j & 31) & 1) << g;
        return bits;
    }
    for (int g = 0; g < 8; g++) {
        const int row = q_block * BLOCK_Q + 16 * g;
        if (view.tile(row, min(q_len, row + 16), key, key_end) != EMPTY_TILE) bits |= 1u << g;
    }
    return bits;
}

}  // namespace sparge
