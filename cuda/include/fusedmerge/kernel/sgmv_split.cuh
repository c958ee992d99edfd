// gate scaling z as the expand's tensor cores take it: two 16-bit values for each float32.
//
// A pair's z is scaled, for each kManyRanks ranks, by the power of two that brings the largest of them to [2^14, 2^15): neither half
// leaves a 16-bit type's range, and high + low is z to 2^-18 (bf16). It takes the bytes of float32, and is done once for a pair, by the
// shrink or the sum: the expand's strips of columns find operands of mma.
//
//   rank 4t, 4t + 1 | 4t + 2, 4t + 3 |      16 bytes: a lane's fragment of 16 rows, 8 for the high halves of 8 pairs, 8 for the low ones
//   high, low       | high, low      |
#pragma once

#include "sgmv_params.cuh"
#include "tile.cuh"

namespace fusedmerge {

FM_DEVICE int rank_of(const SgmvTarget& target, int expert) { return target.ranks != nullptr ? target.ranks[expert] : target.rank; }
FM_DEVICE int padded_rank(int rank) { return (rank + kRankStep - 1) / kRankStep * kRankStep; }
FM_DEVICE float scaling_of(const SgmvTarget& target, int expert) { return target.scaling != nullptr ? target.scaling[expert] : 1.0f; }

FM_DEVICE float larger(float x, float y) { return x > y ? x : y; }
FM_DEVICE float larger_of_lanes(float x, int mask) { return larger(x, bits_to_float(shuffle_xor(float_to_bits(x), mask))); }

// A gate of zero adds nothing, whatever z holds.
FM_DEVICE float gated(float gate, float z) { return gate != 0.0f ? multiply(gate, z) : 0.0f; }

// The power of two that brings `size` to [2^14, 2^15), within float32's range; and its inverse.
FM_DEVICE void find_scales(float size, float& scale, float& inverse) {
    const int exponent = static_cast<int>(float_to_bits(size) >> 23);
    const int field = 127 + 14 + 127 - exponent < 253 ? 127 + 14 + 127 - exponent : 253;
    scale = bits_to_float(static_cast<unsigned>(field) << 23);
    inverse = bits_to_float(static_cast<unsigned>(254 - field) << 23);
}

// high + low = the values, to twice a 16-bit type's precision.
template <class Number>
FM_DEVICE void split_pair(unsigned& high, unsigned& low, float x, float y, Number number) {
    float rounded_x, rounded_y;
    high = narrow_pair(x, y, number);
    widen_pair(rounded_x, rounded_y, high, number);
    low = narrow_pair(add(x, -rounded_x), add(y, -rounded_y), number);
}

}  // namespace fusedmerge
