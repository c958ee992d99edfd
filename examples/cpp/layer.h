// One adapted weight in bf16, on the host, and what a mixture of its adapters should be.
#pragma once

#include <cstdint>
#include <vector>

constexpr int kAdapters = 4;  // N
constexpr int kRank = 16;     // r

struct Layer {
    int rows, cols;
    std::vector<uint16_t> base;  // [rows, cols]
    std::vector<uint16_t> a;     // [N, r, cols]
    std::vector<uint16_t> b;     // [N, rows, r]
    std::vector<float> scaling;  // [N]
};

Layer make_layer(int rows, int cols, unsigned seed);

// How many of `live`'s weights lie farther from base + sum of gates[n] * scaling[n] * B[n] A[n], computed in double, than half an ulp
// and 2^-18 of the terms' sizes.
long long count_wrong(const Layer& layer, const std::vector<uint16_t>& live, const std::vector<double>& gates);

// The part that needs a GPU (on_gpu.cpp). 0 = right.
int run_on_gpu(int ordinal);
