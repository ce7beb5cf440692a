// The walk over a query block's kept key blocks, for the general attention kernel.
#pragma once
#include "sparge/call.cuh"

namespace sparge {

/// What all threads of a block know, in shared memory: registers are scarce.
struct Place {
    Sequence s;
    int sequence, head, kv_head, q_block, part;
    // The walk over the kept, reachable key blocks: thread 0 takes the steps.
    int at, end;
    u32 word;
    int next, coverage;  // the next block, or -1, and how much of it is seen
};

/// Steps to the next block of rows row..row_end.
__device__ __forceinline__ void walk(const Call &a, Place &p, int row, int row_end) {
    const View view(a, p.s);
    const u32 *mask = a.mask ? mask_row(a, a.mask, p.sequence, p.head, p.q_block) : nullptr;
    const u32 *allowed = allowed_words(a, p.sequence, p.head, p.q_block);
    int at = p.at, block = -1;
    u32 word = p.word;
    Coverage coverage = EMPTY_TILE;
    while (coverage == EMPTY_TILE) {
        while (word == 0 && at + 32 < p.end) {
            at += 32;
            word = FULL;
            if (mask) word &= mask[at >> 5];
            if (allowed) word &= allowed[at >> 5];
        }
        block = word == 0 ? p.end : at + __ffs(word) - 1;
        word &= word - 1;
        if (block >= p.end) break;
        coverage = view.tile(row, row_end, block * BLOCK_KV,
                             min(view.kv_len, (block + 1) * BLOCK_KV));
    }
    p.at = at;
    p.word = word;
    p.next = block < p.end ? block : -1;
    p.coverage = coverage;
}

}  // namespace sparge
