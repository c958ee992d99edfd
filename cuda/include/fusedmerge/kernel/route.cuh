// The router: which adapters a token takes, and with what gates.
//
//   ids[t], gates[t] = the k largest of router x[t], descending, ties to the lower index; softmax over them, or over all N     float32
//
//   | x      | [T, in]  | bf16, fp16       | read once                     |
//   | router | [N, in]  | x's, or float32  | read by every block, from L2  |
//   | mask   | [T]      | int32, or absent | a token with 0 gets ids -1    |
//   | ids    | [T, k]   | int32            | written                       |
//   | gates  | [T, k]   | float32          | written                       |
//
// Grid: one block of kThreads for each token; 4 N bytes of shared memory. One launch for a batch of any size.
//
//   warp w: logits of adapters w, w + 8, ... -> shared | barrier | warp 0: k rounds of argmax, softmax -> ids, gates
//
// A logit is eight chains of FMAs a lane (one for each place in an octet) and a fixed tree; so its bits depend on its token alone.
// `router_logit` and `choose` serve the prologue too, where a layer has its own router (prologue.cuh, gemv.cuh). LoRA-Switch's router,
// arXiv 2405.17741, section 3.
#pragma once

#include "linear_params.cuh"
#include "tile.cuh"

namespace fusedmerge {

constexpr int kWarps = kThreads / kWarpLanes;

FM_DEVICE float shuffle_xor(float x, int mask) { return bits_to_float(shuffle_xor(float_to_bits(x), mask)); }

// The warp's sum, in every lane: the same tree everywhere, and the same bits, because addition commutes.
FM_DEVICE float warp_sum(float x) {
    FM_UNROLL
    for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) x = add(x, shuffle_xor(x, mask));
    return x;
}

FM_DEVICE float sum_eight(const float (&x)[8]) { return add(add(add(x[0], x[1]), add(x[2], x[3])), add(add(x[4], x[5]), add(x[6], x[7]))); }

// One adapter's row of a router, of x's type or float32 (kRouterWide).
template <class T>
struct RouterRow {
    const void* at;  // [in]
    int cols;        // in
    int flags;       // SourceFlags

    FM_DEVICE RouterRow(const void* router, long long stride, int adapter, int num_cols, int f)
        : at(static_cast<const char*>(router) + adapter * stride * ((f & kRouterWide) != 0 ? 4 : 2)), cols(num_cols), flags(f) {}

    FM_DEVICE void load(float (&values)[8], int col) const {
        const bool aligned = (flags & kRouterAligned) != 0;
        if ((flags & kRouterWide) != 0) {
            load_floats(values, static_cast<const float*>(at) + col, cols - col, aligned);
        } else {
            Octet<T> octet;
            load_octet(octet, static_cast<const T*>(at) + col, cols - col, aligned);
            widen_octet(values, octet, 1.0f);
        }
    }

    FM_DEVICE static void load_floats(float (&values)[8], const float* from, int count, bool aligned) {
        if (aligned && count >= 8) {
            unsigned words[8];
            load_16(words, from);
            load_16(words + 4, from + 4);
            FM_UNROLL
            for (int i = 0; i < 8; ++i) values[i] = bits_to_float(words[i]);
        } else {
            FM_UNROLL
            for (int i = 0; i < 8; ++i) values[i] = i < count ? from[i] : 0.0f;
        }
    }
};

// Warp-wide: x row, in every lane.
template <class T, class LoadX>
FM_DEVICE float router_logit(LoadX load_x, const RouterRow<T>& row) {
    float acc[8] = {};
    FM_UNROLL_4
    for (int col = 8 * (thread_index() % kWarpLanes); col < row.cols; col += 8 * kWarpLanes) {
        Octet<T> octet;
        float x[8], w[8];
        load_x(octet, col);
        row.load(w, col);
        widen_octet(x, octet, 1.0f);
        FM_UNROLL
        for (int i = 0; i < 8; ++i) acc[i] = fused_multiply_add(x[i], w[i], acc[i]);
    }
    return warp_sum(sum_eight(acc));
}

struct Candidate {
    float logit;
    int idx;
};

FM_DEVICE bool precedes(const Candidate& x, const Candidate& y) { return x.logit > y.logit || (x.logit == y.logit && x.idx < y.idx); }

// Warp-wide: the first candidate after `last`; its idx is `count` where there is none (NaN precedes nothing).
FM_DEVICE Candidate next_candidate(const float* logits, int count, const Candidate& last) {
    Candidate best{-bits_to_float(0x7f800000u), count};
    for (int i = thread_index() % kWarpLanes; i < count; i += kWarpLanes) {
        Candidate candidate{logits[i], i};
        if (precedes(last, candidate) && precedes(candidate, best)) best = candidate;
    }
    FM_UNROLL
    for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) {
        Candidate other{shuffle_xor(best.logit, mask), static_cast<int>(shuffle_xor(static_cast<unsigned>(best.idx), mask))};
        if (precedes(other, best)) best = other;
    }
    return best;
}

struct Slot {
    int id;  // -1: none
    float gate;
};

// Warp-wide: lane j gets slot j of the k = num_slots best; lanes from k on get empty slots.
FM_DEVICE Slot choose(const float* logits, int num_adapters, int num_slots, bool normalize) {
    int lane = thread_index() % kWarpLanes;
    Candidate last{bits_to_float(0x7f800000u), -1};
    float top = 0.0f;
    float logit = 0.0f;
    Slot slot{-1, 0.0f};
    for (int j = 0; j < num_slots; ++j) {
        last = next_candidate(logits, num_adapters, last);
        if (j == 0) top = last.logit;
        if (j == lane && last.idx < num_adapters) {
            slot.id = last.idx;
            logit = last.logit;
        }
    }
    float share = slot.id >= 0 ? exponential(add(logit, -top)) : 0.0f;
    float sum = share;
    if (!normalize || num_slots == 1) {
        sum = 0.0f;
        for (int i = lane; i < num_adapters; i += kWarpLanes) sum = add(sum, exponential(add(logits[i], -top)));
    }
    sum = warp_sum(sum);
    if (slot.id >= 0) slot.gate = divide(share, sum);
    return slot;
}

template <class T>
FM_DEVICE void run_route(const RouteParams& params) {
    float* logits = reinterpret_cast<float*>(shared_memory());  // [N]
    int token = block_index();
    int warp = thread_index() / kWarpLanes;
    bool real = params.mask == nullptr || params.mask[token] != 0;
    const T* x = static_cast<const T*>(params.x) + token * params.x_stride;
    for (int n = warp; real && n < params.num_adapters; n += kWarps) {
        auto load_x = [&](Octet<T>& octet, int col) { load_octet(octet, x + col, params.cols - col, (params.flags & kXAligned) != 0); };
        const RouterRow<T> row(params.router, params.router_stride, n, params.cols, params.flags);
        float logit = router_logit(load_x, row);
        if (thread_index() % kWarpLanes == 0) logits[n] = logit;
    }
    block_barrier();  // all logits are in shared memory
    if (warp != 0) return;
    Slot slot = choose(logits, real ? params.num_adapters : 0, params.num_slots, params.normalize != 0);
    int lane = thread_index();
    if (lane < params.num_slots) {
        params.ids[token * params.num_slots + lane] = slot.id;
        params.gates[token * params.num_slots + lane] = slot.gate;
    }
}

template <class T>
FM_KERNEL(kThreads)
route_kernel(const RouteParams params) {
    run_route<T>(params);
}

}  // namespace fusedmerge
