// Reading tokens of any element type, for the general path's preparation.
#pragma once
#include "sparge/call.cuh"

namespace sparge {

template <class T> struct Reader {
    static __device__ __forceinline__ float2 two(const void *x, i64 at) {
        const u32 y = *reinterpret_cast<const u32 *>(static_cast<const u16 *>(x) + at);
        return float2{Half2<T>::lo(y), Half2<T>::hi(y)};
    }
};
template <> struct Reader<F32> {
    static __device__ __forceinline__ float2 two(const void *x, i64 at) {
        return *reinterpret_cast<const float2 *>(static_cast<const float *>(x) + at);
    }
};

/// A query block, or a key block (of K or of V), of one head.
struct Block {
    int head, index;     // of all blocks of the head
    int sequence, block; // in the sequence
    int rows;            // that exist
    i64 start;           // element of its first token
    i64 stride;
    template <bool IS_Q>
    static __device__ __forceinline__ Block of(const Call &a, int at, const Strides &strides) {
        Block b;
        const int all = IS_Q ? a.all_q_blocks : a.all_kv_blocks;
        b.head = at / all;
        b.index = at % all;
        b.sequence = sequence_of<IS_Q>(a, b.index);
        const Sequence &s = a.sequences[b.sequence];
        const int size = IS_Q ? BLOCK_Q : BLOCK_KV;
        b.block = b.index - (IS_Q ? s.q_block0 : s.kv_block0);
        b.rows = min(size, (IS_Q ? s.q_len : s.kv_len) - b.block * size);
        b.stride = strides.token;
        b.start = s.batch * strides.batch + b.head * strides.head +
                  static_cast<i64>((IS_Q ? s.q_start : s.kv_start) + b.block * size) * b.stride;
        return b;
    }
};

}  // namespace sparge
