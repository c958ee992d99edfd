// The dot products of sixteen rows with every token of a small batch: what shrink and GEMV share.
//
//   rows    [16, in]           W's or A's; the A operand of m16n8k16
//   tokens  [8 or 16, in]      x; the B operand, one or two tiles of eight tokens. So a token's arithmetic is the same in every batch
//
// A warp's chunk is 32 columns. Lane (g, t) holds columns 8t..8t+7 of rows g and g + 8 and of token g: 16 bytes each, which feed two mma,
// because rows and tokens permute the columns alike. A block's warps take chunks w, w + 8, ...; each warp adds in two chains (one for each
// mma of a chunk), so that no chain is longer than in / 16. The warps' sums are added in float32 in a fixed tree.
#pragma once

#include "linear_params.cuh"
#include "route.cuh"

namespace fusedmerge {

constexpr int kChunkCols = 32;
constexpr int kStepCols = kWarps * kChunkCols;  // columns of a block's step

// The sums of a block's warps, in shared memory.
template <int kTokenTiles>
struct Partials {
    alignas(16) float sums[kWarps][kMmaRows][8 * kTokenTiles];

    // Where a row has a token: with two tiles, every other pair of rows has them the other way round, so that a warp's stores meet no bank
    // twice.
    FM_DEVICE static int place(int row, int token) { return kTokenTiles == 1 ? token : token ^ (row << 2 & 8); }

    FM_DEVICE float total(int row, int token) const {
        float all[8];
        FM_UNROLL
        for (int w = 0; w < kWarps; ++w) all[w] = sums[w][row][place(row, token)];
        return sum_eight(all);
    }
};

template <class T, int kTokenTiles>
struct Products {
    float acc[2][kTokenTiles][4];  // [mma of a chunk][tile of tokens][fragment]

    FM_DEVICE void clear() {
        FM_UNROLL
        for (int i = 0; i < 8 * kTokenTiles; ++i) acc[i / 4 % 2][i / 8][i % 4] = 0.0f;
    }

    // A chunk: the lane's octets of rows g and g + 8, and of its tokens.
    FM_DEVICE void add_chunk(const Words4 (&rows)[2], const Words4 (&tokens)[kTokenTiles]) {
        FM_UNROLL
        for (int i = 0; i < 2; ++i) {
            const unsigned a[4] = {rows[0].words[2 * i], rows[1].words[2 * i], rows[0].words[2 * i + 1], rows[1].words[2 * i + 1]};
            FM_UNROLL
            for (int n = 0; n < kTokenTiles; ++n) {
                const unsigned b[2] = {tokens[n].words[2 * i], tokens[n].words[2 * i + 1]};
                multiply_accumulate(acc[i][n], a, b, T{});
            }
        }
    }

    // Leaves the sums of all warps in `partials`.
    FM_DEVICE void share(Partials<kTokenTiles>& partials) const {
        int lane = thread_index() % kWarpLanes;
        block_barrier();  // the last tile's have been used
        FM_UNROLL
        for (int i = 0; i < 2 * kTokenTiles; ++i) {
            const int row = lane / 4 + i % 2 * 8;
            float* pair = &partials.sums[thread_index() / kWarpLanes][row][partials.place(row, i / 2 * 8 + lane % 4 * 2)];
            const float (&x)[4] = acc[0][i / 2];
            const float (&y)[4] = acc[1][i / 2];
            *reinterpret_cast<Floats2*>(pair) = {add(x[i % 2 * 2], y[i % 2 * 2]), add(x[i % 2 * 2 + 1], y[i % 2 * 2 + 1])};
        }
        block_barrier();  // all warps' are visible
    }
};

// What each token takes, in shared memory, the routings' slots side by side. Of known ids, tokens from T on take nothing.
template <int kTokenTiles>
struct Routing {
    static constexpr int kPitch = kMaxSlots + 1;  // tokens lie in different banks

    int ids[8 * kTokenTiles][kPitch];  // -1: empty
    float gates[8 * kTokenTiles][kPitch];

    // Known ids; block-wide; false: no slot is used. An id outside [0, N) is an empty slot: nothing out of bounds is read. So is one whose
    // gate is 0.
    FM_DEVICE bool read(const LinearParams& params) {
        bool used = false;
        for (int i = thread_index(); i < 8 * kTokenTiles * params.num_slots; i += kThreads) {
            int id = i < params.tokens * params.num_slots ? params.ids[i] : -1;
            float gate = id >= 0 && id < params.num_adapters ? params.gates[i] : 0.0f;
            bool valid = gate != 0.0f;
            ids[i / params.num_slots][i % params.num_slots] = valid ? id : -1;
            gates[i / params.num_slots][i % params.num_slots] = gate;
            used |= valid;
        }
        return block_any(used);
    }

    // From the prologue's logits, for the routings whose bits are set: a warp for each token of each. What it leaves is visible after the
    // next barrier. The first block hands them out, too.
    FM_DEVICE void choose_all(const LinearParams& params, int bits) {
        const int lane = thread_index() % kWarpLanes;
        int token = thread_index() / kWarpLanes;
        int routing = 0;
        for (int i = token; i < params.num_routings * params.tokens; i += kWarps, token += kWarps) {
            for (; token >= params.tokens; token -= params.tokens) ++routing;
            if ((bits >> routing & 1) == 0) continue;
            const Slot slot = choose(params.logits + i * params.num_adapters, params.num_adapters, params.num_slots, params.normalize != 0);
            if (lane < params.num_slots) {
                ids[token][routing * params.num_slots + lane] = slot.id;
                gates[token][routing * params.num_slots + lane] = slot.gate;
            }
            if (lane < params.num_slots && block_index() == 0) {
                params.ids[i * params.num_slots + lane] = slot.id;
                params.gates[i * params.num_slots + lane] = slot.gate;
            }
        }
    }
};

}  // namespace fusedmerge
