// Shrink: z[pair] = A[expert] x[token], in float32, for pairs ordered by expert; gate scaling z, split, by tile.
//
//   A   [r, in]   16 bytes a lane, global -> registers: mma's 16 rows are ranks
//   x   [T, in]   the same, gathered by token: mma's 8 columns are pairs
//   z   [places, z_stride]   registers -> global: gate scaling z in 16-bit pairs (sgmv_split.cuh); or float32 parts of it
//
// A warp owns 16 pairs of one expert x 64 ranks (or 16) and needs nobody: no shared memory, no barrier. Columns are permuted alike in A and
// x, so that 16 bytes of a lane feed two mma: words 0, 1 of a lane's octet are the first one's k, words 2, 3 the second one's.
//
//   32 columns:  8 loads of A, 2 of x | 16 mma      512 columns: a part, one chain of mma | z += part, float32
//
// Parts are added in order, here or (few pairs: a block for each part) by sgmv_sum, and then split: the bits are the same. Eight warps of a
// block have neighbouring pairs, most often of one expert: they read the same A, through L1.
#pragma once

#include "sgmv_split.cuh"

namespace fusedmerge {

template <class Number, int kRanks>
struct ShrinkWarp {
    static constexpr int kTiles = kRanks / 16;
    static constexpr int kHalves = kShrinkPairs / 8;
    static constexpr int kShrinkSteps = kRanks == kFewRanks ? 3 : 2;  // of 32 columns that are under way

    // A lane's octets of 32 columns.
    struct Columns {
        Octet<Number> a[kTiles][2];  // [16 ranks][odd]
        Octet<Number> x[kHalves];
    };

    const SgmvParams& params;
    const SgmvTarget& target;
    const ShrinkGroup group;
    const int first_rank, rank;     // rank: the expert's, here
    const int num_tiles;            // of 16 ranks
    const int lane_row, lane_quad;  // g and t of the fragment layout
    const bool aligned;
    const Number* a_rows[kTiles][2];  // the lane's: ranks 2g and 2g + 1 of 16 are rows g and g + 8 of an mma
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

    // The sum of some parts.
    FM_DEVICE void run(int first_part, int end_part) {
        if (num_tiles <= 0) return;
        find_rows();
        clear(total);
        FM_NO_UNROLL
        for (int part = first_part; part < end_part; ++part) {
            clear(chain);
            multiply_part(part * kPartCols);
            accumulate();
        }
        if (params.num_parts > 1) {
            store_part(first_part);
        } else {
            store_split();
        }
    }

    // A part's A comes into L2 at once, a row of 512 columns by 32 lanes: the loop asks for it in six round trips.
    FM_DEVICE void prefetch(int part) {
        const int col = part * kPartCols + kPartCols / kWarpLanes * (thread_index() % kWarpLanes);
        if (col >= params.cols) return;
        const Number* a = static_cast<const Number*>(target.a) + group.expert * target.a_adapter_stride + col;
        FM_NO_UNROLL
        for (int r = first_rank; r < rank && r < first_rank + kRanks; ++r) prefetch_32(a + r * target.a_row_stride);
    }

    // Where there is no such rank or pair, the first one's row is read.
    FM_DEVICE void find_rows() {
        const Number* a = static_cast<const Number*>(target.a) + group.expert * target.a_adapter_stride;
        FM_UNROLL
        for (int i = 0; i < 2 * kTiles; ++i) {
            const int r = first_rank + i / 2 * 16 + 2 * lane_row + i % 2;
            a_rows[i / 2][i % 2] = a + (r < rank ? r : first_rank) * target.a_row_stride + 8 * lane_quad;
        }
        FM_UNROLL
        for (int h = 0; h < kHalves; ++h) {
            const int pair = 8 * h + lane_row;
            const int token = params.groups.pairs[group.position + (pair < group.count ? pair : 0)].token;
            x_rows[h] = static_cast<const Number*>(params.x) + token * params.x_stride + 8 * lane_quad;
        }
    }

    // Whole steps of 32 columns, loaded while those before are multiplied; then what is left, or all of it where rows are not aligned.
    FM_DEVICE void multiply_part(int col) {
        const int end = params.cols - col < kPartCols ? params.cols : col + kPartCols;
        const int num_steps = aligned ? (end - col) / 32 : 0;
        Columns steps[kShrinkSteps];
        FM_UNROLL
        for (int i = 0; i < kShrinkSteps - 1; ++i) {
            if (i < num_steps) load<true>(steps[i], col + 32 * i);
        }
        int first = 0;
        FM_NO_UNROLL
        for (; first + 2 * kShrinkSteps - 1 <= num_steps; first += kShrinkSteps) multiply_steps<true>(steps, first, num_steps, col);
        FM_NO_UNROLL
        for (; first < num_steps; first += kShrinkSteps) multiply_steps<false>(steps, first, num_steps, col);
        FM_NO_UNROLL
        for (col += 32 * num_steps; col < end; col += 32) {
            load<false>(steps[0], col);
            multiply_step(steps[0]);
        }
    }

    // kAll: there are as many steps, and as many again but one to be loaded.
    template <bool kAll>
    FM_DEVICE void multiply_steps(Columns (&steps)[kShrinkSteps], int first, int num_steps, int col) {
        FM_UNROLL
        for (int i = 0; i < kShrinkSteps; ++i) {
            const int ahead = first + i + kShrinkSteps - 1;
            if (kAll || ahead < num_steps) load<true>(steps[(i + kShrinkSteps - 1) % kShrinkSteps], col + 32 * ahead);
            if (kAll || i == 0 || first + i < num_steps) multiply_step(steps[i]);
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
            if (i < 2 || i / 2 < num_tiles) load<kWhole>(columns.a[i / 2][i % 2], a_rows[i / 2][i % 2], col);
        }
        FM_UNROLL
        for (int h = 0; h < kHalves; ++h) load<kWhole>(columns.x[h], x_rows[h], col);
    }

    FM_DEVICE void multiply_step(const Columns& columns) {
        FM_UNROLL
        for (int i = 0; i < 2 * kTiles * kHalves; ++i) {
            const int tile = i / (2 * kHalves), half = i / 2 % kHalves, word = i % 2 * 2;
            if ((tile > 0 && tile >= num_tiles) || (half > 0 && 8 * half >= group.count)) continue;
            const unsigned (&even)[4] = columns.a[tile][0].words;
            const unsigned (&odd)[4] = columns.a[tile][1].words;
            const unsigned (&x)[4] = columns.x[half].words;
            multiply_accumulate(chain[tile][half], {even[word], odd[word], even[word + 1], odd[word + 1]}, {x[word], x[word + 1]},
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
    FM_DEVICE void store_part(int part) {
        float* z = target.parts + (static_cast<long long>(part) * params.num_pairs + group.position) * target.z_stride + first_rank;
        FM_UNROLL
        for (int i = 0; i < 4 * kTiles * kHalves; ++i) {
            const int tile = i / 4 / kHalves, half = i / 4 % kHalves;
            const int pair = 8 * half + 2 * lane_quad + i / 2 % 2;
            const int r = 16 * tile + 2 * lane_row + i % 2;
            if (tile < num_tiles && pair < group.count) z[pair * target.z_stride + r] = total[tile][half][i / 2 % 2 + i % 2 * 2];
        }
    }

    FM_DEVICE void store_split() {
        const float scaling = scaling_of(target, group.expert);
        FM_UNROLL
        for (int i = 0; i < 2 * kHalves; ++i) {
            const int index = i / 2 * 8 + 2 * lane_quad + i % 2;
            const Pair pair = params.groups.pairs[group.position + (index < group.count ? index : 0)];
            const float gate = multiply(pair.gate, scaling);
            float values[kTiles][2];
            float size = 0.0f;
            FM_UNROLL
            for (int r = 0; r < 2 * kTiles; ++r) {
                values[r / 2][r % 2] = gated(gate, total[r / 2][i / 2][i % 2 + r % 2 * 2]);
                if (r / 2 < num_tiles) size = larger(size, magnitude(values[r / 2][r % 2]));
            }
            for (int mask = 4; mask < kWarpLanes; mask *= 2) size = larger_of_lanes(size, mask);
            float scale, inverse;
            find_scales(size, scale, inverse);
            if (index >= group.count) continue;
            unsigned* z = target.z + static_cast<long long>(pair.place) * target.z_stride + first_rank + 2 * lane_row;
            FM_UNROLL
            for (int tile = 0; tile < kTiles; ++tile) {
                if (tile >= num_tiles) break;
                unsigned high, low;
                split_pair(high, low, multiply(values[tile][0], scale), multiply(values[tile][1], scale), Number{});
                *reinterpret_cast<Words2*>(z + 16 * tile) = {{high, low}};
            }
            if (lane_row == 0) target.inverses[static_cast<long long>(first_rank / kManyRanks) * params.num_places + pair.place] = inverse;
        }
    }
};

// A block takes eight groups of pairs, 64 ranks of one target, and all parts or one. Parts count first, then ranks and targets: what runs
// at the same time reads the same x.
template <class Number, int kRanks>
FM_DEVICE void run_sgmv_shrink(const SgmvParams& params) {
    constexpr int kGroups = kThreads / kWarpLanes;
    launch_dependents();
    const int num_groups = params.groups.totals->shrink_groups;
    const int num_parts = (params.cols + kPartCols - 1) / kPartCols;
    const bool split = params.num_parts > 1;
    int num_rank_blocks = 0;
    for (int i = 0; i < params.num_targets; ++i) num_rank_blocks += (params.targets[i].rank + kRanks - 1) / kRanks;
    const int row_units = num_rank_blocks * params.num_parts;
    const int num_units = (num_groups + kGroups - 1) / kGroups * row_units;
    FM_NO_UNROLL
    for (int unit = block_index(); unit < num_units; unit += grid_size()) {
        const int group_idx = unit / row_units * kGroups + thread_index() / kWarpLanes;
        if (group_idx >= num_groups) continue;
        const int part = unit % row_units % params.num_parts;
        int rank_block = unit % row_units / params.num_parts;
        int target_idx = 0;
        while (rank_block >= (params.targets[target_idx].rank + kRanks - 1) / kRanks) {
            rank_block -= (params.targets[target_idx++].rank + kRanks - 1) / kRanks;
        }
        const ShrinkGroup* group = params.groups.shrink_groups + group_idx;
        ShrinkWarp<Number, kRanks> warp(params, params.targets[target_idx], *group, rank_block * kRanks);
        if (split && (group_idx % kGroups == 0 || group[-1].expert != group->expert)) warp.prefetch(part);
        warp.run(split ? part : 0, split ? part + 1 : num_parts);
    }
}

// Where z is in parts, few pairs: adds them in order, and splits the sums. Up to 16 lanes have a pair's 64 ranks, four each. Pairs, ranks
// and scaling are older than the shrink, and are read before the wait.
template <class Number>
FM_DEVICE void run_sgmv_sum(const SgmvParams& params) {
    launch_dependents();
    const int num_pairs = params.groups.totals->pairs;
    const int lane = thread_index() % kWarpLanes;
    for (int t = 0; t < params.num_targets; ++t) {
        const SgmvTarget& target = params.targets[t];
        const int num_lanes = target.z_stride > 32 ? 16 : target.z_stride > 16 ? 8 : 4;
        const int num_blocks = (target.z_stride + kManyRanks - 1) / kManyRanks;
        const int count = num_pairs * num_blocks * num_lanes;
        const long long part_stride = static_cast<long long>(params.num_pairs) * target.z_stride;
        for (int first = block_index() * kThreads + thread_index() - lane; first < count; first += grid_size() * kThreads) {
            const int unit = (first + lane) / num_lanes;
            const int position = unit / num_blocks;
            const int block = unit % num_blocks;
            const int rank = kManyRanks * block + (first + lane) % num_lanes * 4;
            const Pair pair = params.groups.pairs[position < num_pairs ? position : 0];
            const bool exists = position < num_pairs && rank < padded_rank(rank_of(target, pair.expert));
            const float gate = multiply(pair.gate, scaling_of(target, pair.expert));
            Floats4 sum = {};
            float size = 0.0f;
            grid_wait();  // the shrink's parts are there
            if (exists) {
                const float* terms = target.parts + static_cast<long long>(position) * target.z_stride + rank;
                FM_UNROLL_4
                for (int part = 0; part < params.num_parts; ++part) {
                    const Floats4 term = reinterpret_cast<const Floats4&>(terms[part * part_stride]);
                    FM_UNROLL
                    for (int c = 0; c < 4; ++c) sum.values[c] = add(sum.values[c], term.values[c]);
                }
                FM_UNROLL
                for (int c = 0; c < 4; ++c) {
                    sum.values[c] = gated(gate, sum.values[c]);
                    size = larger(size, magnitude(sum.values[c]));
                }
            }
            for (int mask = 1; mask < num_lanes; mask *= 2) size = larger_of_lanes(size, mask);
            if (!exists) continue;
            float scale, inverse;
            find_scales(size, scale, inverse);
            Words4 split;
            FM_UNROLL
            for (int i = 0; i < 2; ++i) {
                split_pair(split.words[2 * i], split.words[2 * i + 1], multiply(sum.values[2 * i], scale),
                           multiply(sum.values[2 * i + 1], scale), Number{});
            }
            store_16(target.z + static_cast<long long>(pair.place) * target.z_stride + rank, split.words);
            if (rank % kManyRanks == 0) target.inverses[static_cast<long long>(block) * params.num_places + pair.place] = inverse;
        }
    }
    grid_wait();  // threads that have no pair, too: where the sum has ended, so has the shrink
}

}  // namespace fusedmerge
