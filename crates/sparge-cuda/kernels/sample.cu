// A few queries of each block against every key: no pooling, so no bias, but few. Both paths'
// selections mix their shares with the pooled masses.
//
// A thread block owns 32 sampled queries of one head, those of neighbouring query blocks; its warps
// share the key blocks. Products are those of the element type, f32 in three tf32 ones of both parts of
// each factor. The log-sum-exp of every (query, key block) goes to the thread block's own piece of the
// workspace, and from there each query block's shares to `shares`.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/ptx/mma.cuh"
#include "sparge/call.cuh"
#include "sparge/rows.cuh"

namespace sparge {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 32;  // queries of an item
constexpr float MINUS_INFINITY = -1.f / 0.f;

/// Eight neighbouring elements of a row, as a lane holds them, and their products: both factors
/// permute the channels alike, so that a lane's fragments are 16 bytes in a row.
template <class T> struct Eight {
    static constexpr int BYTES = 16;
    uint4 x;
    __device__ __forceinline__ void load(const u8 *from) { x = __ldg(reinterpret_cast<const uint4 *>(from)); }
    __device__ __forceinline__ void take(const u8 *from) { x = *reinterpret_cast<const uint4 *>(from); }
    __device__ __forceinline__ void clear() { x = uint4{0, 0, 0, 0}; }
    /// c += a·bᵀ; `lo` and `hi`: rows lane / 4 and 8 further.
    static __device__ __forceinline__ void multiply(float (&c)[4], const Eight &lo, const Eight &hi,
                                                    const Eight &b) {
        const u32 first[4] = {lo.x.x, hi.x.x, lo.x.y, hi.x.y};
        const u32 second[4] = {lo.x.z, hi.x.z, lo.x.w, hi.x.w};
        mma_half<T>(c, first, b.x.x, b.x.y);
        mma_half<T>(c, second, b.x.z, b.x.w);
    }
};
template <> struct Eight<F32> {
    static constexpr int BYTES = 32;
    u32 x[8];
    __device__ __forceinline__ void set(const uint4 &a, const uint4 &b) {
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    }
    __device__ __forceinline__ void load(const u8 *from) {
        const uint4 *y = reinterpret_cast<const uint4 *>(from);
        set(__ldg(y), __ldg(y + 1));
    }
    __device__ __forceinline__ void take(const u8 *from) {
        const uint4 *y = reinterpret_cast<const uint4 *>(from);
        set(y[0], y[1]);
    }
    __device__ __forceinline__ void clear() { set(uint4{0, 0, 0, 0}, uint4{0, 0, 0, 0}); }
    static __device__ __forceinline__ u32 top(u32 x) { return x & 0xffffe000u; }
    static __device__ __forceinline__ u32 rest(u32 x) { return as_bits(as_float(x) - as_float(top(x))); }
    static __device__ __forceinline__ void multiply(float (&c)[4], const Eight &lo, const Eight &hi,
                                                    const Eight &b) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const u32 a0[4] = {top(lo.x[i]), top(hi.x[i]), top(lo.x[i + 1]), top(hi.x[i + 1])};
            const u32 a1[4] = {rest(lo.x[i]), rest(hi.x[i]), rest(lo.x[i + 1]), rest(hi.x[i + 1])};
            mma_tf32(c, a1, top(b.x[i]), top(b.x[i + 1]));
            mma_tf32(c, a0, rest(b.x[i]), rest(b.x[i + 1]));
            mma_tf32(c, a0, top(b.x[i]), top(b.x[i + 1]));
        }
    }
};

/// The query of a block of `rows` that its `i`-th of `count` samples is: the middles of equal parts.
__device__ __forceinline__ int position(int i, int count, int rows) {
    return (2 * i + 1) * rows / (2 * count);
}

/// What all threads of a block know, in shared memory: registers are scarce.
struct Place {
    Sequence s;
    int sequence, head;
    bool keeps_all;
    int places[ROWS];  // of the queries in their sequence; -1: none
    int last;          // the largest of them
};

/// Adds the scores of 8 · N keys from `k0` on to the running maxima and sums of a lane's four rows,
/// of which it holds two neighbouring keys of every eight. PLAIN: every row sees all of them.
template <int N, bool PLAIN, bool HAS_MASK>
__device__ __forceinline__ void add_up(const Call &a, const Place &p, int k0, float (&c)[2][N][4],
                                       float (&tops)[4], float (&sums)[4]) {
    const View view(a, p.s);
    const ElementMask mask(a, p.sequence, a.element_heads == 1 ? 0 : p.head);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        float x[2 * N];
        const int place = p.places[g + 8 * r];
        const int lo = view.lo(place), hi = view.hi(place);
#pragma unroll
        for (int i = 0; i < 2 * N; i++) {
            x[i] = c[r / 2][i / 2][r % 2 * 2 + i % 2] * a.scale_log2;
            if (PLAIN) continue;
            const int at = k0 + 8 * (i / 2) + 2 * t + i % 2;
            bool seen = place >= 0 && at < hi && (at >= lo || at < view.sink);
            if (HAS_MASK && seen) {
                float bias;
                seen = mask.sees(place, at, bias);
                x[i] += bias_log2(bias);
            }
            if (!seen) x[i] = MINUS_INFINITY;
        }
        float top = tops[r];
#pragma unroll
        for (int i = 0; i < 2 * N; i++) top = fmaxf(top, x[i]);
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
        const float base = top == MINUS_INFINITY ? 0.f : top;
        float sum = sums[r] * ex2(tops[r] - base);
#pragma unroll
        for (int i = 0; i < 2 * N; i++) sum += ex2(x[i] - base);
        sums[r] = sum;
        tops[r] = top;
    }
}

/// Grid: any; thread blocks share the items. Dynamic shared memory: 32 rows of `sample_pitch` bytes.
template <class T, bool HAS_MASK>
__global__ void __launch_bounds__(THREADS, 2) sample(const __grid_constant__ Call a) {
    extern __shared__ uint4 tile16[];
    u8 *tile = reinterpret_cast<u8 *>(tile16);
    __shared__ Place p;
    const Sequence &s = p.s;
    const int *places = p.places;
    constexpr int CHUNK = Eight<T>::BYTES;
    constexpr int N = 64 / CHUNK;  // groups of 8 keys scored together: f32 has registers for half
    constexpr int STEP = 8 * N, SIZE = CHUNK / 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int count = a.sampled_rows, per_pass = min(count, ROWS);
    const int blocks = ROWS / per_pass;  // query blocks of an item
    const int chunks = ceil_div(a.q_blocks, blocks), pairs = a.n_sequences * a.heads;
    float *lse = a.scratch + static_cast<i64>(blockIdx.x) * ROWS * a.kv_blocks;

    for (int item = blockIdx.x; item < pairs * chunks; item += gridDim.x) {
        // The last query blocks first: where it is causal they see the most.
        const int first = (chunks - 1 - item / pairs) * blocks;
        const int head = item % pairs % a.heads, sequence = item % pairs / a.heads;
        __syncthreads();
        if (threadIdx.x == 0) {
            p.s = a.sequences[sequence];
            p.keeps_all = keeps_all(a.head[head], p.s);
            p.sequence = sequence;
            p.head = head;
        }
        __syncthreads();
        const int q_blocks = ceil_div(s.q_len, BLOCK_Q);
        if (p.keeps_all || first >= q_blocks) continue;
        for (int pass = 0; pass < count; pass += ROWS) {
            __syncthreads();
            if (threadIdx.x < ROWS) {
                const int r = threadIdx.x, block = first + r / per_pass;
                const int i = pass + r % per_pass, rows = min(BLOCK_Q, s.q_len - block * BLOCK_Q);
                const bool exists = r < blocks * per_pass && block < q_blocks && i < count;
                p.places[r] = exists ? block * BLOCK_Q + position(i, count, rows) : -1;
            }
            __syncthreads();
            const u8 *q = static_cast<const u8 *>(a.q) +
                          SIZE * (s.batch * a.qs.batch + p.head * a.qs.head +
                                  s.q_start * a.qs.token);
            const int width = ceil_div(a.dim, 32) * 4;  // chunks of a row, those past its end zero
            for (int i = threadIdx.x; i < ROWS * width; i += THREADS) {
                const int r = i / width, c = i % width;
                Eight<T> x;
                x.clear();
                if (places[r] >= 0 && 8 * c < a.dim) x.load(q + SIZE * (places[r] * a.qs.token + 8 * c));
                *reinterpret_cast<Eight<T> *>(tile + r * a.sample_pitch + c * CHUNK) = x;
            }
            if (threadIdx.x == 0) {
                int last = places[0];
                for (int r = 1; r < ROWS; r++) last = max(last, places[r]);
                p.last = last;
            }
            __syncthreads();

            const u8 *k = static_cast<const u8 *>(a.k) +
                          SIZE * (s.batch * a.ks.batch + p.head / (a.heads / a.kv_heads) * a.ks.head +
                                  (s.kv_start + g) * a.ks.token + 8 * t);
            // Each group of eight keys, once multiplied, makes room for that of the next step.
            Eight<T> keys[N];
            auto fetch = [&](int n, int k0, int d) {
                const int at = k0 + 8 * n;
                keys[n].clear();
                if (d + 8 * t < a.dim && at + g < s.kv_len)
                    keys[n].load(k + SIZE * (at * a.ks.token + d));
            };
            auto fetch_all = [&](int k0) {
#pragma unroll
                for (int n = 0; n < N; n++) fetch(n, k0, 0);
            };
            fetch_all(warp * BLOCK_KV);
            for (int j = warp; j * BLOCK_KV < s.kv_len; j += WARPS) {
                const int key = j * BLOCK_KV, key_end = min(s.kv_len, key + BLOCK_KV);
                const Coverage whole = View(a, s).tile(places[0], p.last + 1, key, key_end);
                if (whole == EMPTY_TILE) {
                    lse[static_cast<i64>(lane) * a.kv_blocks + j] = MINUS_INFINITY;
                    fetch_all(key + WARPS * BLOCK_KV);
                    continue;
                }
                const bool plain = !HAS_MASK && whole == FULL_TILE && key_end - key == BLOCK_KV;
                float tops[4], sums[4];  // of rows g, g + 8, g + 16, g + 24
#pragma unroll
                for (int r = 0; r < 4; r++) tops[r] = MINUS_INFINITY, sums[r] = 0.f;
#pragma unroll 1
                for (int k0 = key; k0 < key_end; k0 += STEP) {
                    float c[2][N][4] = {};
#pragma unroll 1
                    for (int d0 = 0; d0 < a.dim; d0 += 32) {
                        const u8 *at = tile + g * a.sample_pitch + (d0 / 8 + t) * CHUNK;
                        const bool stays = d0 + 32 < a.dim;
                        const int to_d = stays ? d0 + 32 : 0;
                        const int to_k = stays ? k0
                                               : k0 + STEP < key_end ? k0 + STEP
                                                                     : key + WARPS * BLOCK_KV;
#pragma unroll
                        for (int m = 0; m < 2; m++) {
                            Eight<T> lo, hi;
                            lo.take(at + 16 * m * a.sample_pitch);
                            hi.take(at + (16 * m + 8) * a.sample_pitch);
#pragma unroll
                            for (int n = 0; n < N; n++) {
                                Eight<T>::multiply(c[m][n], lo, hi, keys[n]);
                                if (m == 1) fetch(n, to_k, to_d);
                            }
                        }
                    }
                    if (plain) add_up<N, true, false>(a, p, k0, c, tops, sums);
                    else add_up<N, false, HAS_MASK>(a, p, k0, c, tops, sums);
                }
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    float sum = sums[r];
                    sum += __shfl_xor_sync(FULL, sum, 1);
                    sum += __shfl_xor_sync(FULL, sum, 2);
                    const bool none = tops[r] == MINUS_INFINITY && sum == 0.f;
                    if (t == 0)
                        lse[static_cast<i64>(g + 8 * r) * a.kv_blocks + j] =
                            none ? MINUS_INFINITY : tops[r] + lg2(sum);
                }
            }
            __syncthreads();

            const int kv_blocks = ceil_div(s.kv_len, BLOCK_KV);
            // Each query's share of every key block, summed over the block's queries; NaN where one
            // of them has no finite softmax.
            for (int b = warp; b < blocks && first + b < q_blocks; b += WARPS) {
                float *out = shares_of(a, sequence, head, first + b);
                if (pass == 0)
                    for (int j = lane; j < kv_blocks; j += 32) out[j] = 0.f;
                for (int r = b * per_pass; r < (b + 1) * per_pass; r++) {
                    if (places[r] < 0) continue;
                    const float *in = lse + static_cast<i64>(r) * a.kv_blocks;
                    float top = MINUS_INFINITY, sum = 0.f;
                    for (int j = lane; j < kv_blocks; j += 32) top = fmaxf(top, in[j]);
                    top = warp_max(top);
                    const float base = top == MINUS_INFINITY ? 0.f : top;
                    for (int j = lane; j < kv_blocks; j += 32) sum += ex2(in[j] - base);
                    sum = warp_sum(sum);
                    if (sum == 0.f) continue;  // it sees nothing
                    for (int j = lane; j < kv_blocks; j += 32)
                        out[j] += __fdiv_rn(ex2(in[j] - base), sum);
                }
            }
        }
    }
}

}  // namespace sparge
