// Attention over kept blocks with warp-level matrix instructions: every option, every GPU from
// sm_80 on.
//
// A thread block owns 16 query rows per warp of one query block, and walks the kept key blocks in
// ascending order. A warp is the group of 16 rows that stage 2 skips together. K and V have one
// buffer each: V of a block arrives beside its Q·Kᵀ, K of the next beside P·V.
//
// INT8: Q and K are int8 (a scale per token, K less its mean), else in T. FP8: V is e4m3 (a scale
// per channel) and so is P, else both are in T. Sums are fp32 in all of them; the e4m3 units sum to
// fewer bits, so each block's P·V is added to O in fp32.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/ptx/mma.cuh"
#include "sparge/call.cuh"
#include "sparge/walk.cuh"

namespace sparge {

constexpr u32 MINUS_INFINITY = 0xff800000u;
constexpr float P_SCALE_LOG2 = 8.807354922057604f;  // log2(448)

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

template <int D, class T, bool INT8, bool FP8> struct Attend {
    static constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * WARPS;
    static constexpr int QK_ROW = INT8 ? D : 2 * D;       // bytes
    static constexpr int V_ROW = FP8 ? BLOCK_KV : 2 * D;  // of a channel, or of a key
    static constexpr int V_ROWS = FP8 ? D : BLOCK_KV;
    using QK = Placed<QK_ROW>;
    using PV = Placed<V_ROW>;
    static constexpr int Q_BYTES = ROWS * QK::PITCH, K_BYTES = BLOCK_KV * QK::PITCH,
                         V_BYTES = V_ROWS * PV::PITCH, SCALE_BYTES = BLOCK_KV * 4;

    // e4m3 P is stored as 448·p.
    static constexpr float P_LOG2 = FP8 ? P_SCALE_LOG2 : 0.f;
    static constexpr int BYTES = Q_BYTES + K_BYTES + V_BYTES + SCALE_BYTES + 8 * D;

    const Call &a;
    Place &place;
    const Sequence &s;
    u8 *const q;
    float o[D / 8][4];
    float top[2], sum[2], q_scale[2];
    u32 products;

    __device__ __forceinline__ Attend(const Call &a, Place &place, u8 *shared)
        : a(a), place(place), s(place.s), q(shared), products(0) {}

    __device__ __forceinline__ u8 *k() const { return q + Q_BYTES; }
    __device__ __forceinline__ u8 *v() const { return q + Q_BYTES + K_BYTES; }
    __device__ __forceinline__ float *k_scale() const {
        return reinterpret_cast<float *>(q + Q_BYTES + K_BYTES + V_BYTES);
    }
    /// [D][2]: keys whose V is not finite, as bits.
    __device__ __forceinline__ u32 *bad_keys() const {
        return reinterpret_cast<u32 *>(q + Q_BYTES + K_BYTES + V_BYTES + SCALE_BYTES);
    }
    static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
    /// The first row of the thread block, in the sequence; of the warp.
    __device__ __forceinline__ int first() const {
        return place.q_block * BLOCK_Q + place.part * ROWS;
    }
    __device__ __forceinline__ int row() const { return first() + warp() * 16; }
    __device__ __forceinline__ int token(int r) const { return row() + lane() / 4 + 8 * r; }

    __device__ __forceinline__ void copy_q() {
        if constexpr (INT8) {
            const i64 at = (static_cast<i64>(place.head) * a.all_q_blocks + s.q_block0) * BLOCK_Q +
                           first();
            copy_image<ROWS, QK_ROW, THREADS, QK>(q, a.q8 + at * D);
            for (int r = 0; r < 2; r++) q_scale[r] = a.q_scale[at + warp() * 16 + lane() / 4 + 8 * r];
        } else {
            const u16 *from = static_cast<const u16 *>(a.q) + s.batch * a.qs.batch +
                              place.head * a.qs.head + static_cast<i64>(s.q_start + first()) * a.qs.token;
            copy_rows<D, ROWS, THREADS, QK>(q, from, a.qs.token, s.q_len - first(), a.dim);
        }
    }
    __device__ __forceinline__ i64 kv_index(int block) const {
        return static_cast<i64>(place.kv_head) * a.all_kv_blocks + s.kv_block0 + block;
    }
    __device__ __forceinline__ const u16 *kv_rows(const void *x, const Strides &strides,
                                                  int block) const {
        return static_cast<const u16 *>(x) + s.batch * strides.batch +
               place.kv_head * strides.head +
               static_cast<i64>(s.kv_start + block * BLOCK_KV) * strides.token;
    }
    __device__ __forceinline__ void copy_k(int block) {
        if (block >= 0) {
            if constexpr (INT8) {
                copy_image<BLOCK_KV, QK_ROW, THREADS, QK>(k(), a.k8 + kv_index(block) * (BLOCK_KV * D));
                if (threadIdx.x < BLOCK_KV / 4)
                    copy16(smem(k_scale() + 4 * threadIdx.x),
                           a.k_scale + kv_index(block) * BLOCK_KV + 4 * threadIdx.x, true);
            } else {
                copy_rows<D, BLOCK_KV, THREADS, QK>(k(), kv_rows(a.k, a.ks, block), a.ks.token,
                                        s.kv_len - block * BLOCK_KV, a.dim);
            }
        }
        copy_commit();
    }
    __device__ __forceinline__ void copy_v(int block) {
        if (block >= 0) {
            if constexpr (FP8)
                copy_image<V_ROWS, V_ROW, THREADS, PV>(v(), a.v8 + kv_index(block) * (BLOCK_KV * D));
            else
                copy_rows<D, BLOCK_KV, THREADS, PV>(v(), kv_rows(a.v, a.vs, block), a.vs.token,
                                        s.kv_len - block * BLOCK_KV, a.dim_v);
        }
        copy_commit();
    }

    /// x = the warp's scaled scores against the keys in shared memory, log2 units.
    __device__ __forceinline__ void scores(float (&x)[8][4]) const {
        // Matrices of A: rows 0-7 and 8-15, first and second 16 bytes; of B: keys likewise.
        const u32 from_q = smem(q + QK::at(warp() * 16 + lane() % 16, lane() / 16));
        const u32 from_k = smem(k() + QK::at(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2));
        using Sum = typename QkSum<INT8>::Type;
        Sum c[8][4];
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[n][i] = 0;
#pragma unroll
        for (int step = 0; step < QK_ROW / 32; step++) {
            u32 x[4];
            load_matrices(x, QK::step(from_q, step));
#pragma unroll
            for (int n = 0; n < 4; n++) {
                u32 y[4];
                load_matrices(y, QK::step(from_k, step) + 16 * n * QK::PITCH);
                if constexpr (INT8) {
                    mma_s8(c[2 * n], x, y[0], y[1]);
                    mma_s8(c[2 * n + 1], x, y[2], y[3]);
                } else {
                    mma_half<T>(c[2 * n], x, y[0], y[1]);
                    mma_half<T>(c[2 * n + 1], x, y[2], y[3]);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if constexpr (INT8)
                    x[n][i] = static_cast<float>(c[n][i]) * q_scale[i / 2] *
                              k_scale()[8 * n + 2 * (lane() % 4) + i % 2];
                else x[n][i] = c[n][i] * a.scale_log2;
            }
    }

    /// Takes pairs out that are not seen and adds the bias of the others. Returns which are seen:
    /// bit 4n + i for x[n][i].
    __device__ __forceinline__ u32 cut(float (&x)[8][4], int block) const {
        const ElementMask mask(a, place.sequence, place.head);
        const View view(a, s);
        u32 seen = 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int i = token(r), hi = view.hi(i), lo = view.lo(i);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int j = block * BLOCK_KV + 8 * n + 2 * (lane() % 4) + c;
                    float bias = 0.f;
                    bool sees = i < s.q_len && j < hi && (j >= lo || j < view.sink);
                    if (sees && mask.kind != NO_MASK) sees = mask.sees(i, j, bias);
                    if (!sees) x[n][2 * r + c] = as_float(MINUS_INFINITY);
                    else seen |= 1u << (4 * n + 2 * r + c);
                    if (sees && mask.kind > BOOL_MASK) x[n][2 * r + c] += bias_log2(bias);
                }
        }
        return seen;
    }

    /// x = P = exp2(scores − running maximum), times 448 where FP8; returns whether stage 2 leaves P·V out.
    __device__ __forceinline__ bool softmax(float (&x)[8][4], float lambda, float (&alpha)[2]) {
        bool idle = true;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = as_float(MINUS_INFINITY);
#pragma unroll
            for (int n = 0; n < 8; n++) most = fmaxf(most, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
            most = quad_max(most);
            const float now = fmaxf(top[r], most);
            // A row that has seen nothing yet: subtract 0, so that −∞ stays −∞ and P is 0.
            const float base = now == as_float(MINUS_INFINITY) ? 0.f : now;
            idle &= most == as_float(MINUS_INFINITY) || most < now - lambda;
            alpha[r] = ex2(top[r] - base);
            top[r] = now;
            const float less = base - P_LOG2;
            float p = 0.f;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    x[n][2 * r + c] = ex2(x[n][2 * r + c] - less);
                    p += x[n][2 * r + c];
                }
            sum[r] = fmaf(sum[r], alpha[r], p);
        }
        return __all_sync(FULL, idle);
    }

    /// O = alpha·O + P·V.
    __device__ __forceinline__ void add(const float (&p)[8][4], const float (&alpha)[2]) {
        if constexpr (FP8) {
            u32 x[2][4];  // keys in the order in which the preparation stored V's
#pragma unroll
            for (int step = 0; step < 2; step++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int n = 4 * step + i / 2 * 2, r = i % 2 * 2;
                    x[step][i] = e4m3x4(p[n][r], p[n][r + 1], p[n + 1][r], p[n + 1][r + 1]);
                }
            const u32 from_v = smem(v() + PV::at(lane() % 8, lane() / 8));
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                u32 y[4];
                load_matrices(y, from_v + 8 * d * PV::PITCH);
                float part[4] = {};
                mma_e4m3(part, x[0], y[0], y[1]);
                mma_e4m3(part, x[1], y[2], y[3]);
#pragma unroll
                for (int i = 0; i < 4; i++) o[d][i] = fmaf(o[d][i], alpha[i / 2], part[i]);
            }
        } else {
#pragma unroll
            for (int d = 0; d < D / 8; d++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[d][i] *= alpha[i / 2];
            const u32 from_v = smem(v() + PV::at(lane() % 16, lane() / 16));
#pragma unroll
            for (int step = 0; step < 4; step++) {
                u32 x[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int n = 2 * step + i / 2, r = i % 2 * 2;
                    x[i] = Half2<T>::pack(p[n][r], p[n][r + 1]);
                }
#pragma unroll
                for (int d = 0; d < D / 16; d++) {
                    u32 y[4];
                    load_matrices_transposed(y, PV::step(from_v, d) + 16 * step * PV::PITCH);
                    mma_half<T>(o[2 * d], x, y[0], y[1]);
                    mma_half<T>(o[2 * d + 1], x, y[2], y[3]);
                }
            }
        }
    }

    // A pair that is cut has P = 0, which must not meet a NaN or an infinity in V. Where a block is
    // cut, such elements are taken out of V and remembered; afterwards the channels of the rows that
    // do see one become NaN.

    /// All bits of the numbers in x that are not finite.
    static __device__ __forceinline__ u32 not_finite(u32 x) {
        constexpr u32 EXPONENT = FP8 ? 0x7f7f7f7fu : IsF16<T>::value ? 0x7c007c00u : 0x7f807f80u;
        return FP8 ? __vcmpeq4(x & EXPONENT, EXPONENT) : __vcmpeq2(x & EXPONENT, EXPONENT);
    }
    /// Waits for all threads; whether V held any number that is not finite, in a block that is cut.
    __device__ __forceinline__ bool take_bad_out(bool is_cut) {
        constexpr int WORDS = V_ROW / 4;
        bool bad = false;
        auto word = [&](int i) {
            return reinterpret_cast<u32 *>(v() + PV::at(i / WORDS, i % WORDS / 4)) + i % 4;
        };
        if (is_cut) {
            __syncthreads();  // what the other threads copied is there too
#pragma unroll 1
            for (int i = threadIdx.x; i < V_ROWS * WORDS; i += THREADS)
                bad |= not_finite(*word(i)) != 0;
        }
        if (!__syncthreads_or(bad)) return false;
        for (int i = threadIdx.x; i < 2 * D; i += THREADS) bad_keys()[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < V_ROWS * WORDS; i += THREADS) {
            const u32 mask = not_finite(*word(i));
            if (!mask) continue;
            *word(i) &= ~mask;
            for (int c = 0; c < (FP8 ? 4 : 2); c++) {
                if (!(mask >> (FP8 ? 8 : 16) * c & 1)) continue;
                // e4m3: four keys of a channel, in the order of P's registers.
                const int t = i % WORDS % 4, at = i % WORDS / 4;
                const int key = FP8 ? 16 * at + 2 * t + c % 2 + c / 2 * 8 : i / WORDS;
                const int channel = FP8 ? i / WORDS : i % WORDS * 2 + c;
                atomicOr(bad_keys() + 2 * channel + key / 32, 1u << key % 32);
            }
        }
        __syncthreads();
        return true;
    }
    /// `seen`: bit 4n + i for the thread's i-th pair of key tile n.
    __device__ __forceinline__ void put_bad_in(u32 seen) {
        u32 keys[2][2] = {};  // of a row, all of them
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                keys[i / 2][n / 4] |= (seen >> (4 * n + i) & 1) << (n % 4 * 8 + 2 * (lane() % 4) + i % 2);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 &x = keys[i / 2][i % 2];
            x |= __shfl_xor_sync(FULL, x, 1);
            x |= __shfl_xor_sync(FULL, x, 2);
        }
#pragma unroll
        for (int d = 0; d < D / 8; d++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 *bad = bad_keys() + 2 * (8 * d + 2 * (lane() % 4) + i % 2);
                if ((bad[0] & keys[i / 2][0]) | (bad[1] & keys[i / 2][1]))
                    o[d][i] = as_float(0x7fc00000u);
            }
    }

    __device__ __forceinline__ void run() {
        const Head h = a.head[place.head];
        const float lambda = h.is_auto && s.is_short ? as_float(0x7f800000u) : h.lambda;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = as_float(MINUS_INFINITY);
            sum[r] = 0.f;
        }
#pragma unroll
        for (int d = 0; d < D / 8; d++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[d][i] = 0.f;
        int block = place.next;
        bool is_cut = place.coverage != FULL_TILE;
        if (block >= 0) {
            copy_q();
            copy_k(block);
            copy_v(block);
        }
        while (block >= 0) {
            copy_wait<1>();
            __syncthreads();
            if (threadIdx.x == 0) walk(a, place, first(), min(s.q_len, first() + ROWS));
            const int key = block * BLOCK_KV, key_end = min(s.kv_len, key + BLOCK_KV);
            Coverage mine = View(a, s).tile(row(), min(s.q_len, row() + 16), key, key_end);
            if (mine == FULL_TILE && (row() + 16 > s.q_len || key + BLOCK_KV > s.kv_len ||
                                      a.element_kind != NO_MASK))
                mine = PARTIAL_TILE;
            float x[8][4], alpha[2];
            bool idle = true;
            u32 seen = FULL;
            if (mine != EMPTY_TILE) scores(x);
            __syncthreads();  // K's buffer is free
            copy_k(place.next);
            if (mine != EMPTY_TILE) {
                if (mine == PARTIAL_TILE) seen = cut(x, block);
                idle = softmax(x, lambda, alpha);
            }
            copy_wait<1>();
            const bool bad = take_bad_out(is_cut || a.element_kind != NO_MASK);
            if (!idle) {
                add(x, alpha);
                if (bad) put_bad_in(seen);
                products++;
            }
            block = place.next;
            is_cut = place.coverage != FULL_TILE;
            __syncthreads();  // V's buffer is free
            copy_v(block);
        }
        finish();
    }

    __device__ __forceinline__ void finish() {
        const i64 channels = (static_cast<i64>(place.kv_head) * a.n_sequences + place.sequence) * D;
        const int lane = this->lane(), head = place.head;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float l = quad_sum(sum[r]);
            const int i = token(r);
            if (i >= s.q_len) continue;
            const float by = l == 0.f ? 0.f : 1.f / l;
            const i64 at = s.batch * a.os.batch + head * a.os.head +
                           static_cast<i64>(s.q_start + i) * a.os.token;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                const int channel = 8 * d + 2 * (lane % 4);
                if (channel >= a.dim_v) continue;
                float y[2] = {o[d][2 * r] * by, o[d][2 * r + 1] * by};
                if (FP8) {
                    y[0] *= as_float(a.v_amax[channels + channel]) * (1.f / 448.f);
                    y[1] *= as_float(a.v_amax[channels + channel + 1]) * (1.f / 448.f);
                }
                if (a.o_kind == IN_F32)
                    *reinterpret_cast<float2 *>(static_cast<float *>(a.o) + at + channel) =
                        float2{y[0], y[1]};
                else
                    *reinterpret_cast<u32 *>(static_cast<u16 *>(a.o) + at + channel) =
                        a.o_kind == IN_F16 ? Half2<F16>::pack(y[0], y[1])
                                             : Half2<Bf16>::pack(y[0], y[1]);
            }
            if (a.lse && lane % 4 == 0) {
                float shift = 0.f;  // scores were taken of K less its mean
                if (INT8)
                    shift = a.q_shift[(static_cast<i64>(head) * a.all_q_blocks + s.q_block0) *
                                          BLOCK_Q + i];
                a.lse[(static_cast<i64>(s.batch) * a.heads + head) * a.q_len_tensor + s.q_start + i] =
                    l == 0.f ? as_float(MINUS_INFINITY)
                             : (top[r] + shift + lg2(l) - P_LOG2) * 0.69314718055994531f;
            }
        }
        if (a.stats && lane == 0 && products > 0)
            atomicAdd(a.stats + (static_cast<i64>(place.sequence) * a.heads + head) * 4 + 3,
                      static_cast<u64>(products));
    }
};

/// Grid: every part of every query block of every head of every sequence, longest rows first.
template <int D, class T, bool INT8, bool FP8>
__global__ void __launch_bounds__(128, D > 96 || FP8 ? 2 : 3)
attend_mma(const __grid_constant__ Call a) {
    using Work = Attend<D, T, INT8, FP8>;
    constexpr int PARTS = BLOCK_Q / Work::ROWS;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ Place place;
    if (threadIdx.x == 0) {
        int item = blockIdx.x / PARTS;
        place.part = blockIdx.x % PARTS;
        place.q_block = a.q_blocks - 1 - item % a.q_blocks;
        item /= a.q_blocks;
        place.head = item % a.heads;
        place.kv_head = place.head / (a.heads / a.kv_heads);
        place.sequence = item / a.heads;
        place.s = a.sequences[place.sequence];
        const int row = place.q_block * BLOCK_Q + place.part * Work::ROWS;
        const int row_end = min(place.s.q_len, row + Work::ROWS);
        place.at = -32;
        place.word = 0;
        place.end = row < row_end ? ceil_div(View(a, place.s).hi(row_end - 1), BLOCK_KV) : 0;
        walk(a, place, row, row_end);
    }
    __syncthreads();
    Work work(a, place, shared);
    if (work.first() < place.s.q_len) work.run();
}

}  // namespace sparge
