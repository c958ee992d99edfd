// Expand: y[t] = round(y[t] + sum over the token's experts, ascending, of gate scaling B[expert] z[pair]).
//
//   B      [out, r]            16 bytes a lane, global -> registers: mma's 16 rows are columns of y; held for all pairs of the expert
//   z      [T k, z_stride]     global -> registers: mma's 8 columns are pairs; gate scaling z is split into two 16-bit values
//   sums   [tile_rows, 256]    shared, float32; a warp owns 32 columns of every row
//   y      [T, out]            read and written once
//
// A tile is tile_rows tokens; its pairs are ordered by expert, so tensor cores see rows that share B, whatever each token chose. Their
// products go to the token's row of sums. Nobody but the warp touches its columns: no block barrier.
//
//   for each expert of the tile, 64 ranks:  load B | for 8 pairs:  load z, split | mma | sums[row] += products
//   for each row:  y = round(y + sums)
//
// z is scaled by a power of two for each pair and 64 ranks, so that neither half leaves a 16-bit type's range: high + low is z to 2^-18
// (bf16). Shared sums are swizzled: 16 bytes of columns 4c .. 4c + 3 lie at place c ^ (row % 8).
#pragma once

#include "sgmv_shrink.cuh"

namespace fusedmerge {

static_assert(kExpandCols == kThreads / kWarpLanes * kWarpCols, "each warp of a block has its columns");

FM_DEVICE float larger(float x, float y) { return x > y ? x : y; }

FM_DEVICE int sums_at(int row, int place) { return row * kWarpCols + 4 * (place ^ (row & 7)); }

// The power of two that brings `size` to [2^14, 2^15), within float32's range; and its inverse.
FM_DEVICE void find_scales(float size, float& scale, float& inverse) {
    const int exponent = static_cast<int>(float_to_bits(size) >> 23);
    const int field = 127 + 14 + 127 - exponent < 253 ? 127 + 14 + 127 - exponent : 253;
    scale = bits_to_float(static_cast<unsigned>(field) << 23);
    inverse = bits_to_float(static_cast<unsigned>(254 - field) << 23);
}

template <class Number>
struct ExpandWarp {
    static constexpr int kBlocks = kExpandRanks / 32;

    const SgmvParams& params;
    const SgmvTarget& target;
    const Groups& groups;
    const int tile_idx, col;         // the warp's first column
    const int lane_row, lane_quad;   // g and t of the fragment layout
    const int num_rows;              // tokens of the tile
    float* sums;                     // [tile_rows, kWarpCols], the warp's own
    Octet<Number> b[2][2][kBlocks];  // [16 columns][upper half][32 ranks]

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
          sums(reinterpret_cast<float*>(shared_memory()) + thread_index() / kWarpLanes * groups.tile_rows * kWarpCols) {}

    FM_DEVICE void run() {
        const TilePair* pairs = groups.tile_pairs + static_cast<long long>(tile_idx) * groups.tile_rows * groups.num_slots;
        const int num_pairs = groups.tile_counts[tile_idx];
        clear();
        FM_NO_UNROLL
        for (int first = 0; first < num_pairs;) {
            const int run = pairs[first].run;
            expand(pairs + first, run);
            first += run;
        }
        warp_barrier();  // every lane's products are in the sums
        finish();
        warp_barrier();  // the sums have been read
    }

    // -0.0: where no expert has ranks, y + sum is y, and -0.0 too.
    FM_DEVICE void clear() {
        for (int i = thread_index() % kWarpLanes; i < num_rows * kWarpCols; i += kWarpLanes) sums[i] = -0.0f;
    }

    // All pairs of one expert.
    FM_DEVICE void expand(const TilePair* pairs, int count) {
        const int expert = pairs[0].expert;
        const int rank = rank_of(target, expert);
        const float scaling = target.scaling != nullptr ? target.scaling[expert] : 1.0f;
        if (scaling == 0.0f) return;  // no adapter, whatever its factors hold
        FM_NO_UNROLL
        for (int first_rank = 0; first_rank < rank; first_rank += kExpandRanks) {
            load_factor(expert, first_rank, rank - first_rank);
            FM_NO_UNROLL
            for (int first = 0; first < count; first += 8) {
                multiply_pairs(pairs + first, count - first < 8 ? count - first : 8, first_rank, rank - first_rank, scaling);
            }
        }
    }

    // B's values of 64 ranks. Columns are permuted: a lane's four rows of the two mma are the neighbours 4g .. 4g + 3. Past the last
    // column its row is read: those products are not used.
    FM_DEVICE void load_factor(int expert, int first_rank, int num_ranks) {
        const Number* factor = static_cast<const Number*>(target.b) + expert * target.b_adapter_stride + first_rank;
        FM_UNROLL
        for (int i = 0; i < 4 * kBlocks; ++i) {
            const int row = col + 4 * lane_row + i / kBlocks;
            const int r = i % kBlocks * 32 + 8 * lane_quad;
            const Number* at = factor + (row < target.out ? row : target.out - 1) * target.b_row_stride + r;
            load_octet(b[i / kBlocks / 2][i / kBlocks % 2][i % kBlocks], at, num_ranks - r, (target.flags & kExpandAligned) != 0);
        }
    }

    // The lane's gate scaling z of a pair: 8 ranks of each 32. Ranks beyond the expert's are zero.
    FM_DEVICE void load_pair(float (&values)[kBlocks][8], int position, int first_rank, int num_ranks, float scaling) {
        const float gate = multiply(groups.pair_gates[position], scaling);
        const float* z = target.z + static_cast<long long>(position) * target.z_stride + first_rank;
        FM_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
            const int r = 32 * block + 8 * lane_quad;
            if (r >= padded_rank(num_ranks)) continue;
            unsigned words[8];
            load_16(words, z + r);
            load_16(words + 4, z + r + 4);
            FM_UNROLL
            for (int i = 0; i < 8; ++i) values[block][i] = gate != 0.0f ? multiply(gate, bits_to_float(words[i])) : 0.0f;
        }
    }

    // Up to 8 pairs of one expert, 64 ranks: sums[row] += B z.
    FM_DEVICE void multiply_pairs(const TilePair* pairs, int count, int first_rank, int num_ranks, float scaling) {
        float values[kBlocks][8] = {};
        if (lane_row < count) load_pair(values, pairs[lane_row].position, first_rank, num_ranks, scaling);
        warp_barrier();  // what other lanes did to the sums is done
        float size = 0.0f;
        FM_UNROLL
        for (int i = 0; i < 8 * kBlocks; ++i) size = larger(size, magnitude(values[i / 8][i % 8]));
        size = larger(size, bits_to_float(shuffle_xor(float_to_bits(size), 1)));
        size = larger(size, bits_to_float(shuffle_xor(float_to_bits(size), 2)));
        float scale, inverse;
        find_scales(size, scale, inverse);
        float products[2][4] = {};
        FM_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
            if (32 * block >= num_ranks) break;
            unsigned high[4], low[4];
            FM_UNROLL
            for (int i = 0; i < 4; ++i) {
                split_pair(high[i], low[i], multiply(values[block][2 * i], scale), multiply(values[block][2 * i + 1], scale));
            }
            FM_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int tile = i % 2, word = i / 2 * 2;
                const unsigned (&even)[4] = b[tile][0][block].words;
                const unsigned (&odd)[4] = b[tile][1][block].words;
                const unsigned fragment[4] = {even[word], odd[word], even[word + 1], odd[word + 1]};
                multiply_accumulate(products[tile], fragment, {high[word], high[word + 1]}, Number{});
                multiply_accumulate(products[tile], fragment, {low[word], low[word + 1]}, Number{});
            }
        }
        FM_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int pair = 2 * lane_quad + i;
            const float factor = bits_to_float(shuffle(float_to_bits(inverse), 4 * pair));
            if (pair >= count) continue;
            Floats4& at = *reinterpret_cast<Floats4*>(sums + sums_at(pairs[pair].row, lane_row));
            Floats4 sum = at;
            FM_UNROLL
            for (int c = 0; c < 4; ++c) sum.values[c] = fused_multiply_add(products[c / 2][c % 2 * 2 + i], factor, sum.values[c]);
            at = sum;
        }
    }

    // high + low = the values, to twice a 16-bit type's precision.
    FM_DEVICE void split_pair(unsigned& high, unsigned& low, float x, float y) {
        float rounded_x, rounded_y;
        high = narrow_pair(x, y, Number{});
        widen_pair(rounded_x, rounded_y, high, Number{});
        low = narrow_pair(add(x, -rounded_x), add(y, -rounded_y), Number{});
    }

    // The only rounding. y is what the next operation reads: it stays in L2.
    FM_DEVICE void finish() {
        const int y_col = col + 8 * lane_quad;
        const int num_cols = target.out - y_col;
        const unsigned long long policy = evict_normal_policy();
        FM_UNROLL_4
        for (int row = lane_row; row < num_rows; row += 8) {
            if (num_cols <= 0) break;
            const int token = groups.tile_tokens[tile_idx * groups.tile_rows + row];
            Number* y = static_cast<Number*>(target.y) + token * target.y_stride + y_col;
            Octet<Number> octet;
            float values[8];
            load_octet(octet, y, num_cols, (target.flags & kYAligned) != 0, policy);
            widen_octet(values, octet, 1.0f);
            FM_UNROLL
            for (int i = 0; i < 8; ++i) values[i] = add(values[i], sums[sums_at(row, 2 * lane_quad + i / 4) + i % 4]);
            store_values(y, values, num_cols, (target.flags & kYAligned) != 0, policy);
        }
    }
};

// A block takes a tile of tokens and 256 columns of one target. Tiles count first: neighbours in the order by expert read the same B.
template <class Number>
FM_DEVICE void run_sgmv_expand(const SgmvParams& params) {
    const int num_tiles = (params.groups.totals->tokens + params.groups.tile_rows - 1) / params.groups.tile_rows;
    int num_strips = 0;
    for (int i = 0; i < params.num_targets; ++i) num_strips += (params.targets[i].out + kExpandCols - 1) / kExpandCols;
    const long long num_units = static_cast<long long>(num_tiles) * num_strips;
    for (long long unit = block_index(); unit < num_units; unit += grid_size()) {
        int strip = static_cast<int>(unit / num_tiles);
        int target_idx = 0;
        while (strip >= (params.targets[target_idx].out + kExpandCols - 1) / kExpandCols) {
            strip -= (params.targets[target_idx++].out + kExpandCols - 1) / kExpandCols;
        }
        const int col = strip * kExpandCols + thread_index() / kWarpLanes * kWarpCols;
        if (col >= params.targets[target_idx].out) continue;
        ExpandWarp<Number> warp(params, params.targets[target_idx], static_cast<int>(unit % num_tiles), col);
        warp.run();
    }
}

}  // namespace fusedmerge
