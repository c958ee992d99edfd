// The GEMV of a group of linears that share x: every weight is read once, and the adapters' B z is added before the only rounding.
//
//   y[t, row] = round(sum of 8 warps' chains + sum over slots, ranks of gate * scaling * B[id, row] z[t] + bias[row] + residual[t, row])
//
// Grid: persistent, any size; blocks of kThreads take tiles of 32 rows, block, block + grid, ... A tile's columns go by in steps of 256.
// W and x pass through a ring of cp.async stages in which every lane reads only what it has fetched itself: no barrier in the loop, and the
// ring runs on into the next tile while this one is finished.
//
//   fill the ring with W | wait for the prologue | routing, x | step: wait, mma, fetch step + kStages - 1 | ... | share sums, expand, store
//
// W is constant while prologue and GEMV run, so it is fetched before the wait; all else is read, and everything stored, after it.
#pragma once

#include "expand.cuh"

namespace fusedmerge {

constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kRowOctets = kTileRows / 8;  // of a lane: rows g, g + 8, g + 16, g + 24 of a tile

template <int kTokenTiles>
struct GemvMemory {
    static constexpr int kStages = kTokenTiles == 1 ? 4 : 3;  // two blocks fit in 227 KB, one in 99 KB

    Words4 stages[kStages][kWarps][kRowOctets + kTokenTiles][kWarpLanes];  // each lane's own octets: rows, tokens
    Routing<kTokenTiles> routing;
    Partials<kTokenTiles> partials;
    Staged<kTokenTiles> staged;
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
    int col = 0;                // of the block's step
    const T* rows[kRowOctets];  // at the lane's first column
    int exist = 0;              // bit i: there is such a row (else rows[i] is another)
    bool aligned = false;

    FM_DEVICE explicit WeightWalk(const LinearParams& p) : params(p), tile(block_index()) { enter_tile(); }

    FM_DEVICE bool at_end() const { return tile >= params.num_tiles; }

    FM_DEVICE void advance() {
        col += kStepCols;
        if (col < params.cols) return;
        col = 0;
        tile += grid_size();
        enter_tile();
    }

    FM_DEVICE void enter_tile() {
        if (at_end()) return;
        const LinearTarget& target = target_of(params, tile);
        aligned = (target.flags & kTargetWeightAligned) != 0;
        exist = 0;
        FM_UNROLL
        for (int i = 0; i < kRowOctets; ++i) {
            int row = (tile - target.first_tile) * kTileRows + thread_index() % kWarpLanes / 4 + 8 * i;
            bool exists = row < target.rows;
            exist |= exists << i;
            rows[i] = static_cast<const T*>(target.weight) + (exists ? row * target.weight_stride : 0) + lane_col();
        }
    }

    FM_DEVICE static int lane_col() { return thread_index() / kWarpLanes * kChunkCols + thread_index() % 4 * 8; }
};

template <class T, int kTokenTiles>
struct Gemv {
    static constexpr int kStages = GemvMemory<kTokenTiles>::kStages;

    const LinearParams& params;
    GemvMemory<kTokenTiles>& memory;
    const int thread, warp, lane;
    const unsigned long long policy;
    bool active = false;           // some token has an adapter
    bool whole;                    // rows of W and x are aligned, and steps full
    const T* tokens[kTokenTiles];  // x at the lane's first column

    FM_DEVICE Gemv(const LinearParams& p, GemvMemory<kTokenTiles>& m)
        : params(p), memory(m), thread(thread_index()), warp(thread / kWarpLanes), lane(thread % kWarpLanes), policy(evict_first_policy()) {
        whole = p.cols % kStepCols == 0 && (p.flags & kXAligned) != 0;
        for (int t = 0; t < p.num_targets; ++t) whole &= (p.targets[t].flags & kTargetWeightAligned) != 0;
        FM_UNROLL
        for (int n = 0; n < kTokenTiles; ++n) {
            tokens[n] = static_cast<const T*>(p.x) + (has_token(n) ? (lane / 4 + 8 * n) * p.x_stride : 0) + WeightWalk<T>::lane_col();
        }
    }

    FM_DEVICE void run() {
        WeightWalk<T> walk(params);
        fill_ring(walk);
        Expand<T, kTokenTiles> expand(params, memory.routing, memory.staged, active);
        int stage = 0;
        FM_NO_UNROLL
        for (int tile = block_index(); tile < params.num_tiles; tile += grid_size()) {
            Products<T, kTokenTiles> products[2];  // rows 0..15 and 16..31
            products[0].clear();
            products[1].clear();
            if (whole) {
                run_steps<true>(products, walk, stage);
            } else {
                run_steps<false>(products, walk, stage);
            }
            const LinearTarget& target = target_of(params, tile);
            const int row = (tile - target.first_tile) * kTileRows + thread / kMaxTokens;
            float deltas[2];
            expand.run(deltas, target, row);
            FM_NO_UNROLL
            for (int half = 0; half < 2; ++half) {
                if (half == 0) {
                    products[0].share(memory.partials);
                } else {
                    products[1].share(memory.partials);
                }
                if (expand.finishes) finish(target, row + half * kMmaRows, expand.token, half == 0 ? deltas[0] : deltas[1]);
            }
        }
    }

    // kWhole: every octet is whole and aligned, and a step is little more than its loads and products.
    template <bool kWhole>
    FM_DEVICE void run_steps(Products<T, kTokenTiles> (&products)[2], WeightWalk<T>& walk, int& stage) {
        FM_NO_UNROLL
        for (int col = 0; col < params.cols; col += kStepCols) {
            copy_async_wait<kStages - 2>();  // this step's octets have arrived
            add_step(products, stage);
            int free = stage == 0 ? kStages - 1 : stage - 1;  // the one that the last step has used
            fetch_weights<kWhole>(walk, free);
            fetch_tokens<kWhole>(walk, free);
            copy_async_commit();
            walk.advance();
            stage = stage == kStages - 1 ? 0 : stage + 1;
        }
    }

    // One group for each step, although all of W is in the first: the loop counts groups.
    FM_DEVICE void fill_ring(WeightWalk<T>& walk) {
        WeightWalk<T> again = walk;
        FM_NO_UNROLL
        for (int stage = 0; stage < kStages - 1; ++stage) {
            fetch_weights<false>(walk, stage);
            walk.advance();
        }
        clear_tokens();
        grid_wait();
        launch_dependents();
        FM_NO_UNROLL
        for (int stage = 0; stage < kStages - 1; ++stage) {
            fetch_tokens<false>(again, stage);
            copy_async_commit();
            again.advance();
        }
        if (params.logits != nullptr) {
            memory.routing.choose_all(params, routings_of_tiles());
            active = true;
        } else {
            active = params.num_slots > 0 && memory.routing.read(params);
        }
    }

    // Bits of the routings that the block's tiles take; all for the first block, which hands them out.
    FM_DEVICE int routings_of_tiles() const {
        if (block_index() == 0 || params.num_routings == 1) return ~0;
        int bits = 0;
        for (int tile = block_index(); tile < params.num_tiles; tile += grid_size()) bits |= 1 << target_of(params, tile).routing;
        return bits;
    }

    FM_DEVICE bool has_token(int n) const { return lane / 4 + 8 * n < params.tokens; }

    // The octets of tokens that are not there: nobody fetches them.
    FM_DEVICE void clear_tokens() {
        FM_UNROLL
        for (int i = 0; i < kStages * kTokenTiles; ++i) {
            int n = i % kTokenTiles;
            if (!has_token(n)) memory.stages[i / kTokenTiles][warp][kRowOctets + n][lane] = {};
        }
    }

    template <bool kWhole>
    FM_DEVICE void fetch_weights(const WeightWalk<T>& walk, int stage) {
        if (walk.at_end()) return;
        FM_UNROLL
        for (int i = 0; i < kRowOctets; ++i) {
            Words4* to = &memory.stages[stage][warp][i][lane];
            if constexpr (kWhole) {
                stream_async_16(to, walk.rows[i] + walk.col, 16, policy);
            } else {
                int count = walk.exist >> i & 1 ? params.cols - walk.col - walk.lane_col() : 0;
                stream_octet(to, count > 0 ? walk.rows[i] + walk.col : walk.rows[i] - walk.lane_col(), count, walk.aligned, policy);
            }
        }
    }

    template <bool kWhole>
    FM_DEVICE void fetch_tokens(const WeightWalk<T>& walk, int stage) {
        if (walk.at_end()) return;
        FM_UNROLL
        for (int n = 0; n < kTokenTiles; ++n) {
            if (!has_token(n)) continue;
            Words4* to = &memory.stages[stage][warp][kRowOctets + n][lane];
            if constexpr (kWhole) {
                cached_async_16(to, tokens[n] + walk.col, 16);
            } else {
                int count = params.cols - walk.col - walk.lane_col();
                cached_octet(to, count > 0 ? tokens[n] + walk.col : tokens[n] - walk.lane_col(), count, (params.flags & kXAligned) != 0);
            }
        }
    }

    FM_DEVICE void add_step(Products<T, kTokenTiles> (&products)[2], int stage) const {
        const Words4(&own)[kRowOctets + kTokenTiles][kWarpLanes] = memory.stages[stage][warp];
        Words4 octets[kTokenTiles];
        FM_UNROLL
        for (int n = 0; n < kTokenTiles; ++n) octets[n] = own[kRowOctets + n][lane];
        FM_UNROLL
        for (int half = 0; half < 2; ++half) products[half].add_chunk({own[2 * half][lane], own[2 * half + 1][lane]}, octets);
    }

    FM_DEVICE void finish(const LinearTarget& target, int row, int token, float delta) const {
        if (row >= target.rows) return;
        float value = add(memory.partials.total(thread / kMaxTokens, token), delta);
        if (target.bias != nullptr) value = add(value, widen(static_cast<const T*>(target.bias)[row]));
        if (target.residual != nullptr) {
            value = add(value, widen(static_cast<const T*>(target.residual)[token * target.residual_stride + row]));
        }
        narrow(static_cast<T*>(target.y)[token * target.y_stride + row], value);
    }
};

template <class T, int kTokenTiles>
FM_DEVICE void run_gemv(const LinearParams& params) {
    Gemv<T, kTokenTiles>(params, *reinterpret_cast<GemvMemory<kTokenTiles>*>(shared_memory())).run();
}

}  // namespace fusedmerge
