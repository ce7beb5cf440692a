// The choice of a query block's key blocks by their masses, for both paths' selections.
//
// The smallest mass to keep is found by bisection: the largest threshold whose blocks reach the mass and
// the count that were asked for. No sort.
#pragma once
#include "sparge/types.cuh"
#include "sparge/ptx/math.cuh"

namespace sparge {

// What stands in a mass's place.
constexpr float NO_MASS = -1.f;      // not to be kept
constexpr float APART_MASS = -2.f;   // kept, apart from the budget
constexpr float FORCED_MASS = -3.f;  // kept, counted in the budget

/// How many of `reachable` blocks a share of them is: the ceiling, where a product that is whole
/// up to rounding counts as that number.
__device__ __forceinline__ int count_of(double share, int reachable) {
    if (!(share > 0.)) return 1;
    const double exact = share * reachable, near = rint(exact);
    const double count = fabs(exact - near) <= 1e-6 * reachable ? near : ceil(exact);
    return max(1, min(reachable, static_cast<int>(count)));
}

/// Of the masses that `is_in` takes: how many (`forced` more), and their sum (`forced_mass` more).
template <class Sum, class IsIn>
__device__ __forceinline__ int sum_where(const float *mass, int n, int forced, Sum forced_mass, Sum &sum,
                                         const IsIn &is_in) {
    int count = 0;
    sum = 0;
    for (int j = threadIdx.x % 32; j < n; j += 32)
        if (is_in(mass[j])) {
            count++;
            sum += mass[j];
        }
    sum = forced_mass + warp_sum(sum);
    return forced + static_cast<int>(__reduce_add_sync(FULL, count));
}

/// Writes the mask words of one query block of `n` key blocks: the forced blocks (whose number and mass
/// are given), then others in descending mass until all of them are at least `at_least` and have the mass
/// `cdf`; with `all` every block. A warp, which sees `mass`.
template <class Sum>
__device__ __forceinline__ void choose_blocks(const float *mass, int n, int at_least, Sum cdf, int forced,
                                              Sum forced_mass, bool all, u32 *words, int mask_words) {
    const int lane = threadIdx.x % 32;
    Sum sum;
    // As bits: masses are not negative.
    u32 low = 0, high = 0x40000000u;
    while (!all && high - low > 1) {
        const u32 middle = (low + high) / 2;
        const float threshold = as_float(middle);
        const int count =
            sum_where(mass, n, forced, forced_mass, sum, [&](float m) { return m >= threshold; });
        if (count >= at_least && sum >= cdf) low = middle; else high = middle;
    }
    // Of the blocks at the threshold itself, the first ones, as many as are needed.
    const float threshold = as_float(low);
    const int above =
        sum_where(mass, n, forced, forced_mass, sum, [&](float m) { return m > threshold; });
    int ties = max(0, at_least - above);
    if (low == 0) ties = sum >= cdf ? ties : n;
    else if (sum < cdf) ties = max(ties, static_cast<int>(ceil(static_cast<double>((cdf - sum) / threshold))));
    int seen = 0;
    for (int w = 0; w < mask_words; w++) {
        const int j = 32 * w + lane;
        const float m = j < n ? mass[j] : NO_MASS;
        const u32 equal = __ballot_sync(FULL, m == threshold);
        const int before = seen + __popc(equal & ((1u << lane) - 1));
        seen += __popc(equal);
        const bool keep = j < n && (all || m > threshold || (m == threshold && before < ties) ||
                                    m == APART_MASS || m == FORCED_MASS);
        const u32 word = __ballot_sync(FULL, keep);
        if (lane == 0) words[w] = word;
    }
}

}  // namespace sparge
