// The GEMV of a group of linears that share x: every weight is read once, and the adapters' B z is added before the only rounding.
//
//   y[t, row] = round(sum of 8 warps' chains + sum over slots, ranks of gate * scaling * B[id, row] z[t] + bias[row] + residual[t, row])
//
// Grid: persistent, any size; blocks of kThreads take tiles of 16 rows, block, block + grid, ... A tile's columns go by in steps of 256.
// W and x pass through a ring of cp.async stages in which every lane reads only what it has fetched itself: no barrier in the loop, and the
// ring runs on into the next tile while this one is finished.
//
//   fill the ring with W | wait for the prologue | routing, x | step: wait, mma, fetch step + kStages - 1 | ... | share sums, expand, store
//
// W is constant while prologue and GEMV run, so it is fetched before the wait; all else is read, and everything stored, after it.
#pragma once

#include "products.cuh"

namespace fusedmerge {

constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kExpandTokens = 8;  // tokens whose B is loaded together

template <int kTokenTiles>
struct GemvMemory {
    static constexpr int kStages = kTokenTiles == 1 ? 7 : 5;  // two blocks fit in 227 KB, one in 99 KB

    Words4 stages[kStages][kWarps][2 + kTokenTiles][kWarpLanes];  // each lane's own octets: rows g and g + 8, tokens
    Routing<kTokenTiles> routing;
    Partials<kTokenTiles> partials;
};

FM_DEVICE const LinearTarget& target_of(const LinearParams& params, int tile) {
    int t = 0;
    while (t + 1 < params.num_targets && params.targets[t + 1].first_tile <= tile) ++t;
    return params.targets[t];
}

// A lane's walk over its block's tiles, and in each over the steps.
template <class T>
struct WeightWalk {
    const LinearParams& params;
    int tile;
    int step = 0;
    const T* rows[2];  // g and g + 8 of the tile
    int ends[2];       // their columns; 0 where there is no such row
    bool aligned = false;

    FM_DEVICE explicit WeightWalk(const LinearParams& p) : params(p), tile(block_index()) { enter_tile(); }

    FM_DEVICE bool at_end() const { return tile >= params.num_tiles; }

    FM_DEVICE void advance() {
        if (++step * kStepCols < params.cols) return;
        step = 0;
        tile += grid_size();
        enter_tile();
    }

    FM_DEVICE void enter_tile() {
        if (at_end()) return;
        const LinearTarget& target = target_of(params, tile);
        aligned = (target.flags & kTargetWeightAligned) != 0;
        FM_UNROLL
        for (int i = 0; i < 2; ++i) {
            int row = (tile - target.first_tile) * kTileRows + thread_index() % kWarpLanes / 4 + 8 * i;
            ends[i] = row < target.rows ? params.cols : 0;
            rows[i] = static_cast<const T*>(target.weight) + (row < target.rows ? row * target.weight_stride : 0);
        }
    }
};

template <class T, int kTokenTiles>
struct Gemv {
    static constexpr int kStages = GemvMemory<kTokenTiles>::kStages;

    const LinearParams& params;
    GemvMemory<kTokenTiles>& memory;
    const int thread, warp, lane;
    const unsigned long long policy;
    bool active = false;  // some token has an adapter

    FM_DEVICE Gemv(const LinearParams& p, GemvMemory<kTokenTiles>& m)
        : params(p),
          memory(m),
          thread(thread_index()),
          warp(thread / kWarpLanes),
          lane(thread % kWarpLanes),
          policy(evict_first_policy()) {}

    FM_DEVICE void run() {
        WeightWalk<T> walk(params);
        fill_ring(walk);
        Products<T, kTokenTiles> products;
        int stage = 0;
        FM_NO_UNROLL
        for (int tile = block_index(); tile < params.num_tiles; tile += grid_size()) {
            products.clear();
            FM_NO_UNROLL
            for (int col = 0; col < params.cols; col += kStepCols) {
                copy_async_wait<kStages - 2>();  // this step's octets have arrived
                add_step(products, stage);
                int free = stage == 0 ? kStages - 1 : stage - 1;  // the one that the last step has used
                fetch_weights(walk, free);
                fetch_tokens(walk, free);
                copy_async_commit();
                walk.advance();
                stage = stage == kStages - 1 ? 0 : stage + 1;
            }
            products.share(memory.partials);
            finish(target_of(params, tile), tile);
        }
    }

    // One group for each step, although all of W is in the first: the loop counts groups.
    FM_DEVICE void fill_ring(WeightWalk<T>& walk) {
        WeightWalk<T> again = walk;
        FM_NO_UNROLL
        for (int stage = 0; stage < kStages - 1; ++stage) {
            fetch_weights(walk, stage);
            walk.advance();
        }
        grid_wait();
        launch_dependents();
        FM_NO_UNROLL
        for (int stage = 0; stage < kStages - 1; ++stage) {
            fetch_tokens(again, stage);
            copy_async_commit();
            again.advance();
        }
        active = params.num_slots > 0 && memory.routing.find(params);
        if (block_index() == 0 && params.router != nullptr) report_routing();
    }

    FM_DEVICE int col_of(const WeightWalk<T>& walk) const { return walk.step * kStepCols + warp * kChunkCols + lane % 4 * 8; }

    FM_DEVICE void fetch_weights(const WeightWalk<T>& walk, int stage) {
        if (walk.at_end()) return;
        int col = col_of(walk);
        FM_UNROLL
        for (int i = 0; i < 2; ++i) {
            int count = walk.ends[i] - col;
            stream_octet(&memory.stages[stage][warp][i][lane], walk.rows[i] + (count > 0 ? col : 0), count, walk.aligned, policy);
        }
    }

    FM_DEVICE void fetch_tokens(const WeightWalk<T>& walk, int stage) {
        if (walk.at_end()) return;
        int col = col_of(walk);
        int count = params.cols - col;
        FM_UNROLL
        for (int n = 0; n < kTokenTiles; ++n) {
            int token = lane / 4 + 8 * n;
            if (token >= params.tokens) continue;
            const T* x = static_cast<const T*>(params.x) + token * params.x_stride + (count > 0 ? col : 0);
            cached_octet(&memory.stages[stage][warp][2 + n][lane], x, count, (params.flags & kXAligned) != 0);
        }
    }

    FM_DEVICE void add_step(Products<T, kTokenTiles>& products, int stage) const {
        const Words4(&own)[2 + kTokenTiles][kWarpLanes] = memory.stages[stage][warp];
        Words4 tokens[kTokenTiles];
        FM_UNROLL
        for (int n = 0; n < kTokenTiles; ++n) tokens[n] = lane / 4 + 8 * n < params.tokens ? own[2 + n][lane] : Words4{};
        products.add_chunk({own[0][lane], own[1][lane]}, tokens);
    }

    FM_DEVICE void report_routing() const {
        for (int i = thread; i < params.tokens * params.num_slots; i += kThreads) {
            params.ids[i] = memory.routing.ids[i / params.num_slots][i % params.num_slots];
            params.gates[i] = memory.routing.gates[i / params.num_slots][i % params.num_slots];
        }
    }

    // Sixteen lanes share a row: lane l expands an l-th of every token's ranks, and then finishes token l.
    FM_DEVICE void finish(const LinearTarget& target, int tile) const {
        int row = (tile - target.first_tile) * kTileRows + thread / kMaxTokens;
        int token = thread % kMaxTokens;
        float delta = 0.0f;
        if (active) {
            FM_NO_UNROLL
            for (int first = 0; first < params.tokens; first += kExpandTokens) {
                float sums[kExpandTokens] = {};
                if (row < target.rows) expand(sums, target, row, first);
                FM_UNROLL
                for (int t = 0; t < kExpandTokens; ++t) {
                    float sum = sum_over_row(sums[t]);
                    if (token == first + t) delta = sum;
                }
            }
        }
        if (token >= params.tokens || row >= target.rows) return;
        float value = add(memory.partials.total(thread / kMaxTokens, token), delta);
        if (target.bias != nullptr) value = add(value, widen(static_cast<const T*>(target.bias)[row]));
        if (target.residual != nullptr) {
            value = add(value, widen(static_cast<const T*>(target.residual)[token * target.residual_stride + row]));
        }
        narrow(static_cast<T*>(target.y)[token * target.y_stride + row], value);
    }

    // This lane's parts of a few tokens' sums over slots and ranks. All their loads of B go out before the first is used.
    FM_DEVICE void expand(float (&sums)[kExpandTokens], const LinearTarget& target, int row, int first) const {
        const int num_octets = target.z_pitch / 8;
        const bool whole = (target.flags & kTargetBAligned) != 0 && target.rank % 8 == 0;
        FM_NO_UNROLL
        for (int i = thread % kMaxTokens; i < params.num_slots * num_octets; i += kMaxTokens) {
            const int slot = i / num_octets;
            const int rank = i % num_octets * 8;
            const T* b = static_cast<const T*>(target.b) + row * target.b_row_stride + rank;
            Octet<T> octets[kExpandTokens];
            if (whole) {
                FM_UNROLL
                for (int t = 0; t < kExpandTokens; ++t) {
                    int id = memory.routing.ids[first + t][slot];
                    if (id >= 0) load_16(octets[t].words, b + id * target.b_adapter_stride);
                }
            } else {
                FM_UNROLL
                for (int t = 0; t < kExpandTokens; ++t) {
                    int id = memory.routing.ids[first + t][slot];
                    if (id >= 0) load_octet(octets[t], b + id * target.b_adapter_stride, target.rank - rank, false);
                }
            }
            FM_UNROLL
            for (int t = 0; t < kExpandTokens; ++t) {
                if (memory.routing.ids[first + t][slot] >= 0) add_octet(sums[t], octets[t], target, first + t, slot, rank);
            }
        }
    }

    // sum += gate * scaling * (octet of B) z, eight ranks of a slot.
    FM_DEVICE void add_octet(float& sum, const Octet<T>& octet, const LinearTarget& target, int token, int slot, int rank) const {
        int id = memory.routing.ids[token][slot];
        float gate = memory.routing.gates[token][slot];
        float coefficient = target.scaling != nullptr ? multiply(gate, target.scaling[id]) : gate;
        if (coefficient == 0.0f) return;  // no adapter, whatever its factors hold
        float values[8], z[8];
        load_z(z, target, token, params.router != nullptr ? id : slot, rank);
        widen_octet(values, octet, 1.0f);
        FM_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = multiply(values[i], z[i]);
        sum = fused_multiply_add(coefficient, sum_eight(values), sum);
    }

    // Eight ranks of z, its splits added in order.
    FM_DEVICE void load_z(float (&z)[8], const LinearTarget& target, int token, int slot, int rank) const {
        long long num_slots = params.router != nullptr ? params.num_adapters : params.num_slots;
        const float* from = target.z + (token * num_slots + slot) * target.z_pitch + rank;
        FM_UNROLL
        for (int i = 0; i < 8; ++i) z[i] = 0.0f;
        for (int split = 0; split < params.num_splits; ++split) {
            unsigned words[8];
            load_16(words, from);
            load_16(words + 4, from + 4);
            FM_UNROLL
            for (int i = 0; i < 8; ++i) z[i] = add(z[i], bits_to_float(words[i]));
            from += params.tokens * num_slots * target.z_pitch;
        }
    }

    // In every lane of a row's sixteen, in one tree.
    FM_DEVICE static float sum_over_row(float x) {
        FM_UNROLL
        for (int mask = kMaxTokens / 2; mask > 0; mask /= 2) x = add(x, shuffle_xor(x, mask));
        return x;
    }
};

template <class T, int kTokenTiles>
FM_DEVICE void run_gemv(const LinearParams& params) {
    Gemv<T, kTokenTiles>(params, *reinterpret_cast<GemvMemory<kTokenTiles>*>(shared_memory())).run();
}

}  // namespace fusedmerge
