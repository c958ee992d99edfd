// Arithmetic twins: rounding conversions and the tensor core's truncating dot product.
#include <cmath>

#include "simulator.h"

namespace fusedmerge::sim {

unsigned short float_to_bf16(float x) {
    unsigned bits = float_to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

unsigned short float_to_fp16(float x) {
    unsigned bits = float_to_bits(x);
    unsigned sign = bits >> 16 & 0x8000u;
    unsigned rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return 0x7fff;
    if (rest >= 0x47800000u) return static_cast<unsigned short>(sign | 0x7c00u);  // 2^16 and above
    if (rest < 0x38800000u) {                                                     // below 2^-14: multiples of 2^-24
        float steps = std::nearbyintf(std::ldexp(bits_to_float(rest), 24));
        return static_cast<unsigned short>(sign | static_cast<unsigned>(steps));
    }
    unsigned rounded = rest + 0xfffu + (rest >> 13 & 1u);
    return static_cast<unsigned short>(sign | ((rounded - 0x38000000u) >> 13));  // may carry into infinity
}

float fp16_to_float(unsigned short half) {
    unsigned exponent = half >> 10 & 31u;
    unsigned fraction = half & 0x3ffu;
    unsigned sign = static_cast<unsigned>(half & 0x8000u) << 16;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return bits_to_float(sign | float_to_bits(static_cast<float>(fraction) * 0x1p-24f));
    return bits_to_float(sign | (exponent + 112u) << 23 | fraction << 13);
}

namespace {

struct Parts {
    int64_t significand;  // signed, 24 bits
    int exponent;         // value = significand 2^(exponent - 23)
};

Parts split(float x) {
    unsigned bits = float_to_bits(x);
    int exponent = static_cast<int>(bits >> 23 & 255u);
    int64_t significand = bits & 0x7fffffu;
    if (exponent == 0) {
        exponent = 1;
    } else {
        significand |= 0x800000;
    }
    return {bits >> 31 ? -significand : significand, exponent - 127};
}

int64_t shift_truncated(int64_t x, int right) {
    if (right <= 0) return x * (int64_t{1} << -right);
    if (right > 62) return 0;
    return x < 0 ? -(-x >> right) : x >> right;
}

}  // namespace

float dot_truncated(float c, const float* a, const float* b, int depth, int extra_bits) {
    int64_t products[16];
    int exponents[16];
    Parts start = split(c);
    bool special = !std::isfinite(c);
    int top = start.significand != 0 ? start.exponent : -1000;
    for (int k = 0; k < depth; ++k) {
        special |= !std::isfinite(a[k]) || !std::isfinite(b[k]);
        Parts x = split(a[k]);
        Parts y = split(b[k]);
        products[k] = (x.significand >> 12) * (y.significand >> 12);  // 16-bit factors have 12 zero bits below; 22 fraction bits
        exponents[k] = x.exponent + y.exponent;
        if (products[k] != 0 && exponents[k] > top) top = exponents[k];
    }
    if (special) {
        for (int k = 0; k < depth; ++k) c += a[k] * b[k];
        return c;
    }
    if (top == -1000) return c;
    // In units of 2^(top - 23 - extra_bits).
    int64_t sum = shift_truncated(start.significand, top - start.exponent - extra_bits);
    for (int k = 0; k < depth; ++k) {
        if (products[k] != 0) sum += shift_truncated(products[k], top - exponents[k] - 1 - extra_bits);
    }
    if (sum == 0) return 0.0f;
    uint64_t size = sum < 0 ? static_cast<uint64_t>(-sum) : static_cast<uint64_t>(sum);
    int excess = 64 - __builtin_clzll(size) - 24;
    if (excess > 0) size = size >> excess << excess;
    double value = std::ldexp(static_cast<double>(size), top - 23 - extra_bits);
    if (value > 0x1.fffffep127) value = HUGE_VAL;
    return static_cast<float>(sum < 0 ? -value : value);  // below float32's normal range this last step rounds: not modelled
}

}  // namespace fusedmerge::sim
