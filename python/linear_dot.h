// Dot products of rows of 16-bit numbers with tokens, in vectors of float32, of the instruction set that the including file is compiled
// for.
//
//   tokens   rows of float32, or of bfloat16 where pairs of those are multiplied in one instruction; padded with zeros
//   sums     a vector for each row and token: two chains of each at a time, so that additions do not wait for one another
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "vec.h"

namespace fusedmerge {
namespace {

constexpr int kBlock = 2 * kLanes;    // columns that tokens are padded to: of a vector of 16-bit values
constexpr int64_t kChainCols = 1024;  // columns of a chain

int64_t pad(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

// Aligned memory, whose values nobody expects anything of.
template <class T>
class Array {
  public:
    explicit Array(int64_t count) : begin_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}))) {}
    T* get() const { return begin_.get(); }

  private:
    struct Delete {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<T, Delete> begin_;
};
using Floats = Array<float>;

// Fewer than kLanes values, zeros after them.
template <class Fmt>
inline VFloat widen_some(const typename Fmt::Bits* from, int64_t count) {
    typename Fmt::Bits some[kLanes] = {};
#if defined(__AVX512BW__)
    if constexpr (sizeof(*some) == 2) {
        store(some, _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from));
        return Fmt::widen(some);
    }
#endif
    std::memcpy(some, from, count * sizeof(*some));
    return Fmt::widen(some);
}

// `to` up to the next multiple of kBlock: the values, then zeros.
template <class Fmt>
inline void widen_padded(float* to, const typename Fmt::Bits* from, int64_t count) {
    widen_row<Fmt>(to, from, count, 1.0f);
    std::fill(to + count, to + pad(count), 0.0f);
}

template <class Fmt>
inline void narrow_some(typename Fmt::Bits* to, const float* from, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Fmt::narrow(to + i, load<VFloat>(from + i));
    if (i == count) return;
    float some[kLanes] = {};
    typename Fmt::Bits bits[kLanes];
    std::memcpy(some, from + i, (count - i) * sizeof(float));
    Fmt::narrow(bits, load<VFloat>(some));
    std::memcpy(to + i, bits, (count - i) * sizeof(*bits));
}

template <class Fmt>
inline VFloat rounded(VFloat x) {
    typename Fmt::Bits bits[kLanes];
    Fmt::narrow(bits, x);
    return Fmt::widen(bits);
}

// One tree for all lanes, whatever the compiler makes of it.
inline float sum_of(VFloat x) {
    float lanes[kLanes];
    store(lanes, x);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

// out[i] = sum_of(sums[i]), by the same tree.
inline void sums_of(float* out, const VFloat* sums, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    // Sixteen at once: a level of the tree puts two vectors of n groups of 2 width lanes into one of 2 n groups of `width`.
    struct Level {
        int low[kLanes], high[kLanes];
        constexpr explicit Level(int width) : low(), high() {
            for (int lane = 0; lane < kLanes; ++lane) {
                low[lane] = lane / width * 2 * width + lane % width;
                high[lane] = low[lane] + width;
            }
        }
    };
    static constexpr Level kLevels[] = {Level(8), Level(4), Level(2), Level(1)};
    for (; i + kLanes <= count; i += kLanes) {
        VFloat parts[kLanes];
        std::copy_n(sums + i, kLanes, parts);
        int num_parts = kLanes;
        for (const Level& level : kLevels) {
            const __m512i low = load<__m512i>(level.low), high = load<__m512i>(level.high);
            num_parts /= 2;
            for (int p = 0; p < num_parts; ++p) {
                const __m512 first = bit_cast<__m512>(parts[2 * p]), second = bit_cast<__m512>(parts[2 * p + 1]);
                parts[p] = bit_cast<VFloat>(_mm512_permutex2var_ps(first, low, second)) +
                           bit_cast<VFloat>(_mm512_permutex2var_ps(first, high, second));
            }
        }
        store(out + i, parts[0]);
    }
#endif
    for (; i < count; ++i) out[i] = sum_of(sums[i]);
}

inline VFloat at(const float* x, int64_t i) { return load<VFloat>(x + i); }

// Calls f(i) for the first column of each vector of a padded row.
template <class F>
inline void each_vector(int64_t cols, const F& f) {
    for (int64_t i = 0; i < pad(cols); i += kLanes) f(i);
}

// What W is multiplied with: float32, or 16-bit values where a dot product of those is one instruction.
template <class Fmt>
struct TokenOf {
    using Type = float;
};
#if defined(__AVX512BF16__)
template <>
struct TokenOf<Format<Dtype::kBFloat16>> {
    using Type = uint16_t;
};
#endif
template <class Token>
constexpr int kVectorCols = kLanes * 4 / static_cast<int>(sizeof(Token));

// chain[i][t] += row i times token t: a vector of columns, or the `count` that are left.
template <class Fmt, int kRows, int kTokens>
__attribute__((always_inline)) inline void add_vector(VFloat (&chain)[kRows][kTokens], const typename Fmt::Bits* rows, int64_t stride,
                                                      const float* tokens, int64_t pitch, int64_t count) {
    VFloat x[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) x[t] = at(tokens, t * pitch);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        const VFloat w = count == kLanes ? Fmt::widen(rows + i * stride) : widen_some<Fmt>(rows + i * stride, count);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) chain[i][t] += w * x[t];
    }
}

#if defined(__AVX512BF16__)
// The same for pairs of bfloat16: two fused multiply-adds in a lane, of which each is rounded; subnormal numbers count as 0.
template <class Fmt, int kRows, int kTokens>
__attribute__((always_inline)) inline void add_vector(VFloat (&chain)[kRows][kTokens], const uint16_t* rows, int64_t stride,
                                                      const uint16_t* tokens, int64_t pitch, int64_t count) {
    __m512i x[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) x[t] = load<__m512i>(tokens + t * pitch);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        const uint16_t* row = rows + i * stride;
        const __m512i w = count == 2 * kLanes ? load<__m512i>(row) : _mm512_maskz_loadu_epi16((1u << count) - 1, row);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
            chain[i][t] =
                bit_cast<VFloat>(_mm512_dpbf16_ps(bit_cast<__m512>(chain[i][t]), bit_cast<__m512bh>(w), bit_cast<__m512bh>(x[t])));
        }
    }
}
#endif

// sums[i][t] += row i times token t, at most kChainCols columns.
template <class Fmt, int kRows, int kTokens, class Token>
inline void add_chain(VFloat* sums, int64_t sums_pitch, const typename Fmt::Bits* rows, int64_t stride, const Token* tokens, int64_t pitch,
                      int64_t cols) {
    constexpr int kCols = kVectorCols<Token>;
    VFloat even[kRows][kTokens] = {}, odd[kRows][kTokens] = {};
    int64_t col = 0;
    for (; col + 2 * kCols <= cols; col += 2 * kCols) {
        add_vector<Fmt>(even, rows + col, stride, tokens + col, pitch, kCols);
        add_vector<Fmt>(odd, rows + col + kCols, stride, tokens + col + kCols, pitch, kCols);
    }
    if (col + kCols <= cols) {
        add_vector<Fmt>(even, rows + col, stride, tokens + col, pitch, kCols);
        col += kCols;
    }
    if (col < cols) add_vector<Fmt>(odd, rows + col, stride, tokens + col, pitch, cols - col);
    for (int i = 0; i < kRows; ++i) {
        for (int t = 0; t < kTokens; ++t) sums[i * sums_pitch + t] += even[i][t] + odd[i][t];
    }
}

// sums[i] += row i times one token, any number of columns.
template <class Fmt, int kRows>
inline void add_rows(VFloat* sums, const typename Fmt::Bits* rows, int64_t stride, const float* token, int64_t cols) {
    for (int64_t col = 0; col < cols; col += kChainCols) {
        add_chain<Fmt, kRows, 1>(sums, 1, rows + col, stride, token + col, 0, std::min(kChainCols, cols - col));
    }
}

template <class Fmt>
inline float dot(const typename Fmt::Bits* row, const float* x, int64_t cols) {
    VFloat sum = {};
    add_rows<Fmt, 1>(&sum, row, 0, x, cols);
    return sum_of(sum);
}

}  // namespace
}  // namespace fusedmerge
