// Vectors of the instruction set that the including file is compiled for, in the compilers' own vector types, and the conversions between
// float32 and the 16-bit formats. Everything is local to the file: the same names mean other widths elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "merge_cpu.h"

namespace fusedmerge {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VFloat __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VUint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VHalf __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class V>
inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

template <class V>
inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof(v));
}

inline VUint choose(VUint mask, VUint yes, VUint no) { return (mask & yes) | (~mask & no); }

#if defined(__AVX512F__)
inline VUint widen_bits(const uint16_t* from) { return bit_cast<VUint>(_mm512_cvtepu16_epi32(load<__m256i>(from))); }
inline void narrow_bits(uint16_t* to, VUint bits) { store(to, _mm512_cvtepi32_epi16(bit_cast<__m512i>(bits))); }
#else
inline VUint widen_bits(const uint16_t* from) { return __builtin_convertvector(load<VHalf>(from), VUint); }
inline void narrow_bits(uint16_t* to, VUint bits) { store(to, __builtin_convertvector(bits, VHalf)); }
#endif

template <Dtype kDtype>
struct Format;

template <>
struct Format<Dtype::kFloat32> {
    using Bits = uint32_t;
    static VFloat widen(const Bits* from) { return load<VFloat>(from); }
    static void narrow(Bits* to, VFloat x) { store(to, x); }
};

template <>
struct Format<Dtype::kBFloat16> {
    using Bits = uint16_t;
    static VFloat widen(const Bits* from) { return bit_cast<VFloat>(widen_bits(from) << 16); }
    static void narrow(Bits* to, VFloat x) {
        const VUint u = bit_cast<VUint>(x);
        const VUint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        const VUint nan = (u >> 16) | 0x40;  // quiet, or its payload could be cut to an infinity's
        narrow_bits(to, choose(VUint((u & 0x7fffffff) > 0x7f800000), nan, rounded));
    }
};

template <>
struct Format<Dtype::kFloat16> {
    using Bits = uint16_t;
#if defined(__AVX512F__)
    static VFloat widen(const Bits* from) { return _mm512_cvtph_ps(load<__m256i>(from)); }
    static void narrow(Bits* to, VFloat x) { store(to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#elif defined(__F16C__)
    static VFloat widen(const Bits* from) { return _mm256_cvtph_ps(load<__m128i>(from)); }
    static void narrow(Bits* to, VFloat x) { store(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#else
    static VFloat widen(const Bits* from) {
        const VUint h = widen_bits(from);
        const VUint magnitude = (h & 0x7fff) << 13;
        const VUint finite = bit_cast<VUint>(bit_cast<VFloat>(magnitude) * 0x1p112f);  // rebiases the exponent, exactly
        const VUint special = VUint((h & 0x7c00) == 0x7c00);
        return bit_cast<VFloat>(((h & 0x8000) << 16) | choose(special, magnitude | 0x7f800000, finite));
    }
    static void narrow(Bits* to, VFloat x) {
        const VUint u = bit_cast<VUint>(x);
        const VUint magnitude = u & 0x7fffffff;
        const VUint rebiased = magnitude - (112u << 23);
        const VUint normal = (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13;
        const VUint subnormal = bit_cast<VUint>(bit_cast<VFloat>(magnitude) + 0.5f) - 0x3f000000;  // 0.5f's ulp is 2^-24
        VUint bits = choose(VUint(magnitude < 0x38800000), subnormal, normal);                     // 2^-14
        bits = choose(VUint(magnitude >= 0x47800000), VUint{} + 0x7c00, bits);                     // 65536: infinity
        bits = choose(VUint(magnitude > 0x7f800000), VUint{} + 0x7e00, bits);                      // NaN
        narrow_bits(to, bits | ((u >> 16) & 0x8000));
    }
#endif
};

// Calls f(Format<dtype>{}).
template <class F>
inline void with_format(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::kFloat32:
            return f(Format<Dtype::kFloat32>{});
        case Dtype::kBFloat16:
            return f(Format<Dtype::kBFloat16>{});
        case Dtype::kFloat16:
            return f(Format<Dtype::kFloat16>{});
    }
}

// to[i] = scale * from[i], i < count, as float32.
template <class Fmt>
inline void widen_row(float* to, const typename Fmt::Bits* from, int64_t count, float scale) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(to + i, Fmt::widen(from + i) * scale);
    }
    if (i < count) {
        typename Fmt::Bits tail[kLanes] = {};
        float wide[kLanes];
        std::memcpy(tail, from + i, (count - i) * sizeof(*tail));
        store(wide, Fmt::widen(tail) * scale);
        std::memcpy(to + i, wide, (count - i) * sizeof(float));
    }
}

// live[i] = round(source[i] + delta[i]), i < count. The tail runs the same instructions on a copy, so that no bit depends on where a row
// was cut.
template <class Fmt>
inline void add_row(typename Fmt::Bits* live, const typename Fmt::Bits* source, const float* delta, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Fmt::narrow(live + i, Fmt::widen(source + i) + load<VFloat>(delta + i));
    }
    if (i < count) {
        typename Fmt::Bits tail[kLanes] = {};
        std::memcpy(tail, source + i, (count - i) * sizeof(*tail));
        Fmt::narrow(tail, Fmt::widen(tail) + load<VFloat>(delta + i));
        std::memcpy(live + i, tail, (count - i) * sizeof(*tail));
    }
}

// Adds a strip, delta [rows, kUnitCols] (rows kPitch apart), to the unit's rows from `first` on.
inline void add_strip(const Unit& unit, int64_t first, int64_t rows, const float* delta) {
    const Segment& s = *unit.segment;
    with_format(s.dtype, [&](auto format) {
        using Fmt = decltype(format);
        using Bits = typename Fmt::Bits;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t row = unit.row + first + i;
            add_row<Fmt>(static_cast<Bits*>(s.live) + row * s.live_stride + unit.col,
                         static_cast<const Bits*>(s.source) + row * s.source_stride + unit.col, delta + i * kPitch, unit.cols);
        }
    });
}

}  // namespace
}  // namespace fusedmerge
