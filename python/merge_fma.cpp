// The float32 variants of the merge of one unit; compiled once per instruction set, with FUSEDMERGE_MERGE_UNIT naming the entry point.
//
//     delta [rows, cols] = B [rows, K] A [K, cols]      K = all experts' ranks in ascending |c|, c folded into the float32 copy of B
//
//   packed a   [panels, K, kPanel]      float32, zero beyond the last column
//   packed b   [kUnitRows, K]           float32, zero beyond the last row
//   delta      [kTileRows, kUnitCols]   float32, one strip, rows kPitch apart
//
// A register tile is kTileRows x kVecs vectors: each step of K loads kVecs vectors of A, and broadcasts one value of B per row.
#include "vec.h"

namespace fusedmerge {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVecs = 4;  // 32 registers: 24 sums, 4 of A, 1 of B
#else
constexpr int kVecs = 2;  // 16 registers: 12 sums, 2 of A, 1 of B
#endif
constexpr int kTileRows = 6;
constexpr int kPanel = kVecs * kLanes;
static_assert(kUnitRows % kTileRows == 0 && kUnitCols % kPanel == 0);

// The unit's columns of one expert's A, from row `k` of the packed [panels, depth, kPanel] on.
template <class Fmt>
inline void pack_a(float* packed, int64_t depth, int64_t k, const Unit& unit, const Expert& e) {
    for (int64_t r = 0; r < e.rank; ++r) {
        const auto* row = static_cast<const typename Fmt::Bits*>(e.a) + r * e.a_stride + unit.col;
        for (int64_t col = 0; col < unit.cols; col += kPanel) {
            float* to = packed + col * depth + (k + r) * kPanel;
            const int64_t count = unit.cols - col < kPanel ? unit.cols - col : kPanel;
            widen_row<Fmt>(to, row + col, count, 1.0f);
            std::memset(to + count, 0, (kPanel - count) * sizeof(float));
        }
    }
}

template <class Fmt>
inline void pack_b(float* packed, int64_t depth, int64_t k, const Unit& unit, const Expert& e) {
    for (int64_t row = 0; row < unit.rows; ++row) {
        const auto* from = static_cast<const typename Fmt::Bits*>(e.b) + (unit.row + row) * e.b_stride;
        widen_row<Fmt>(packed + row * depth + k, from, e.rank, e.coefficient);
    }
}

// out [kTileRows, kPanel] (rows kPitch apart) = b [kTileRows, depth] a [depth, kPanel]
inline void multiply_tile(float* out, const float* b, const float* a, int64_t depth) {
    VFloat sum[kTileRows][kVecs] = {};
    for (int64_t k = 0; k < depth; ++k) {
        VFloat a_k[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) a_k[v] = load<VFloat>(a + k * kPanel + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i) {
            const float b_k = b[i * depth + k];
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sum[i][v] += b_k * a_k[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) store(out + i * kPitch + v * kLanes, sum[i][v]);
    }
}

}  // namespace

void FUSEDMERGE_MERGE_UNIT(const Unit& unit, std::byte* workspace) {
    int64_t depth = 0;
    for (const Expert& e : unit.segment->experts) depth += e.rank;

    float* a = reinterpret_cast<float*>(workspace);
    float* delta = a + depth * kUnitCols;
    float* b = delta + kTileRows * kPitch;
    int64_t k = 0;
    for (const Expert& e : unit.segment->experts) {
        with_format(e.dtype, [&](auto format) {
            pack_a<decltype(format)>(a, depth, k, unit, e);
            pack_b<decltype(format)>(b, depth, k, unit, e);
        });
        k += e.rank;
    }
    const int64_t padded_rows = (unit.rows + kTileRows - 1) / kTileRows * kTileRows;
    std::memset(b + unit.rows * depth, 0, (padded_rows - unit.rows) * depth * sizeof(float));

    for (int64_t row = 0; row < unit.rows; row += kTileRows) {
        for (int64_t col = 0; col < unit.cols; col += kPanel) {
            multiply_tile(delta + col, b + row * depth, a + col * depth, depth);
        }
        add_strip(unit, row, unit.rows - row < kTileRows ? unit.rows - row : kTileRows, delta);
    }
}

}  // namespace fusedmerge
