// Attention over kept blocks on Hopper: int8 Q·Kᵀ, online softmax, e4m3 P·V.
//
// A persistent block of 384 threads: one producer thread copies tiles of two 64-key blocks (any
// two: they need not be neighbours) into a ring in shared memory (sparge/tiles.cuh); two consumer
// warpgroups own 64 query rows each. The softmax of a tile runs beside P·V of the one before; the
// warpgroups issue their products in turns (but for an item's first and last), so that neither's
// wait for the other's.
//
// Exponentials are integers. Where t = log2(SCALE·p) is a fixed-point number with 23 bits after the
// point, (t + 127)·2²³ is the bits of a float: exponent right, mantissa 1 + f where 2^f was meant.
// One multiplication and addition makes a score so, with no conversion and no exponential, and at
// most 4% off about a mean of nothing (LINEAR_LOG2); e4m3 rounds by up to 6%. The factor is an
// integer too: its rounding adds |score|·2⁻²⁴ to t, 0.01 where queries and keys are like normal
// numbers, 0.12 (9% of p, alike for a block) where all 128 channels of both are at their largest.
//
// P·V of a tile has its own accumulator, because the e4m3 units round sums to fewer bits than fp32;
// O = O·alpha + P·V is fp32. Sums of P come out of the same product, from a column of ones, so that
// they are of p as rounded.
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"
#include "sparge/ptx/mbarrier.cuh"
#include "sparge/ptx/wgmma.cuh"
#include "sparge/tiles.cuh"

namespace sparge {

constexpr float NEVER = -1e30f;     // running maximum before any key

/// A warp's running maxima follow only when a score exceeds one by more than this (log2): sums are
/// rescaled less often, for one bit of e4m3's range.
constexpr float HEADROOM = 1.f;
/// log2(SCALE): P is stored as SCALE·p, 448 where a score is HEADROOM above the running maximum.
constexpr float SCALE_LOG2 = 8.807354922057604f - HEADROOM;
/// log2 of the mean of (1 + f)/2^f over f in [0, 1): taken off, p is right on average.
constexpr float LINEAR_LOG2 = 0.0576f;
/// What is added to log2(p) before it becomes bits.
constexpr float TOP = SCALE_LOG2 + 127.f - LINEAR_LOG2;
constexpr float ONE = 8388608.f;  // 2²³
constexpr float RANGE = 60.f;     // log2: p below counts as 0

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// The integer nearest to |x| < 2²²: the low bits of 1.5·2²³ + x.
__device__ __forceinline__ i32 fixed(float x) { return as_bits(x + 12582912.f) - 0x4B400000u; }

/// The largest of four neighbouring lanes.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}

/// One consumer warpgroup's state for 64 query rows: a thread holds rows `row` and `row + 8`.
template <int D, class T, int STAGES> struct Consumer {
    static constexpr int N = BLOCK_KV;  // scores of a thread: 64 rows, two blocks, 128 threads
    using Scores = i32[N];
    using Shared = Smem<D, STAGES>;
    const Args &a;
    const u32 base;  // address of Shared
    Ring<STAGES> ring;
    Ring<Q_STAGES> q_ring;
    u32 p[N / 4];
    float o[D / 2], part[D / 2 + 4];
    float running[2], sum[2], alpha[2], q_scale[2], k_scale[2];
    bool is_wide;     // see look_wide
    u32 is_there;     // whether the next tile is
    const int group;  // 0 or 1
    u32 q_slot;

    __device__ __forceinline__ Consumer(const Args &a, u32 base)
        : a(a), base(base), group(uniform(threadIdx.x / 128)) {}

    // Shared memory by address: the compiler would find out where it starts again at every use.
#define PLACE(member) \
    (base + static_cast<u32>(reinterpret_cast<u64>(&reinterpret_cast<Shared *>(0)->member)))
    static __device__ __forceinline__ i32 word(u32 address) {
        i32 x;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
        return x;
    }
    __device__ __forceinline__ u32 full() const { return PLACE(full) + 8 * ring.slot(); }
    __device__ __forceinline__ u32 empty(u32 slot) const { return PLACE(empty) + 8 * slot; }
    __device__ __forceinline__ u32 tile(u32 slot) const { return PLACE(tile) + sizeof(Tile) * slot; }
    __device__ __forceinline__ u32 keys(u32 slot) const { return PLACE(k_scale) + 32 * slot; }

    /// A number that all lanes have, so that the compiler knows.
    static __device__ __forceinline__ u32 uniform(u32 x) { return __shfl_sync(FULL, x, 0); }
    // Read again at every use: registers are scarce.
    static __device__ __forceinline__ int thread() {
        int x;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
        return x;
    }
    static __device__ __forceinline__ int lane() { return thread() % 32; }
    static __device__ __forceinline__ int row() {  // within the query block
        const int t = thread();
        return t / 32 * 16 + t % 32 / 4;
    }

    __device__ __forceinline__ void begin() {
        const u32 scales = PLACE(q_scale) + q_slot * (BLOCK_Q * 4) + 4 * row();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            running[r] = NEVER;
            sum[r] = 0.f;
            q_scale[r] = as_float(word(scales + 32 * r));
            alpha[r] = 1.f;
        }
        is_wide = true;
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0.f;
    }

    /// Starts scores = Q·Kᵀ for the tile in `slot`, which is there. Returns its flags.
    __device__ __forceinline__ int issue_qk(Scores &scores, u32 slot) {
        const u32 q = descriptor(PLACE(q) + q_slot * (BLOCK_Q * D) + group * 64 * D);
        const u32 k = descriptor(PLACE(k) + slot * (2 * BLOCK_KV * D));
        pin_registers(scores);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 32; i++) wgmma_s8<D>(scores, q + 2 * i, k + 2 * i, i > 0);
        wgmma_commit();
        k_scale[0] = as_float(word(keys(slot)));
        k_scale[1] = as_float(word(keys(slot) + 16));
        return word(tile(slot) + 12);
    }

    /// Starts part = P·V, or part += P·V, for the tile in `slot`.
    __device__ __forceinline__ void issue_pv(u32 slot) {
        const u32 v = descriptor(PLACE(v) + slot * (2 * BLOCK_KV * (D + 8)));
        pin_registers(p);
        pin_registers(part);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // Two steps in each half tile.
            const u32 at = v + (i / 2) * ((D + 8) * BLOCK_KV >> 4) + 2 * (i % 2);
            wgmma_e4m3(part, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], at,
                       i > 0);
        }
        wgmma_commit();
    }

    /// Takes pairs that are masked out of the scores, which are floats.
    __device__ __forceinline__ void cut(Scores &scores, int flags) {
        const u32 slot = ring.slot();
        const int column = 2 * (lane() % 4);
        const int first = flags & EMPTY ? a.kv_len : word(tile(slot) + 4);
        const int after = word(tile(slot) + 8), second = after < 0 ? a.kv_len : after;
        const int token = Item(a, word(tile(slot))).q_block * BLOCK_Q + row();
        const int limit[2] = {visible_end(a, token), visible_end(a, token + 8)};
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int half = i / 32;
            const int key = (half ? second : first) + i % 32 / 4 * 8 + column + i % 2;
            if (key >= limit[i / 2 % 2]) scores[i] = 0xff800000;
        }
        // Keys that are not finite count as 0: NaN to the rows that see them.
#pragma unroll 1
        for (int w = 0; w < 4; w++) {
            u32 bad = word(keys(slot) + w / 2 * 16 + 4 + w % 2 * 4);
            if (bad == 0) continue;
            bad >>= column;
#pragma unroll
            for (int i = 0; i < N; i++)
                if (i / 16 == w && bad >> (i % 16 / 4 * 8 + i % 2) & 1 && scores[i] != 0xff800000)
                    scores[i] = 0x7fc00000;
        }
    }

    /// The largest score of row r in half h among this lane's.
    static __device__ __forceinline__ i32 top_of(const Scores &scores, int r, int h) {
        auto at = [&](int i) { return scores[32 * h + i / 2 * 4 + 2 * r + i % 2]; };
        i32 x = max(max(at(0), at(1)), at(2));
#pragma unroll
        for (int i = 3; i < 15; i += 2) x = max(max(x, at(i)), at(i + 1));
        return max(x, at(15));
    }

    /// The running maximum takes in `top`, a lane's; alpha is what earlier sums are worth beside it.
    __device__ __forceinline__ void raise(int r, float top) {
        const float m = fmaxf(quad_max(top), running[r]);
        alpha[r] = ex2(running[r] - m);
        running[r] = m;
    }

    /// After a running maximum rose: whether bits of a score might overflow. No score exceeds the
    /// norms' product, 1.1 times it as int8 rounds ((1 + √D/254)²), so that t ≥ −1.1·norms − running.
    __device__ __forceinline__ void look_wide() {
        const float most = fminf(132.f - 1.1f * as_float(word(PLACE(norms) + 4 * q_slot)), 119.f);
        is_wide = __any_sync(FULL, !(fmaxf(fabsf(running[0]), fabsf(running[1])) <= most));
    }

    /// Scores become SCALE·p, as floats: the bits are score·factor + bias.
    __device__ __forceinline__ void exponentials(Scores &scores) {
        float top[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = fmaxf(top_of(scores, r, 0) * (q_scale[r] * k_scale[0]),
                           top_of(scores, r, 1) * (q_scale[r] * k_scale[1]));
            // NaN where a key of the tile is not finite.
            sum[r] += (k_scale[0] + k_scale[1]) * 0.f;
        }
        if (__any_sync(FULL, top[0] > running[0] + HEADROOM || top[1] > running[1] + HEADROOM)) {
            raise(0, top[0]);
            raise(1, top[1]);
            look_wide();
        } else {
            alpha[0] = alpha[1] = 1.f;
        }
        if (is_wide) bits<true>(scores);
        else bits<false>(scores);
    }
    /// IS_WIDE: scores further than RANGE below the running maximum count as so far; the others' bits
    /// come out right modulo 2³², and that is all there is to them.
    template <bool IS_WIDE> __device__ __forceinline__ void bits(Scores &scores) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = TOP - running[r];
            if (IS_WIDE) most -= 512.f * rintf(most * (1.f / 512));
            const i32 bias = static_cast<u32>(fixed(most * 16384.f)) << 9;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float c = q_scale[r] * k_scale[h];
                i32 factor = fixed(c * ONE), more = bias, least = 0;
                if (IS_WIDE) {
                    // All scores lie within ±2²¹. Above, the block counts for nothing.
                    const float from = (running[r] - RANGE) * reciprocal(c);
                    least = fixed(fmaxf(from, -2097152.f));
                    if (from > 2097152.f) least = factor = more = 0;
                }
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    i32 &x = scores[32 * h + i / 2 * 4 + 2 * r + i % 2];
                    x = static_cast<u32>(IS_WIDE ? max(x, least) : x) * static_cast<u32>(factor) +
                        static_cast<u32>(more);
                }
            }
        }
    }

    /// The same by real exponentials: where scores are masked, FAR or not finite.
    __device__ __forceinline__ void exponentials_any(Scores &scores, int flags) {
#pragma unroll
        for (int i = 0; i < N; i++) scores[i] = as_bits(static_cast<float>(scores[i]));
        if (flags & CUT) cut(scores, flags);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float c[2] = {q_scale[r] * k_scale[0], q_scale[r] * k_scale[1]};
            float top[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                auto at = [&](int i) { return as_float(scores[32 * h + i / 2 * 4 + 2 * r + i % 2]); };
                top[h] = at(0);
#pragma unroll
                for (int i = 1; i < 16; i++) top[h] = fmaxf(top[h], at(i));
            }
            raise(r, fmaxf(top[0] * c[0], top[1] * c[1]));
#pragma unroll
            for (int i = 0; i < 32; i++) {
                i32 &x = scores[i / 2 * 4 + 2 * r + i % 2];
                x = as_bits(ex2(fmaf(as_float(x), c[i / 16], SCALE_LOG2 - running[r])));
            }
        }
        look_wide();
    }

    /// Scores of the ring's tile become SCALE·p. Returns when the next tile is there, if there is one.
    __device__ __forceinline__ void softmax(Scores &scores, int flags) {
        if (flags & (CUT | FAR)) exponentials_any(scores, flags);
        else exponentials(scores);
        // The assembler would move the wait for P·V up, before the softmax that is to run beside
        // it; it does not move it over the loop in this wait.
        pin_registers(scores);
        if (flags & LAST) return;
        if (!is_there) {
            ring.next();
            mbar_wait(full(), ring.parity());
            ring.count--;
        }
    }

    /// Asks for the next tile while the products run, so that the answer costs nothing.
    __device__ __forceinline__ void look_ahead() {
        ring.next();
        is_there = mbar_test(full(), ring.parity());
        ring.count--;
    }

    /// Waits until the other warpgroup has issued its products.
    __device__ __forceinline__ void take_turn() {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(CONSUMERS) : "memory");
    }
    __device__ __forceinline__ void pass_turn() {
        asm volatile("bar.arrive %0, %1;" ::"r"(2 - group), "n"(CONSUMERS) : "memory");
    }

    /// O and its sums, worth `by` now, take in `part`.
    __device__ __forceinline__ void accumulate(const float (&by)[2]) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = fmaf(o[i], by[i / 2 % 2], part[i]);
        // Only the first lane of four has the sums: column D.
        sum[0] = fmaf(sum[0], by[0], part[D / 2]);
        sum[1] = fmaf(sum[1], by[1], part[D / 2 + 2]);
    }

    /// P in the A operand's layout: V's keys are stored in the matching order.
    __device__ __forceinline__ void pack(Scores &scores) {
        pin_registers(p);
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            const int at = i / 2 * 8 + i % 2 * 2;
            p[i] = e4m3x4(as_float(scores[at]), as_float(scores[at + 1]),
                          as_float(scores[at + 4]), as_float(scores[at + 5]));
        }
    }

    __device__ __forceinline__ void finish(const Item &item) {
        const int batch = item.head / a.heads, head = item.head % a.heads;
        const int row = this->row(), lane = this->lane();
        const u32 amax = PLACE(v_amax) + q_slot * (D * 4) + lane % 4 * 8;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float l = __shfl_sync(FULL, sum[r], lane & ~3);
            const int token = item.q_block * BLOCK_Q + row + 8 * r;
            if (token >= a.qo_len) continue;
            const float by = l == 0.f ? 0.f : 1.f / (448.f * l);
            u32 *to = reinterpret_cast<u32 *>(
                static_cast<u16 *>(a.o) + batch * a.os.batch + head * a.os.head +
                token * a.os.token) + lane % 4;
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                to[4 * i] =
                    Half2<T>::pack(o[4 * i + 2 * r] * by * as_float(word(amax + 32 * i)),
                                   o[4 * i + 2 * r + 1] * by * as_float(word(amax + 32 * i + 4)));
            }
            if (a.lse && lane % 4 == 0) {
                // Scores were taken of K less its mean.
                const float shift = a.q_shift[(static_cast<i64>(item.head) * a.q_blocks +
                                               item.q_block) * BLOCK_Q + row + 8 * r];
                const float lse =
                    (running[r] + shift + lg2(l) - SCALE_LOG2) * 0.69314718055994531f;
                a.lse[static_cast<i64>(item.head) * a.qo_len + token] =
                    l == 0.f ? as_float(0xff800000u) : lse;
            }
        }
    }

    /// All tiles of an item; `scores` holds those of the first, whose flags are given.
    __device__ __forceinline__ void tiles(Scores &scores, int flags) {
        bool is_first = true;
        while (true) {
            const float before[2] = {alpha[0], alpha[1]};
            softmax(scores, flags);
            wgmma_wait<0>();
            pin_registers(part);
            if (!is_first) {
                mbar_arrive(empty((ring.count - 1) % STAGES));
                accumulate(before);
            }
            const u32 slot = uniform(ring.slot()), next = uniform((ring.count + 1) % STAGES);
            pack(scores);
            pin_registers(p);
            if (flags & LAST) break;
            ring.next();
            take_turn();
            flags = issue_qk(scores, next);
            issue_pv(slot);
            pass_turn();
            look_ahead();
            wgmma_wait<1>();
            pin_registers(scores);
            is_first = false;
        }
        issue_pv(ring.slot());
        wgmma_wait<0>();
        pin_registers(part);
        mbar_arrive(empty(ring.slot()));
        accumulate(alpha);
        ring.next();
    }

    __device__ __forceinline__ void run() {
        if (group == 1) pass_turn();
        while (true) {
            mbar_wait(full(), ring.parity());
            int index = word(tile(ring.slot()));
            if (index < 0) break;
            q_slot = uniform(q_ring.slot());
            mbar_wait(PLACE(q_full) + 8 * q_slot, q_ring.parity());
            begin();
            Scores scores;
            const int flags = issue_qk(scores, ring.slot());
            look_ahead();
            wgmma_wait<0>();
            pin_registers(scores);
            tiles(scores, flags);
            asm volatile("" : "+r"(index));  // not to keep through the tiles what `finish` makes of it
            finish(Item(a, index));
            mbar_arrive(PLACE(q_empty) + 8 * q_slot);
            q_ring.next();
        }
    }
#undef PLACE
};

template <int D, class T, int STAGES>
__global__ void __launch_bounds__(384, 1) attend_sm90(const __grid_constant__ Args a) {
    static_assert(sizeof(Smem<D, STAGES>) <= SPARGE_SHARED_BYTES, "src/spec.rs");
    extern __shared__ __align__(1024) u8 raw[];
    auto &s = *reinterpret_cast<Smem<D, STAGES> *>(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbar_init(shared_address(&s.full[i]), 1);
            mbar_init(shared_address(&s.empty[i]), CONSUMERS);
        }
        for (int i = 0; i < Q_STAGES; i++) {
            mbar_init(shared_address(&s.q_full[i]), 1);
            mbar_init(shared_address(&s.q_empty[i]), CONSUMERS);
        }
        mbar_init_fence();
    }
    for (int i = threadIdx.x; i < STAGES * 2 * 8 * BLOCK_KV; i += blockDim.x) {
        const int tile = i / (8 * BLOCK_KV), at = i % (8 * BLOCK_KV);
        s.v[tile / 2][tile % 2][D * BLOCK_KV + at] = at < BLOCK_KV ? 0x38 : 0;  // 1.0 in e4m3
    }
    shared_fence();
    __syncthreads();
    wait_for_predecessor();
    if (threadIdx.x >= CONSUMERS) {
        registers_down<24>();
        if (threadIdx.x == CONSUMERS) produce<D, STAGES>(a, s);
    } else {
        registers_up<240>();
        u32 base = shared_address(raw);
        asm volatile("" : "+r"(base));
        Consumer<D, T, STAGES>(a, __shfl_sync(FULL, base, 0)).run();
    }
}

}  // namespace sparge
