// The merge of one unit with AMX tiles, for bfloat16 factors: their products are exact in float32, so nothing is narrowed.
//
//     delta [rows, cols] = sum_e c_e (B_e A_e)          a tile sums one expert in float32; c_e is applied to the sum, in float32
//
//   packed a   [panels, depth / 2, kTile, 2]   bfloat16, pairs of rows interleaved: the layout of tdpbf16ps's second operand
//   packed b   [kUnitRows, depth]              bfloat16
//   sums       [kStrip, kStrip]                float32, four tiles of one expert
//   delta      [kStrip, kUnitCols]             float32, one strip, rows kPitch apart
//   depth: all experts' ranks, each padded with zeros to kDepthAlign
//
// Tiles flush subnormals. So a unit runs the float32 variant unless every value of its factors is 0 or within 2^-50 .. 2^51: then no
// product is subnormal, no sum is (all are multiples of 2^-114), and none overflows. Infinities and NaN take that path too.
// Follows TDPBF16PS in Intel's Architecture Instruction Set Extensions reference.
#include <immintrin.h>

#include "vec.h"

namespace fusedmerge {
namespace {

constexpr int kTile = 16;       // rows of a tile, and its float32 columns
constexpr int kTileDepth = 32;  // its bfloat16 columns
constexpr int kStrip = 2 * kTile;
static_assert(kTileDepth == kDepthAlign && kUnitRows % kStrip == 0 && kUnitCols % kStrip == 0 && kLanes == kTile);

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Whether any bfloat16 value seen was outside the range that tiles handle like float32.
class RangeCheck {
  public:
    void see(VUint pairs) { outside_ |= outside(pairs & 0xffff0000) | outside(pairs << 16); }
    bool failed() const { return _mm512_test_epi32_mask(bit_cast<__m512i>(outside_), bit_cast<__m512i>(outside_)) != 0; }

  private:
    static VUint outside(VUint value) {
        constexpr uint32_t kLeast = (127 - 50) << 23, kEnd = (127 + 51) << 23;
        const VUint magnitude = value & 0x7fffffff;
        return VUint(magnitude - kLeast >= kEnd - kLeast) & VUint(magnitude != 0);
    }
    VUint outside_ = {};
};

// kLanes values of a row, zero from `count` on.
inline VUint load_row(const uint16_t* from, int64_t count) {
    const __mmask16 mask = count >= kLanes ? 0xffff : (1u << count) - 1;
    return bit_cast<VUint>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)));
}

inline void pack_a(uint32_t* packed, int64_t depth, const Unit& unit, const Expert& e, RangeCheck& check) {
    const auto* a = static_cast<const uint16_t*>(e.a) + unit.col;
    for (int64_t r = 0; r < round_up(e.rank, kTileDepth); r += 2) {
        for (int64_t col = 0; col < round_up(unit.cols, kStrip); col += kLanes) {
            const int64_t count = col < unit.cols ? unit.cols - col : 0;
            const VUint even = r < e.rank ? load_row(a + r * e.a_stride + col, count) : VUint{};
            const VUint odd = r + 1 < e.rank ? load_row(a + (r + 1) * e.a_stride + col, count) : VUint{};
            const VUint pairs = even | odd << 16;
            check.see(pairs);
            store(packed + col * depth / 2 + r / 2 * kTile, pairs);
        }
    }
}

inline void pack_b(uint16_t* packed, int64_t depth, const Unit& unit, const Expert& e, RangeCheck& check) {
    const auto* b = static_cast<const uint16_t*>(e.b) + unit.row * e.b_stride;
    for (int64_t row = 0; row < round_up(unit.rows, kStrip); ++row) {
        for (int64_t k = 0; k < round_up(e.rank, kTileDepth); k += kLanes) {
            const int64_t count = row < unit.rows && k < e.rank ? e.rank - k : 0;
            const VUint values = count > 0 ? load_row(b + row * e.b_stride + k, count) : VUint{};
            check.see(values);
            narrow_bits(packed + row * depth + k, values);
        }
    }
}

// sums [kStrip, kStrip] = b [kStrip, rank] a [rank, kStrip], a slice of the packed depth; tiles 0..3 sum, 4..5 hold b, 6..7 hold a.
inline void multiply_tiles(float* sums, const uint16_t* b, const uint32_t* a, int64_t depth, int64_t rank) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < rank; k += kTileDepth) {
        _tile_loadd(4, b + k, depth * sizeof(*b));
        _tile_loadd(5, b + k + kTile * depth, depth * sizeof(*b));
        _tile_loadd(6, a + k / 2 * kTile, kTile * sizeof(*a));
        _tile_loadd(7, a + (depth + k) / 2 * kTile, kTile * sizeof(*a));
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    constexpr int kStride = kStrip * sizeof(*sums);
    _tile_stored(0, sums, kStride);
    _tile_stored(1, sums + kTile, kStride);
    _tile_stored(2, sums + kTile * kStrip, kStride);
    _tile_stored(3, sums + kTile * kStrip + kTile, kStride);
}

// delta [kStrip, kStrip] (rows kPitch apart) = scale * sums, or += from the second expert on.
inline void accumulate(float* delta, const float* sums, float scale, bool first) {
    for (int i = 0; i < kStrip; ++i) {
        for (int j = 0; j < kStrip; j += kLanes) {
            const VFloat scaled = load<VFloat>(sums + i * kStrip + j) * scale;
            float* to = delta + i * kPitch + j;
            store(to, first ? scaled : load<VFloat>(to) + scaled);
        }
    }
}

}  // namespace

void merge_unit_amx(const Unit& unit, std::byte* workspace) {
    const std::vector<Expert>& experts = unit.segment->experts;
    int64_t depth = 0;
    for (const Expert& e : experts) {
        if (e.dtype != Dtype::kBFloat16) return merge_unit_avx512(unit, workspace);
        depth += round_up(e.rank, kTileDepth);
    }
    float* delta = reinterpret_cast<float*>(workspace);
    uint32_t* a = reinterpret_cast<uint32_t*>(delta + kStrip * kPitch);
    uint16_t* b = reinterpret_cast<uint16_t*>(a + depth / 2 * kUnitCols);
    RangeCheck check;
    int64_t k = 0;
    for (const Expert& e : experts) {
        pack_a(a + k / 2 * kTile, depth, unit, e, check);
        pack_b(b + k, depth, unit, e, check);
        k += round_up(e.rank, kTileDepth);
    }
    if (check.failed()) return merge_unit_avx512(unit, workspace);

    alignas(64) float sums[kStrip * kStrip];
    const TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t row = 0; row < unit.rows; row += kStrip) {
        for (int64_t col = 0; col < unit.cols; col += kStrip) {
            k = 0;
            for (const Expert& e : experts) {
                const int64_t rank = round_up(e.rank, kTileDepth);
                multiply_tiles(sums, b + row * depth + k, a + (col * depth + k * kTile) / 2, depth, rank);
                accumulate(delta + col, sums, e.coefficient, k == 0);
                k += rank;
            }
        }
        add_strip(unit, row, unit.rows - row < kStrip ? unit.rows - row : kStrip, delta);
    }
    _tile_release();
}

}  // namespace fusedmerge
