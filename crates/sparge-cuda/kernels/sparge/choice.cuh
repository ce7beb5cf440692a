// The choice of a query block's key blocks by their masses, for both paths' selections.
//
// The smallest mass to keep is found by bisection: the largest threshold whose blocks reach the mass and
// the count that were asked for. Every step goes on to the nearest mass, so that a dozen do where halving
// all floats would take 30. No sort.
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

/// Writes the mask words of one query block of `n` key blocks: the forced blocks (whose number and mass
/// are given), then others in descending mass until all of them are at least `at_least` and have the mass
/// `cdf`; with `all` every block. A warp, which sees `mass`.
template <class Sum>
__device__ __forceinline__ void choose_blocks(const float *mass, int n, int at_least, Sum cdf, int forced,
                                              Sum forced_mass, bool all, u32 *words, int mask_words) {
    const int lane = threadIdx.x % 32;
    // As bits: masses are not negative, and what stands in their place is.
    int low = 0, high = 0x40000000;
    while (!all && high - low > 1) {
        const int middle = low + (high - low) / 2;
        const float threshold = as_float(middle);
        int count = 0, next = high - 1, last = low;  // the masses nearest to it, above and below
        Sum sum = 0;
        for (int j = lane; j < n; j += 32) {
            const float m = mass[j];
            const int bits = static_cast<int>(as_bits(m));
            if (m >= threshold) {
                count++;
                sum += m;
                next = min(next, bits);
            } else {
                last = max(last, bits);
            }
        }
        const bool enough = forced + static_cast<int>(__reduce_add_sync(FULL, count)) >= at_least &&
                            forced_mass + warp_sum(sum) >= cdf;
        // What holds for it holds as far as no mass comes between.
        if (enough) low = __reduce_min_sync(FULL, next);
        else high = min(middle, __reduce_max_sync(FULL, last) + 1);
    }
    // Of the blocks at the threshold itself, the first ones, as many as are needed.
    const float threshold = as_float(low);
    int above = 0;
    Sum sum = 0;
    for (int j = lane; j < n; j += 32)
        if (mass[j] > threshold) {
            above++;
            sum += mass[j];
        }
    above = forced + static_cast<int>(__reduce_add_sync(FULL, above));
    sum = forced_mass + warp_sum(sum);
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
