// Adapters beside a linear of any number of tokens: y += sum of gate scaling B (A x), one rounding.
#pragma once

#include <utility>
#include <vector>

#include "linear_parts.h"

namespace fusedmerge {
namespace {

// A token's adapters by ascending id, gates of equal ids added: whatever order its slots have, the bits are the same. Returns how many.
int slots_of(Slot (&slots)[kMaxSlots], const LinearParams& params, const LinearTarget& target, int token) {
    int count = 0;
    for (int j = 0; j < params.num_slots; ++j) {
        const Slot slot = slot_of(params, target, token, j);
        if (slot.gate == 0) continue;
        int i = count;
        while (i > 0 && slots[i - 1].id > slot.id) --i;
        if (i > 0 && slots[i - 1].id == slot.id) {
            slots[i - 1].gate += slot.gate;
            continue;
        }
        std::copy_backward(slots + i, slots + count, slots + count + 1);
        slots[i] = slot;
        ++count;
    }
    return count;
}

// y [out] of one token += B z of the adapters that it takes.
template <class Fmt>
void expand(typename Fmt::Bits* y, const LinearTarget& target, const Taken<typename Fmt::Bits>* taken, int num_taken) {
    float out[kUnitRows];
    for (int64_t first = 0; first < target.rows; first += kUnitRows) {
        const int64_t count = std::min<int64_t>(kUnitRows, target.rows - first);
        VFloat sums[kUnitRows] = {};
        add_taken<Fmt>(sums, target, taken, num_taken, first, count);
        sums_of(out, sums, count);
        add_row<Fmt>(y + first, y + first, out, count);
    }
}

// y += sum of gate scaling B (A x), a token at a time; those with the same first adapter one after another, while it is in the cache.
template <class Fmt>
void add(const LinearParams& params, int threads) {
    using Bits = typename Fmt::Bits;
    constexpr int64_t kUnitTokens = 4;
    const LinearTarget& target = params.targets[0];
    const int64_t pitch = pad(params.cols), z_pitch = pad(target.rank), num_floats = pitch + kMaxSlots * z_pitch;
    const Floats memory(threads * num_floats);
    std::vector<std::pair<int, int>> order;  // (first adapter, token)
    order.reserve(params.tokens);
    Slot slots[kMaxSlots];
    for (int t = 0; t < params.tokens; ++t) {
        if (slots_of(slots, params, target, t) > 0) order.emplace_back(slots[0].id, t);
    }
    std::sort(order.begin(), order.end());
    const int64_t num_tokens = static_cast<int64_t>(order.size()), bytes = 2LL * num_tokens * target.rank * (params.cols + target.rows);
    for_each((num_tokens + kUnitTokens - 1) / kUnitTokens, bytes, threads, [&](int64_t unit, int worker) {
        float* x = memory.get() + worker * num_floats;
        for (int64_t i = unit * kUnitTokens; i < std::min(num_tokens, (unit + 1) * kUnitTokens); ++i) {
            const int token = order[i].second;
            Slot own[kMaxSlots];
            Taken<Bits> taken[kMaxSlots];
            int num_taken = 0;
            widen_padded<Fmt>(x, static_cast<const Bits*>(params.x) + token * params.x_stride, params.cols);
            for (int j = 0, count = slots_of(own, params, target, token); j < count; ++j) {
                const float scale = scale_of(target, own[j]);
                if (scale == 0) continue;
                float* z = x + pitch + num_taken * z_pitch;
                const Bits* a = static_cast<const Bits*>(target.a) + own[j].id * target.a_adapter_stride;
                shrink<Fmt>(z, a, target.a_row_stride, x, params.cols, target.rank);
                scale_ranks(z, z, target.rank, scale);
                taken[num_taken++] = {static_cast<const Bits*>(target.b) + own[j].id * target.b_adapter_stride, z};
            }
            if (num_taken > 0) expand<Fmt>(static_cast<Bits*>(target.y) + token * target.y_stride, target, taken, num_taken);
        }
    });
}

}  // namespace
}  // namespace fusedmerge
