// Which adapters a token takes, of the instruction set that the including file is compiled for: logits, and the largest of them.
#pragma once

#include <limits>

#include "linear_cpu.h"
#include "linear_dot.h"

namespace fusedmerge {
namespace {

// The k largest of logits [N], descending, ties to the lower index; softmax over them, or over all (as route.cuh's `choose`).
void choose(int* ids, float* gates, const float* logits, int num_adapters, int num_slots, bool normalize) {
    const float infinity = std::numeric_limits<float>::infinity();
    float last_logit = infinity, top = 0, sum = 0;
    int last = -1;
    for (int j = 0; j < num_slots; ++j) {
        int best = num_adapters;
        float best_logit = -infinity;
        for (int i = 0; i < num_adapters; ++i) {  // NaN compares with nothing
            const bool is_after = logits[i] < last_logit || (logits[i] == last_logit && i > last);
            if (is_after && (logits[i] > best_logit || (logits[i] == best_logit && i < best))) {
                best = i;
                best_logit = logits[i];
            }
        }
        if (j == 0) top = best_logit;
        last = best;
        last_logit = best_logit;
        ids[j] = best < num_adapters ? best : -1;
        gates[j] = best < num_adapters ? std::exp(best_logit - top) : 0.0f;
        sum += gates[j];
    }
    if (!normalize || num_slots == 1) {
        sum = 0;
        for (int i = 0; i < num_adapters; ++i) sum += std::exp(logits[i] - top);
    }
    for (int j = 0; j < num_slots; ++j) gates[j] = ids[j] < 0 ? 0.0f : gates[j] / sum;
}

using Wide = Format<Dtype::kFloat32>;

// Router row n times a token's x.
template <class Fmt>
float logit(const void* router, int64_t stride, int n, int flags, const float* x, int64_t cols) {
    if ((flags & kRouterWide) != 0) return dot<Wide>(static_cast<const Wide::Bits*>(router) + n * stride, x, cols);
    return dot<Fmt>(static_cast<const typename Fmt::Bits*>(router) + n * stride, x, cols);
}

}  // namespace
}  // namespace fusedmerge
