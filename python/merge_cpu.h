// Merge on the CPU, one call for every matrix of a switch:
//
//     live = round(source + sum_e c_e B_e A_e)          c = gate * scaling, one rounding to the weight's dtype
//
//   | operand        | shape        | layout                                              |
//   | live, source   | [rows, cols] | row-major with a row stride; live may be source     |
//   | a of expert e  | [rank, cols] | row-major with a row stride                         |
//   | b of expert e  | [rows, rank] | row-major with a row stride                         |
//
// Pipeline: segments are cut into units of kUnitRows x kUnitCols -> threads take the next unit from one counter -> a unit packs its piece
// of A and B -> strips of B A stay in cache in float32 -> each strip is added to the source rows and rounded into the live rows. Memory
// sees source (read), live (write) and the factors. No element's sum depends on the unit, the strip or the thread that computed it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusedmerge {

constexpr int64_t kUnitRows = 192;          // a multiple of every variant's tile rows (6 and 32)
constexpr int64_t kUnitCols = 512;          // a multiple of every variant's tile columns (at most 64)
constexpr int64_t kDepthAlign = 32;         // ranks are padded to this in workspaces: the depth of one AMX tile
constexpr int64_t kStripRows = 32;          // the most rows of a strip in any variant
constexpr int64_t kPitch = kUnitCols + 16;  // between a strip's rows: a power of two would put them all in two sets of the cache

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Expert {
    const void* a;      // [rank, cols]
    const void* b;      // [rows, rank]
    int64_t a_stride;   // elements between rows
    int64_t b_stride;   // elements between rows
    int64_t rank;       // >= 0
    float coefficient;  // gate * scaling
    Dtype dtype;        // of a and b
};

struct Segment {
    void* live;                   // [rows, cols]
    const void* source;           // [rows, cols]
    int64_t rows, cols;           // elements
    int64_t live_stride;          // elements between rows
    int64_t source_stride;        // elements between rows
    Dtype dtype;                  // of live and source
    std::vector<Expert> experts;  // none: the source's bits are copied
};

// One piece of a segment: rows [row, row + rows), columns [col, col + cols).
struct Unit {
    const Segment* segment;
    int64_t row, col;
    int64_t rows, cols;  // <= kUnitRows, kUnitCols
};

// Merges one unit of a segment that has experts; `workspace` is 64-byte aligned, and nobody else's.
using MergeUnit = void (*)(const Unit& unit, std::byte* workspace);

void merge_unit_portable(const Unit& unit, std::byte* workspace);
void merge_unit_avx2(const Unit& unit, std::byte* workspace);
void merge_unit_avx512(const Unit& unit, std::byte* workspace);
void merge_unit_amx(const Unit& unit, std::byte* workspace);  // bfloat16 factors; others as avx512

// Runs a whole switch on at most `threads` threads, the caller's among them. Throws std::bad_alloc before any write.
void merge_cpu(std::vector<Segment> segments, int threads, MergeUnit merge);

}  // namespace fusedmerge
