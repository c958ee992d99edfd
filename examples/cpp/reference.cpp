#include <cmath>
#include <cstring>
#include <random>

#include "layer.h"

namespace {

double widen(uint16_t bits) {
    uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
}

uint16_t narrow(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);  // to nearest, ties to even
}

std::vector<uint16_t> random_bf16(std::mt19937& random, size_t count, float size) {
    std::normal_distribution<float> normal(0.0f, size);
    std::vector<uint16_t> values(count);
    for (uint16_t& value : values) value = narrow(normal(random));
    return values;
}

}  // namespace

Layer make_layer(int rows, int cols, unsigned seed) {
    std::mt19937 random(seed);
    Layer layer{rows, cols, {}, {}, {}, {}};
    layer.base = random_bf16(random, static_cast<size_t>(rows) * cols, 0.02f);
    layer.a = random_bf16(random, static_cast<size_t>(kAdapters) * kRank * cols, 0.05f);
    layer.b = random_bf16(random, static_cast<size_t>(kAdapters) * rows * kRank, 0.05f);
    for (int n = 0; n < kAdapters; ++n) layer.scaling.push_back(0.5f + 0.25f * static_cast<float>(n));
    return layer;
}

long long count_wrong(const Layer& layer, const std::vector<uint16_t>& live, const std::vector<double>& gates) {
    long long wrong = 0;
    for (size_t i = 0; i < live.size(); ++i) {
        const size_t row = i / layer.cols, col = i % layer.cols;
        double truth = widen(layer.base[i]), size = std::fabs(truth);
        for (size_t n = 0; n < gates.size(); ++n) {
            for (size_t k = 0; gates[n] != 0.0 && k < kRank; ++k) {
                const double term = gates[n] * layer.scaling[n] * widen(layer.b[(n * layer.rows + row) * kRank + k]) *
                                    widen(layer.a[(n * kRank + k) * layer.cols + col]);
                truth += term;
                size += std::fabs(term);
            }
        }
        const double got = widen(live[i]);
        const double half_ulp = std::ldexp(1.0, std::ilogb(std::fmax(std::fabs(truth), std::fabs(got)) + 0x1p-126) - 8);
        wrong += !(std::fabs(got - truth) <= half_ulp + 0x1p-18 * size);
    }
    return wrong;
}
