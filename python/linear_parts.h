// What the parts of fused application on the CPU share, for the instruction set that the including file is compiled for.
#pragma once

#include <atomic>
#include <type_traits>

#include "linear_cpu.h"
#include "linear_dot.h"
#include "threads.h"

namespace fusedmerge {
namespace {

constexpr int kTileOfRows = 4;
constexpr int kUnitRows = 16;              // of W, or of A: what a thread takes at a time
constexpr int64_t kThreadBytes = 1 << 17;  // of a matrix: less is not worth waking a thread

// Calls f(i, worker) for every i < count, on up to `threads` threads; `bytes` are read in all.
template <class F>
void for_each(int64_t count, int64_t bytes, int threads, const F& f) {
    const int64_t useful = std::min<int64_t>(count, 1 + bytes / kThreadBytes);
    std::atomic<int64_t> next{0};
    run_on_threads(static_cast<int>(std::min<int64_t>(threads, useful)), [&](int worker) {
        const DefaultFloatEnvironment environment;
        for (int64_t i = next++; i < count; i = next++) f(i, worker);
    });
}

// A slot that a token uses: an id in [0, N), a gate that is not 0.
struct Slot {
    int id;
    float gate;
};

Slot slot_of(const LinearParams& params, const LinearTarget& target, int token, int j) {
    const int64_t place = (static_cast<int64_t>(target.routing) * params.tokens + token) * params.num_slots + j;
    const int id = params.ids[place];
    const bool exists = id >= 0 && id < params.num_adapters && target.rank > 0;
    return {id, exists ? params.gates[place] : 0.0f};
}

// gate * scaling; 0: the slot adds nothing.
inline float scale_of(const LinearTarget& target, const Slot& slot) {
    return slot.gate != 0 && target.scaling != nullptr ? slot.gate * target.scaling[slot.id] : slot.gate;
}

// z = scale * from, r ranks, padded.
inline void scale_ranks(float* z, const float* from, int64_t rank, float scale) {
    for (int64_t r = 0; r < rank; ++r) z[r] = scale * from[r];
    std::fill(z + rank, z + pad(rank), 0.0f);
}

// Calls f(rows, first) for tiles of kTileOfRows rows, then for the rows that are left.
template <class F>
inline void for_rows(int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + kTileOfRows <= count; i += kTileOfRows) f(std::integral_constant<int, kTileOfRows>{}, i);
    for (; i < count; ++i) f(std::integral_constant<int, 1>{}, i);
}

// z[i] = row i of A times x, i < count.
template <class Fmt>
void shrink(float* z, const typename Fmt::Bits* a, int64_t stride, const float* x, int64_t cols, int64_t count) {
    for (int64_t first = 0; first < count; first += kUnitRows) {
        VFloat sums[kUnitRows] = {};
        const int64_t rows_left = std::min<int64_t>(kUnitRows, count - first);
        for_rows(rows_left, [&](auto rows, int64_t i) { add_rows<Fmt, rows>(sums + i, a + (first + i) * stride, stride, x, cols); });
        sums_of(z + first, sums, rows_left);
    }
}

// B of an adapter that a token takes, and gate scaling z.
template <class Bits>
struct Taken {
    const Bits* b;
    const float* z;  // [pad(r)]
};

// sums[i] += row first + i of B z, of all adapters that a token takes.
template <class Fmt>
inline void add_taken(VFloat* sums, const LinearTarget& target, const Taken<typename Fmt::Bits>* taken, size_t num_taken, int64_t first,
                      int64_t count) {
    const int64_t stride = target.b_row_stride;
    for (size_t j = 0; j < num_taken; ++j) {
        for_rows(count, [&](auto rows, int64_t i) {
            add_rows<Fmt, rows>(sums + i, taken[j].b + (first + i) * stride, stride, taken[j].z, target.rank);
        });
    }
}

}  // namespace
}  // namespace fusedmerge
