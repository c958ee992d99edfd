// The prologue of a group of linears that share x: x itself, the routers' logits, and the shrink z = A x.
//
//   | written | shape                         |                                                                                          |
//   | x       | [T, in]                       | where it has a source (source.cuh); each block prepares for itself what it multiplies    |
//   | sum     | [T, in]                       | the residual stream                                                                      |
//   | logits  | [routings, T, N] float32      | where there are routers; the GEMV's blocks choose from them, each for itself             |
//   | z       | [splits, T, slots, r] float32 | known ids: slot j's adapter's rows. With routers: all N adapters', so that nothing waits |
//
// Grid: any number of blocks of kThreads; units are taken with the grid's stride. A unit of the shrink is 16 ranks of one adapter of one
// target, times 2,048 columns: 64 KB of A, all of them in flight at once, while the block prepares x.
//
//   wait for the stream | routing | fetch A of the first unit | norm's sums | x, sum, logits: a share of each | mma, z | next unit ...
#pragma once

#include "source.cuh"

namespace fusedmerge {

constexpr int kUnitSteps = kSplitCols / kStepCols;
constexpr int kBatchSteps = 4;   // steps whose x is loaded together
constexpr int kBatchTokens = 4;  // tokens whose squares are

template <int kTokenTiles>
struct PrologueMemory {
    Words4 rows[kUnitSteps][kWarps][2][kWarpLanes];  // each lane's own octets of A
    Routing<kTokenTiles> routing;
    Partials<kTokenTiles> partials;
    float squares[8 * kTokenTiles][kWarps];
    float scales[8 * kTokenTiles];
};

template <class T, int kTokenTiles>
struct Prologue {
    const LinearParams& params;
    PrologueMemory<kTokenTiles>& memory;
    const Source<T> source;
    const int thread, warp, lane;
    const int num_choices;  // adapters' places that units are counted in: slots of all tokens, or all adapters
    int num_units = 0;

    FM_DEVICE Prologue(const LinearParams& p, PrologueMemory<kTokenTiles>& m)
        : params(p),
          memory(m),
          source{p, m.scales},
          thread(thread_index()),
          warp(thread / kWarpLanes),
          lane(thread % kWarpLanes),
          num_choices(p.logits != nullptr ? p.num_adapters : p.tokens * p.num_slots) {}

    FM_DEVICE void run() {
        grid_wait();
        launch_dependents();
        bool active = params.logits != nullptr || memory.routing.read(params);
        if (active) num_units = num_choices * params.num_rank_tiles * params.num_splits;
        Unit unit;
        bool more = next_unit(unit, block_index());
        if (more) fetch(unit);
        if (params.source == kSourceNorm) measure();
        if (params.source != kSourcePlain) write_x();
        if (params.logits != nullptr) write_logits();
        while (more) {
            shrink(unit);
            more = next_unit(unit, unit.idx + grid_size());
            if (more) fetch(unit);
        }
    }

    struct Unit {
        int idx;
        int id;     // adapter
        int split;  // of the columns
        int rank;   // the first
        int target;
    };

    // The first unit from `idx` on, with the grid's stride, that exists: empty slots, and adapters that an earlier slot has, are left out.
    FM_DEVICE bool next_unit(Unit& unit, int idx) const {
        for (; idx < num_units; idx += grid_size()) {
            int choice = idx % num_choices;
            unit.id = params.logits != nullptr ? choice : first_of(choice);
            if (unit.id < 0) continue;
            int rank_tile = idx / num_choices % params.num_rank_tiles;
            int t = 0;
            while (t + 1 < params.num_targets && params.targets[t + 1].first_rank_tile <= rank_tile) ++t;
            unit.idx = idx;
            unit.split = idx / num_choices / params.num_rank_tiles;
            unit.target = t;
            unit.rank = (rank_tile - params.targets[t].first_rank_tile) * kMmaRows;
            return true;
        }
        return false;
    }

    // The adapter in this slot of all tokens' slots; -1 where an earlier slot has it, or there is none.
    FM_DEVICE int first_of(int choice) const {
        int id = id_at(choice);
        for (int i = 0; i < choice; ++i) {
            if (id_at(i) == id) return -1;
        }
        return id;
    }

    FM_DEVICE int id_at(int choice) const { return memory.routing.ids[choice / params.num_slots][choice % params.num_slots]; }

    // The first column of the lane's octet in a step of a split.
    FM_DEVICE int col_of(int split, int step) const { return split * kSplitCols + step * kStepCols + warp * kChunkCols + lane % 4 * 8; }

    FM_DEVICE void fetch(const Unit& unit) {
        const LinearTarget& target = params.targets[unit.target];
        const T* a = static_cast<const T*>(target.a) + unit.id * target.a_adapter_stride;
        FM_UNROLL
        for (int i = 0; i < 2 * kUnitSteps; ++i) {
            int rank = unit.rank + lane / 4 + i % 2 * 8;
            int col = col_of(unit.split, i / 2);
            int count = rank < target.rank ? params.cols - col : 0;
            copy_octet(&memory.rows[i / 2][warp][i % 2][lane], count > 0 ? a + rank * target.a_row_stride + col : a, count,
                       (target.flags & kTargetAAligned) != 0);
        }
        copy_async_commit();
    }

    // The norm's scale of every token, in a fixed tree: threads take octets, warps their lanes' sums.
    FM_DEVICE void measure() {
        FM_NO_UNROLL
        for (int first = 0; first < params.tokens; first += kBatchTokens) {
            float sums[kBatchTokens] = {};
            for (int col = 8 * thread; col < params.cols; col += 8 * kThreads) {
                FM_UNROLL
                for (int i = 0; i < kBatchTokens; ++i) {
                    if (first + i < params.tokens) sums[i] = add(sums[i], sum_of_squares(first + i, col));
                }
            }
            FM_UNROLL
            for (int i = 0; i < kBatchTokens; ++i) {
                float sum = warp_sum(sums[i]);
                if (lane == 0) memory.squares[first + i][warp] = sum;
            }
        }
        block_barrier();  // all warps' sums are visible
        if (thread < params.tokens) {
            float mean = divide(sum_eight(memory.squares[thread]), static_cast<float>(params.cols));
            memory.scales[thread] = divide(1.0f, square_root(add(mean, params.epsilon)));
        }
        block_barrier();  // the scales are visible
    }

    FM_DEVICE float sum_of_squares(int token, int col) const {
        float values[8];
        source.load_sum(values, token, col);
        FM_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = multiply(values[i], values[i]);
        return sum_eight(values);
    }

    // This block's share of x, and of the residual stream.
    FM_DEVICE void write_x() const {
        int num_octets = (params.cols + 7) / 8;
        for (int i = block_index() * kThreads + thread; i < params.tokens * num_octets; i += grid_size() * kThreads) {
            int token = i / num_octets;
            int col = i % num_octets * 8;
            Octet<T> octet;
            source.load(octet, token, col);
            T* x = static_cast<T*>(const_cast<void*>(params.x)) + token * params.x_stride + col;
            store_octet(x, octet, params.cols - col, (params.flags & kXAligned) != 0);
            if (params.sum == nullptr) continue;
            float values[8];
            source.load_sum(values, token, col);
            narrow_octet(octet, values);
            store_octet(static_cast<T*>(params.sum) + token * params.sum_stride + col, octet, params.cols - col,
                        (params.flags & kSumAligned) != 0);
        }
    }

    // This block's share of the logits, from the last block on: the first ones have units.
    FM_DEVICE void write_logits() const {
        const int count = params.num_routings * params.num_adapters;
        for (int i = (grid_size() - 1 - block_index()) * kWarps + warp; i < count; i += grid_size() * kWarps) {
            const int routing = i / params.num_adapters;
            const int adapter = i % params.num_adapters;
            const RouterRow<T> row(params.routers[routing], params.router_strides[routing], adapter, params.cols, params.flags);
            for (int token = 0; token < params.tokens; ++token) {
                auto load_x = [&](Octet<T>& octet, int col) { source.load(octet, token, col); };
                float logit = router_logit(load_x, row);
                if (lane == 0) params.logits[(routing * params.tokens + token) * params.num_adapters + adapter] = logit;
            }
        }
    }

    FM_DEVICE void shrink(const Unit& unit) {
        Products<T, kTokenTiles> products;
        products.clear();
        copy_async_wait<0>();
        FM_NO_UNROLL
        for (int first = 0; first < kUnitSteps && unit.split * kSplitCols + first * kStepCols < params.cols; first += kBatchSteps) {
            add_steps(products, unit.split, first);
        }
        products.share(memory.partials);
        write_z(unit);
    }

    FM_DEVICE void add_steps(Products<T, kTokenTiles>& products, int split, int first) const {
        Words4 tokens[kBatchSteps][kTokenTiles];
        FM_UNROLL
        for (int s = 0; s < kBatchSteps; ++s) {
            FM_UNROLL
            for (int n = 0; n < kTokenTiles; ++n) tokens[s][n] = load_token(lane / 4 + 8 * n, col_of(split, first + s));
        }
        FM_UNROLL
        for (int s = 0; s < kBatchSteps; ++s) {
            const Words4(&rows)[2][kWarpLanes] = memory.rows[first + s][warp];
            products.add_chunk({rows[0][lane], rows[1][lane]}, tokens[s]);
        }
    }

    FM_DEVICE Words4 load_token(int token, int col) const {
        Octet<T> octet = {};
        if (token < params.tokens && col < params.cols) source.load(octet, token, col);
        return {octet.words[0], octet.words[1], octet.words[2], octet.words[3]};
    }

    // Ranks up to z's pitch are written: past the adapter's own they are zeros.
    FM_DEVICE void write_z(const Unit& unit) const {
        int row = thread / kMaxTokens;
        int token = thread % kMaxTokens;
        int rank = unit.rank + row;
        if (token >= params.tokens || rank >= params.targets[unit.target].z_pitch) return;
        float value = memory.partials.total(row, token);
        if (params.logits != nullptr) {
            z_at(unit, token, unit.id, rank) = value;
            return;
        }
        for (int j = 0; j < params.num_slots; ++j) {
            if (memory.routing.ids[token][j] == unit.id) z_at(unit, token, j, rank) = value;
        }
    }

    FM_DEVICE float& z_at(const Unit& unit, int token, int slot, int rank) const {
        long long num_slots = params.logits != nullptr ? params.num_adapters : params.num_slots;
        long long place = (static_cast<long long>(unit.split) * params.tokens + token) * num_slots + slot;
        return params.targets[unit.target].z[place * params.targets[unit.target].z_pitch + rank];
    }
};

template <class T, int kTokenTiles>
FM_DEVICE void run_prologue(const LinearParams& params) {
    Prologue<T, kTokenTiles>(params, *reinterpret_cast<PrologueMemory<kTokenTiles>*>(shared_memory())).run();
}

}  // namespace fusedmerge
