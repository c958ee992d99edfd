// Shrink: z[pair] = A[expert] x[token], float32, for pairs ordered by expert.
//
//   A   [r, in]   16 bytes a lane, global -> registers: mma's 16 rows are ranks
//   x   [T, in]   the same, gathered by token: mma's 8 columns are pairs
//   z   [T k, z_stride]   registers -> global, whole or in parts
//
// A warp owns 16 pairs of one expert x 64 ranks and needs nobody: no shared memory, no barrier. Columns are permuted alike in A and x, so
// that 16 bytes of a lane feed two mma: words 0, 1 of a lane's octet are the first one's k, words 2, 3 the second one's.
//
//   32 columns:  8 loads of A, 2 of x | 16 mma      512 columns: a part, one chain of mma | z += part, float32
//
// Parts are added in order, here or (few pairs: a block for each part) by sgmv_sum: the bits are the same. Eight warps of a block have
// neighbouring pairs, most often of one expert: they read the same A, through L1.
#pragma once

#include "sgmv_params.cuh"
#include "tile.cuh"

namespace fusedmerge {

FM_DEVICE int rank_of(const SgmvTarget& target, int expert) { return target.ranks != nullptr ? target.ranks[expert] : target.rank; }
FM_DEVICE int padded_rank(int rank) { return (rank + kRankStep - 1) / kRankStep * kRankStep; }

template <class Number>
struct ShrinkWarp {
    static constexpr int kTiles = kShrinkRanks / 16;
    static constexpr int kHalves = kShrinkPairs / 8;

    // A lane's octets of 32 columns.
    struct Columns {
        Octet<Number> a[kTiles][2];  // [16 ranks][upper half]
        Octet<Number> x[kHalves];
    };

    const SgmvParams& params;
    const SgmvTarget& target;
    const ShrinkGroup group;
    const int first_rank, rank;     // rank: the expert's, here
    const int num_tiles;            // of 16 ranks
    const int lane_row, lane_quad;  // g and t of the fragment layout
    const bool aligned;
    const Number* a_rows[kTiles][2];  // the lane's
    const Number* x_rows[kHalves];
    float chain[kTiles][kHalves][4];  // [16 ranks][8 pairs][fragment]
    float total[kTiles][kHalves][4];

    FM_DEVICE ShrinkWarp(const SgmvParams& p, const SgmvTarget& t, const ShrinkGroup& g, int r)
        : params(p),
          target(t),
          group(g),
          first_rank(r),
          rank(rank_of(t, g.expert)),
          num_tiles((padded_rank(rank) - r) / 16),
          lane_row(thread_index() % kWarpLanes / 4),
          lane_quad(thread_index() % 4),
          aligned((t.flags & kShrinkAligned) != 0) {}

    // The sum of some parts, into one part of z.
    FM_DEVICE void run(int first_part, int end_part, int z_part) {
        if (num_tiles <= 0) return;
        find_rows();
        clear(total);
        FM_NO_UNROLL
        for (int part = first_part; part < end_part; ++part) {
            clear(chain);
            multiply_part(part * kPartCols);
            accumulate();
        }
        store(z_part);
    }

    // Where there is no such rank or pair, the first one's row is read.
    FM_DEVICE void find_rows() {
        const Number* a = static_cast<const Number*>(target.a) + group.expert * target.a_adapter_stride;
        FM_UNROLL
        for (int i = 0; i < 2 * kTiles; ++i) {
            const int r = first_rank + 8 * i + lane_row;
            a_rows[i / 2][i % 2] = a + (r < rank ? r : first_rank) * target.a_row_stride + 8 * lane_quad;
        }
        FM_UNROLL
        for (int h = 0; h < kHalves; ++h) {
            const int pair = 8 * h + lane_row;
            const int token = params.groups.pair_tokens[group.position + (pair < group.count ? pair : 0)];
            x_rows[h] = static_cast<const Number*>(params.x) + token * params.x_stride + 8 * lane_quad;
        }
    }

    // Whole steps of 32 columns, each loaded while the one before is multiplied; then what is left, or all of it where rows are not
    // aligned.
    FM_DEVICE void multiply_part(int col) {
        const int end = params.cols - col < kPartCols ? params.cols : col + kPartCols;
        const int num_steps = aligned ? (end - col) / 32 : 0;
        Columns steps[2];
        if (num_steps > 0) load<true>(steps[0], col);
        FM_NO_UNROLL
        for (int i = 0; i < num_steps; i += 2) {
            if (i + 1 < num_steps) load<true>(steps[1], col + 32 * i + 32);
            multiply(steps[0]);
            if (i + 2 < num_steps) load<true>(steps[0], col + 32 * i + 64);
            if (i + 1 < num_steps) multiply(steps[1]);
        }
        FM_NO_UNROLL
        for (col += 32 * num_steps; col < end; col += 32) {
            load<false>(steps[0], col);
            multiply(steps[0]);
        }
    }

    template <bool kWhole>
    FM_DEVICE void load(Octet<Number>& octet, const Number* row, int col) {
        if constexpr (kWhole) {
            load_16(octet.words, row + col);
        } else {
            load_octet(octet, row + col, params.cols - col - 8 * lane_quad, aligned);
        }
    }

    template <bool kWhole>
    FM_DEVICE void load(Columns& columns, int col) {
        FM_UNROLL
        for (int i = 0; i < 2 * kTiles; ++i) {
            if (i / 2 < num_tiles) load<kWhole>(columns.a[i / 2][i % 2], a_rows[i / 2][i % 2], col);
        }
        FM_UNROLL
        for (int h = 0; h < kHalves; ++h) load<kWhole>(columns.x[h], x_rows[h], col);
    }

    FM_DEVICE void multiply(const Columns& columns) {
        FM_UNROLL
        for (int i = 0; i < 2 * kTiles * kHalves; ++i) {
            const int tile = i / (2 * kHalves), half = i / 2 % kHalves, word = i % 2 * 2;
            if (tile >= num_tiles || 8 * half >= group.count) continue;
            const unsigned (&low)[4] = columns.a[tile][0].words;
            const unsigned (&high)[4] = columns.a[tile][1].words;
            const unsigned (&x)[4] = columns.x[half].words;
            multiply_accumulate(chain[tile][half], {low[word], high[word], low[word + 1], high[word + 1]}, {x[word], x[word + 1]},
                                Number{});
        }
    }

    FM_DEVICE void clear(float (&sum)[kTiles][kHalves][4]) {
        FM_UNROLL
        for (int i = 0; i < 4 * kTiles * kHalves; ++i) sum[i / 4 / kHalves][i / 4 % kHalves][i % 4] = 0.0f;
    }

    FM_DEVICE void accumulate() {
        FM_UNROLL
        for (int i = 0; i < 4 * kTiles * kHalves; ++i) {
            float& sum = total[i / 4 / kHalves][i / 4 % kHalves][i % 4];
            sum = add(sum, chain[i / 4 / kHalves][i / 4 % kHalves][i % 4]);
        }
    }

    // Ranks from the expert's own on, up to the next multiple of 16, repeat its first one here: the expand meets them with zeros.
    FM_DEVICE void store(int z_part) {
        float* z = target.z + (static_cast<long long>(z_part) * params.num_pairs + group.position) * target.z_stride;
        FM_UNROLL
        for (int i = 0; i < 4 * kTiles * kHalves; ++i) {
            const int tile = i / 4 / kHalves, half = i / 4 % kHalves;
            const int pair = 8 * half + 2 * lane_quad + i % 2;
            const int r = first_rank + 16 * tile + i % 4 / 2 * 8 + lane_row;
            if (tile < num_tiles && pair < group.count) z[pair * target.z_stride + r] = total[tile][half][i % 4];
        }
    }
};

// A block takes eight groups of pairs, 64 ranks of one target, and all parts or one. Parts count first, then ranks and targets: what runs
// at the same time reads the same x.
template <class Number>
FM_DEVICE void run_sgmv_shrink(const SgmvParams& params) {
    constexpr int kGroups = kThreads / kWarpLanes;
    const int num_groups = params.groups.totals->shrink_groups;
    const int num_parts = (params.cols + kPartCols - 1) / kPartCols;
    const bool split = params.num_parts > 1;
    int num_rank_blocks = 0;
    for (int i = 0; i < params.num_targets; ++i) num_rank_blocks += (params.targets[i].rank + kShrinkRanks - 1) / kShrinkRanks;
    const int row_units = num_rank_blocks * params.num_parts;
    const long long num_units = static_cast<long long>((num_groups + kGroups - 1) / kGroups) * row_units;
    for (long long unit = block_index(); unit < num_units; unit += grid_size()) {
        const int group_idx = static_cast<int>(unit / row_units) * kGroups + thread_index() / kWarpLanes;
        if (group_idx >= num_groups) continue;
        const int part = static_cast<int>(unit % row_units) % params.num_parts;
        int rank_block = static_cast<int>(unit % row_units) / params.num_parts;
        int target_idx = 0;
        while (rank_block >= (params.targets[target_idx].rank + kShrinkRanks - 1) / kShrinkRanks) {
            rank_block -= (params.targets[target_idx++].rank + kShrinkRanks - 1) / kShrinkRanks;
        }
        ShrinkWarp<Number> warp(params, params.targets[target_idx], params.groups.shrink_groups[group_idx], rank_block * kShrinkRanks);
        warp.run(split ? part : 0, split ? part + 1 : num_parts, part);
    }
}

// Where z is in parts: the first becomes the sum of all, added in order.
FM_DEVICE void run_sgmv_sum(const SgmvParams& params) {
    const int num_pairs = params.groups.totals->pairs;
    for (int t = 0; t < params.num_targets; ++t) {
        const SgmvTarget& target = params.targets[t];
        const long long count = static_cast<long long>(num_pairs) * target.z_stride / 4;
        for (long long i = static_cast<long long>(block_index()) * kThreads + thread_index(); i < count; i += grid_size() * kThreads) {
            Floats4* z = reinterpret_cast<Floats4*>(target.z) + i;
            Floats4 sum = {};
            FM_UNROLL_4
            for (int part = 0; part < params.num_parts; ++part) {
                const Floats4 term = z[static_cast<long long>(part) * params.num_pairs * target.z_stride / 4];
                FM_UNROLL
                for (int c = 0; c < 4; ++c) sum.values[c] = add(sum.values[c], term.values[c]);
            }
            *z = sum;
        }
    }
}

}  // namespace fusedmerge
