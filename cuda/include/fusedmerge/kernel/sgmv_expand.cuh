// Expand: y[t] = round(y[t] + sum over the token's experts, ascending, of gate scaling B[expert] z[pair]).
//
//   B      [out, r]             8 bytes a lane, global -> registers: mma's 8 columns are columns of y; held for all pairs of the expert
//   z      [places, z_stride]  16 bytes a lane, global -> registers: mma's 16 rows are 8 pairs, high halves and low ones (sgmv_split.cuh)
//   sums   [tile_rows, 256]     shared, float32; a warp owns 32 columns of every row
//   y      [T, out]             read and written once
//
// A tile is tile_rows tokens; its pairs are ordered by expert, so tensor cores see rows that share B, whatever each token chose. Their
// products go to the token's row of sums. Nobody but the warp touches its columns: no block barrier.
//
//   ask for y, and B if tokens are few, in L2 | wait for z
//   for each expert of the tile, 64 ranks:  load B | for 8 pairs:  load z of the next 8 | mma | sums[row] += products, or = where it is the
//   first for each 32 rows:  load four rows of y | y = round(y + sums)
//
// A lane's products are 8 neighbouring columns of one pair. Shared sums are swizzled: a row's 16 bytes of columns 4c .. 4c + 3 lie at place
// c ^ (row % 2), so that two rows, one even and one odd, share a wavefront.
#pragma once

#include "sgmv_shrink.cuh"

namespace fusedmerge {

static_assert(kExpandCols == kThreads / kWarpLanes * kWarpCols, "each warp of a block has its columns");

FM_DEVICE int sums_at(int row, int place) { return row * kWarpCols + 4 * (place ^ (row & 1)); }

template <class Number, int kRanks>
struct ExpandWarp {
    static constexpr int kBlocks = kRanks / 16;
    static constexpr int kExpandSteps = kRanks == kFewRanks ? 2 : 1;  // operands of 8 pairs that are under way
    static constexpr int kFewRows = 16;                               // of a tile: up to 368 tokens, whose B is not yet in L2

    // What a lane needs of up to 8 pairs of one expert: of pair g.
    struct Operands {
        unsigned z[kBlocks][4];  // ranks 4t .. 4t + 3 of each 16, split
        int row;                 // TilePair::row
        float inverse;
    };

    // Where they come from: a lane's pairs are 8 places apart.
    struct Source {
        const unsigned* z;
        const TilePair* pair;
        const float* inverse;
        const int z_stride;

        FM_DEVICE Source(const ExpandWarp& warp, int place, int first_rank)
            : z(warp.target.z + static_cast<long long>(place) * warp.target.z_stride + first_rank + 4 * warp.lane_quad),
              pair(warp.groups.tile_pairs + place),
              inverse(warp.target.inverses + static_cast<long long>(first_rank / kManyRanks) * warp.params.num_places + place),
              z_stride(warp.target.z_stride) {}

        // Of the next pair, if it exists; else what is there is not used.
        FM_DEVICE void load(Operands& operands, bool exists, int num_ranks) {
            if (exists) {
                FM_UNROLL
                for (int block = 0; block < kBlocks; ++block) {
                    if (block == 0 || 16 * block < num_ranks) load_16(operands.z[block], z + 16 * block);
                }
                operands.row = pair->row;
                operands.inverse = *inverse;
            }
            z += 8 * z_stride;
            pair += 8;
            inverse += 8;
        }
    };

    const SgmvParams& params;
    const SgmvTarget& target;
    const Groups& groups;
    const int tile_idx, col;        // the warp's first column
    const int lane_row, lane_quad;  // g and t of the fragment layout
    const int num_rows;             // tokens of the tile
    const int first_place;          // of the tile
    float* sums;                    // [tile_rows, kWarpCols], the warp's own
    unsigned b[kBlocks][4][2];      // [16 ranks][8 columns][fragment]

    FM_DEVICE ExpandWarp(const SgmvParams& p, const SgmvTarget& t, int tile, int c)
        : params(p),
          target(t),
          groups(p.groups),
          tile_idx(tile),
          col(c),
          lane_row(thread_index() % kWarpLanes / 4),
          lane_quad(thread_index() % 4),
          num_rows(groups.totals->tokens - tile * groups.tile_rows < groups.tile_rows ? groups.totals->tokens - tile * groups.tile_rows
                                                                                      : groups.tile_rows),
          first_place(tile * groups.tile_rows * groups.num_slots),
          sums(reinterpret_cast<float*>(shared_memory()) + thread_index() / kWarpLanes * groups.tile_rows * kWarpCols) {}

    // Before z is there: what the warp will need of y, and of B where tiles are small and few, comes into L2.
    FM_DEVICE void prefetch() {
        prefetch_rows();
        if (groups.tile_rows <= kFewRows) prefetch_factors();
    }

    // y is read last: from memory while the products run.
    FM_DEVICE void prefetch_rows() {
        FM_NO_UNROLL
        for (int row = thread_index() % kWarpLanes; row < num_rows; row += kWarpLanes) {
            const int token = groups.tile_tokens[tile_idx * groups.tile_rows + row];
            const Number* from = static_cast<const Number*>(target.y) + token * target.y_stride + col;
            FM_UNROLL
            for (int c = 0; c < kWarpCols; c += 16) {
                if (col + c < target.out) prefetch_32(from + c);
            }
        }
    }

    // A row a lane, for the experts of the tile's first 32 pairs: run() takes them one after the other, a round trip to B for each.
    FM_DEVICE void prefetch_factors() {
        const int lane = thread_index() % kWarpLanes;
        const int pairs = groups.tile_counts[tile_idx];
        const int count = pairs < kWarpLanes ? pairs : kWarpLanes;
        if (count == 0) return;
        const TilePair own = groups.tile_pairs[first_place + (lane < count ? lane : 0)];
        const int own_rank = rank_of(target, own.expert);
        const Number* row = static_cast<const Number*>(target.b) + (col + lane < target.out ? col + lane : col) * target.b_row_stride;
        FM_NO_UNROLL
        for (int i = 0; i < count; i += static_cast<int>(shuffle(static_cast<unsigned>(own.run), i))) {
            const Number* factor = row + static_cast<int>(shuffle(static_cast<unsigned>(own.expert), i)) * target.b_adapter_stride;
            const int rank = static_cast<int>(shuffle(static_cast<unsigned>(own_rank), i));
            FM_NO_UNROLL
            for (int r = 0; r < rank; r += 16) prefetch_32(factor + r);
        }
    }

    FM_DEVICE void run() {
        const int end = first_place + groups.tile_counts[tile_idx];
        TilePair pair = groups.tile_pairs[first_place], next = pair;
        if (first_place + pair.run < end) next = groups.tile_pairs[first_place + pair.run];
        int rank = rank_of(target, pair.expert);
        FM_NO_UNROLL
        for (int place = first_place; place < end;) {
            // What the next runs need is loaded while this one is expanded.
            const int after = place + pair.run;
            const int next_rank = rank_of(target, next.expert);
            const TilePair last = next;
            if (after + last.run < end) next = groups.tile_pairs[after + last.run];
            expand(place, pair.run, pair.expert, rank);
            place = after;
            pair = last;
            rank = next_rank;
        }
        warp_barrier();  // every lane's products are in the sums
        if ((target.flags & kYAligned) != 0 && col + kWarpCols <= target.out) {
            finish<true>();
        } else {
            finish<false>();
        }
        warp_barrier();  // the sums have been read
    }

    // All pairs of one expert. One without ranks adds nothing, nor one whose scaling is 0, whatever its factors hold.
    FM_DEVICE void expand(int place, int count, int expert, int rank) {
        const float scaling = scaling_of(target, expert);
        if (rank <= 0) begin(place, count);
        FM_NO_UNROLL
        for (int first_rank = 0; first_rank < rank; first_rank += kRanks) {
            const int num_ranks = rank - first_rank;
            Operands steps[kExpandSteps];
            Source source(*this, place + lane_row, first_rank);
            if (kExpandSteps > 1) source.load(steps[0], lane_row < count, num_ranks);
            load_factor(expert, first_rank, num_ranks);
            if (scaling == 0.0f) {
                begin(place, count);
                return;
            }
            FM_NO_UNROLL
            for (int left = count; left > 0; left -= 8 * kExpandSteps) {
                if constexpr (kExpandSteps == 1) {
                    source.load(steps[0], lane_row < left, num_ranks);
                    multiply_pairs(steps[0], lane_row < left, first_rank, num_ranks);
                } else {
                    source.load(steps[1], lane_row < left - 8, num_ranks);
                    multiply_pairs(steps[0], lane_row < left, first_rank, num_ranks);
                    source.load(steps[0], lane_row < left - 16, num_ranks);
                    if (left > 8) multiply_pairs(steps[1], lane_row < left - 8, first_rank, num_ranks);
                }
            }
        }
    }

    // -0.0: where no expert has ranks, y + sum is y, and -0.0 too.
    FM_DEVICE void begin(int place, int count) {
        FM_NO_UNROLL
        for (int i = place; i < place + count; ++i) {
            const int row = groups.tile_pairs[i].row;
            if (row < 0) sums[~row * kWarpCols + thread_index() % kWarpLanes] = -0.0f;
        }
    }

    // B's values. Columns are permuted: those of a lane's products, of four mma, are the neighbours 8t .. 8t + 7. Past the last column its
    // row is read: those products are not used.
    FM_DEVICE void load_factor(int expert, int first_rank, int num_ranks) {
        const Number* factor = static_cast<const Number*>(target.b) + expert * target.b_adapter_stride + first_rank + 4 * lane_quad;
        if ((target.flags & kExpandAligned) != 0 && col + kWarpCols <= target.out && num_ranks % 4 == 0) {
            load_columns<true>(factor, num_ranks - 4 * lane_quad);
        } else {
            load_columns<false>(factor, num_ranks - 4 * lane_quad);
        }
    }

    template <bool kWhole>
    FM_DEVICE void load_columns(const Number* factor, int num_ranks) {
        FM_UNROLL
        for (int i = 0; i < 4 * kBlocks; ++i) {
            const int block = i % kBlocks, column = i / kBlocks;
            const int row = col + lane_row / 2 * 8 + 2 * column + lane_row % 2;
            const Number* from = factor + (kWhole || row < target.out ? row : target.out - 1) * target.b_row_stride + 16 * block;
            unsigned (&words)[2] = b[block][column];
            words[0] = words[1] = 0;
            if constexpr (kWhole) {
                if (16 * block < num_ranks) load_8(words, from);
            } else {
                load_values(words, from, num_ranks - 16 * block);
            }
        }
    }

    // Up to four values one by one; where there are none, zeros.
    FM_DEVICE void load_values(unsigned (&words)[2], const Number* from, int count) {
        FM_NO_UNROLL
        for (int i = count < 4 ? count - 1 : 3; i >= 0; --i) {
            words[1] = words[1] << 16 | words[0] >> 16;
            words[0] = words[0] << 16 | from[i].bits;
        }
    }

    // Up to 8 pairs of one expert: sums[row] += B z. Rows g of an mma are the high halves of z, rows g + 8 the low ones.
    FM_DEVICE void multiply_pairs(const Operands& operands, bool exists, int first_rank, int num_ranks) {
        float products[4][4] = {};
        FM_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
            if (block > 0 && 16 * block >= num_ranks) break;
            FM_UNROLL
            for (int i = 0; i < 4; ++i) multiply_accumulate(products[i], operands.z[block], b[block][i], Number{});
        }
        warp_barrier();  // what other lanes did to the sums is done
        if (!exists) return;
        const bool is_first = first_rank == 0 && operands.row < 0;
        FM_UNROLL
        for (int half = 0; half < 2; ++half) {
            Floats4& at =
                *reinterpret_cast<Floats4*>(sums + sums_at(operands.row < 0 ? ~operands.row : operands.row, 2 * lane_quad + half));
            Floats4 sum = {{-0.0f, -0.0f, -0.0f, -0.0f}};
            if (!is_first) sum = at;
            FM_UNROLL
            for (int c = 0; c < 4; ++c) {
                const float (&product)[4] = products[2 * half + c / 2];
                sum.values[c] = fused_multiply_add(add(product[c % 2], product[2 + c % 2]), operands.inverse, sum.values[c]);
            }
            at = sum;
        }
    }

    // The only rounding. y is what the next operation reads: it stays in L2. Four rows are loaded before the first one is stored.
    template <bool kWhole>
    FM_DEVICE void finish() {
        constexpr int kRows = kWhole ? 4 : 1;
        const int y_col = col + 8 * lane_quad;
        const int num_cols = kWhole ? 8 : target.out - y_col;
        const bool aligned = kWhole || (target.flags & kYAligned) != 0;
        const unsigned long long policy = evict_normal_policy();
        if (num_cols <= 0) return;
        FM_NO_UNROLL
        for (int first = lane_row; first < num_rows; first += 8 * kRows) {
            Number* rows[kRows];
            Octet<Number> octets[kRows];
            FM_UNROLL
            for (int i = 0; i < kRows; ++i) {
                const int row = first + 8 * i < num_rows ? first + 8 * i : first;
                rows[i] = static_cast<Number*>(target.y) + groups.tile_tokens[tile_idx * groups.tile_rows + row] * target.y_stride + y_col;
            }
            FM_UNROLL
            for (int i = 0; i < kRows; ++i) load_octet(octets[i], rows[i], num_cols, aligned, policy);
            FM_UNROLL
            for (int i = 0; i < kRows; ++i) {
                const int row = first + 8 * i;
                if (row >= num_rows) break;
                float values[8];
                widen_octet(values, octets[i], 1.0f);
                FM_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const Floats4 sum = *reinterpret_cast<const Floats4*>(sums + sums_at(row, 2 * lane_quad + half));
                    FM_UNROLL
                    for (int c = 0; c < 4; ++c) values[4 * half + c] = add(values[4 * half + c], sum.values[c]);
                }
                narrow_octet(octets[i], values);
                store_octet(rows[i], octets[i], num_cols, aligned, policy);
            }
        }
    }
};

// A block takes a tile of tokens and 256 columns of one target. Tiles count first: neighbours in the order by expert read the same B.
template <class Number, int kRanks, bool kPrefetch>
FM_DEVICE void run_expand_unit(const SgmvParams& params, int unit, int num_tiles) {
    int strip = unit / num_tiles;
    int target_idx = 0;
    while (strip >= (params.targets[target_idx].out + kExpandCols - 1) / kExpandCols) {
        strip -= (params.targets[target_idx++].out + kExpandCols - 1) / kExpandCols;
    }
    const int col = strip * kExpandCols + thread_index() / kWarpLanes * kWarpCols;
    if (col >= params.targets[target_idx].out) return;
    ExpandWarp<Number, kRanks> warp(params, params.targets[target_idx], unit % num_tiles, col);
    if constexpr (kPrefetch) {
        warp.prefetch();
    } else {
        warp.run();
    }
}

// Groups, ranks, B and y are older than the shrink, and may be read before the wait; z and inverses may not.
template <class Number, int kRanks>
FM_DEVICE void run_sgmv_expand(const SgmvParams& params) {
    const int num_tiles = (params.groups.totals->tokens + params.groups.tile_rows - 1) / params.groups.tile_rows;
    int num_strips = 0;
    for (int i = 0; i < params.num_targets; ++i) num_strips += (params.targets[i].out + kExpandCols - 1) / kExpandCols;
    if (block_index() < num_tiles * num_strips) run_expand_unit<Number, kRanks, true>(params, block_index(), num_tiles);
    grid_wait();
    FM_NO_UNROLL
    for (int unit = block_index(); unit < num_tiles * num_strips; unit += grid_size()) {
        run_expand_unit<Number, kRanks, false>(params, unit, num_tiles);
    }
}

}  // namespace fusedmerge
