// Number types and octets: eight neighbouring columns of one row, the unit in which weights move between memory and registers.
//
// An octet is 16 bytes of a 16-bit type (one access), 32 of float32 (two), 8 of fp8 (one). Where a row is not aligned, or fewer than eight
// columns remain, it is loaded and stored element by element; the arithmetic is the same, and so are the bits.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace fusedmerge {

struct alignas(8) Words2 {
    unsigned words[2];
};
struct alignas(16) Words4 {
    unsigned words[4];
};
struct alignas(8) Floats2 {
    float values[2];
};
struct alignas(16) Floats4 {
    float values[4];
};

template <class T>
struct Octet {
    static constexpr int kWords = 2 * static_cast<int>(sizeof(T));
    static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    unsigned words[kWords];
};

FM_DEVICE unsigned element_bits(float x) { return float_to_bits(x); }
template <class T>
FM_DEVICE unsigned element_bits(T x) {
    return x.bits;
}
FM_DEVICE void set_element(float& x, unsigned bits) { x = bits_to_float(bits); }
template <class T>
FM_DEVICE void set_element(T& x, unsigned bits) {
    x.bits = static_cast<decltype(x.bits)>(bits);
}

template <class T>
FM_DEVICE void load_vector(Octet<T>& octet, const T* from, unsigned long long policy) {
    if constexpr (sizeof(T) == 1) {
        stream_load_8(octet.words, from, policy);
    } else {
        FM_UNROLL
        for (int i = 0; i < octet.kWords; i += 4) stream_load_16(octet.words + i, reinterpret_cast<const char*>(from) + 4 * i, policy);
    }
}

template <class T>
FM_DEVICE void load_elements(Octet<T>& octet, const T* from, int num_cols) {
    constexpr int kPerWord = Octet<T>::kPerWord;
    FM_UNROLL
    for (int i = 0; i < octet.kWords; ++i) octet.words[i] = 0;
    FM_UNROLL
    for (int i = 0; i < 8; ++i) {
        if (i < num_cols) octet.words[i / kPerWord] |= element_bits(from[i]) << (i % kPerWord * (32 / kPerWord));
    }
}

// `num_cols` columns of the row remain from here on; at most eight are read, missing ones are zero.
template <class T>
FM_DEVICE void load_octet(Octet<T>& octet, const T* from, int num_cols, bool aligned, unsigned long long policy) {
    if (aligned && num_cols >= 8) {
        load_vector(octet, from, policy);
    } else {
        load_elements(octet, from, num_cols);
    }
}

// One value of a 16-bit type.
template <class T>
FM_DEVICE float widen(T x) {
    float low, high;
    widen_pair(low, high, x.bits, T{});
    return low;
}
template <class T>
FM_DEVICE void narrow(T& to, float x) {
    set_element(to, narrow_pair(x, 0.0f, T{}));
}

// Eight 16-bit values into shared memory; `count` of them exist, the others become zeros. Asynchronous where they are aligned.
template <class T>
FM_DEVICE void copy_elements(void* shared, const T* from, int count) {
    FM_NO_UNROLL
    for (int i = 0; i < 8; ++i) static_cast<unsigned short*>(shared)[i] = i < count ? from[i].bits : 0;
}
FM_DEVICE int octet_bytes(int count) { return count >= 8 ? 16 : count > 0 ? 2 * count : 0; }
template <class T>
FM_DEVICE void copy_octet(void* shared, const T* from, int count, bool aligned) {
    if (aligned) {
        copy_async_16(shared, from, octet_bytes(count));
    } else {
        copy_elements(shared, from, count);
    }
}
template <class T>
FM_DEVICE void cached_octet(void* shared, const T* from, int count, bool aligned) {
    if (aligned) {
        cached_async_16(shared, from, octet_bytes(count));
    } else {
        copy_elements(shared, from, count);
    }
}
template <class T>
FM_DEVICE void stream_octet(void* shared, const T* from, int count, bool aligned, unsigned long long policy) {
    if (aligned) {
        stream_async_16(shared, from, octet_bytes(count), policy);
    } else {
        copy_elements(shared, from, count);
    }
}

// 16-bit values that are read again soon, into registers. Where they are not aligned they shift in one by one, in a loop: little code.
template <class T>
FM_DEVICE void load_octet(Octet<T>& octet, const T* from, int num_cols, bool aligned) {
    if (aligned && num_cols >= 8) {
        load_16(octet.words, from);
        return;
    }
    unsigned (&words)[4] = octet.words;
    FM_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = 0;
    FM_NO_UNROLL
    for (int i = num_cols < 8 ? num_cols - 1 : 7; i >= 0; --i) {
        FM_UNROLL
        for (int w = 3; w > 0; --w) words[w] = words[w] << 16 | words[w - 1] >> 16;
        words[0] = words[0] << 16 | from[i].bits;
    }
}

template <class T>
FM_DEVICE void store_elements(T* to, const Octet<T>& octet, int num_cols) {
    constexpr int kPerWord = Octet<T>::kPerWord;
    FM_UNROLL
    for (int i = 0; i < 8; ++i) {
        if (i < num_cols) set_element(to[i], octet.words[i / kPerWord] >> (i % kPerWord * (32 / kPerWord)));
    }
}

template <class T>
FM_DEVICE void store_octet(T* to, const Octet<T>& octet, int num_cols, bool aligned, unsigned long long policy) {
    if (aligned && num_cols >= 8) {
        FM_UNROLL
        for (int i = 0; i < octet.kWords; i += 4) stream_store_16(reinterpret_cast<char*>(to) + 4 * i, octet.words + i, policy);
    } else {
        store_elements(to, octet, num_cols);
    }
}

// 16-bit values that are read again soon, from registers.
template <class T>
FM_DEVICE void store_octet(T* to, const Octet<T>& octet, int num_cols, bool aligned) {
    if (aligned && num_cols >= 8) {
        store_16(to, octet.words);
    } else {
        store_elements(to, octet, num_cols);
    }
}

// `scale` belongs to fp8 alone; the product is rounded to float32, which is what "the base value" means.
template <class T>
FM_DEVICE void widen_octet(float (&values)[8], const Octet<T>& octet, float scale) {
    FM_UNROLL
    for (int i = 0; i < octet.kWords; ++i) {
        if constexpr (kSame<T, float>) {
            values[i] = bits_to_float(octet.words[i]);
        } else if constexpr (kSame<T, Fp8E4M3>) {
            FM_UNROLL
            for (int j = 0; j < 4; j += 2) widen_pair(values[4 * i + j], values[4 * i + j + 1], octet.words[i] >> (8 * j), T{});
            FM_UNROLL
            for (int j = 0; j < 4; ++j) values[4 * i + j] = multiply(scale, values[4 * i + j]);
        } else {
            widen_pair(values[2 * i], values[2 * i + 1], octet.words[i], T{});
        }
    }
}

template <class T>
FM_DEVICE void narrow_octet(Octet<T>& octet, const float (&values)[8]) {
    FM_UNROLL
    for (int i = 0; i < octet.kWords; ++i) {
        if constexpr (kSame<T, float>) {
            octet.words[i] = float_to_bits(values[i]);
        } else {
            octet.words[i] = narrow_pair(values[2 * i], values[2 * i + 1], T{});
        }
    }
}

// Whether all values of the octets that it was shown are finite.
template <class T>
struct Finiteness {
    unsigned mark = 0;  // 0 times each value, added up: NaN where one was not finite

    FM_DEVICE void add(const Octet<T>& octet) {
        FM_UNROLL
        for (int i = 0; i < octet.kWords; ++i) {
            if constexpr (kSame<T, float>) {
                mark = float_to_bits(fused_multiply_add(bits_to_float(octet.words[i]), 0.0f, bits_to_float(mark)));
            } else {
                mark_non_finite(mark, octet.words[i], T{});
            }
        }
    }

    FM_DEVICE bool all() const {
        constexpr unsigned kExponent = kSame<T, float> ? 0x7f800000u : kSame<T, Bf16> ? 0x7f80u : 0x7c00u;
        return (mark & kExponent) != kExponent && (kSame<T, float> || (mark >> 16 & kExponent) != kExponent);
    }
};

// The scale of an fp8 source at an element; a lane's octet never crosses a scale block (8 divides 128).
FM_DEVICE float scale_at(const SwitchSegment& segment, int row, int col) {
    if (segment.source_scale == nullptr) return 1.0f;
    return segment.source_scale[(row >> segment.scale_row_shift) * segment.scale_stride + (col >> segment.scale_col_shift)];
}

}  // namespace fusedmerge
