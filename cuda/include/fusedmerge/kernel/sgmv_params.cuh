// What the host hands to the grouping and SGMV kernels: plain structs, as in params.cuh. Strides count elements.
// Shape letters: T tokens, k slots of a token, N adapters, r rank. A pair is (token, expert): one adapter that one token uses.
#pragma once

#include "params.cuh"

namespace fusedmerge {

constexpr int kGroupTokens = kThreads;  // tokens that a grouping block orders: one a thread
constexpr int kShrinkPairs = 16;        // pairs of one expert that a warp shrinks together
constexpr int kPartCols = 512;          // columns of x in one chain of mma; the parts' sums are added in order
constexpr int kWarpCols = 32;           // columns of y that a warp expands
constexpr int kExpandCols = 256;        // columns that a block expands
constexpr int kFewRanks = 16;           // ranks that a warp's registers hold, of either kernel: in launches that have no more
constexpr int kManyRanks = 64;          // in others; ranks of a pair's z that share a power of two
constexpr int kExpandBlocks = 2;        // of a multiprocessor at once
constexpr int kSgmvTargets = 4;         // of one launch: they share x

// Bits of SgmvTarget::flags: where 16-byte accesses are aligned in every row of y, of x and a, of b.
enum SgmvFlags { kYAligned = 1, kShrinkAligned = 2, kExpandAligned = 4 };

// Up to kShrinkPairs pairs of one expert, at neighbouring positions of the order by expert.
struct ShrinkGroup {
    int expert;
    int position;  // of the first
    int count;
    int reserved;
};

// A pair in the order by expert.
struct alignas(16) Pair {
    int token;
    float gate;
    int expert;
    int place;  // in the order by tile: its row of z
};

// A pair within its tile of tokens. The pairs of a tile are ordered by expert, those of an expert by row.
struct alignas(16) TilePair {
    int expert;
    int run;  // pairs of this expert in the tile from here on
    int row;  // the token's place in the tile; its complement where the token has no lower expert
    int reserved;
};

// How many there are: known on the device alone.
struct GroupTotals {
    int pairs;
    int tokens;  // that have an expert
    int shrink_groups;
    int reserved;
};

// Tokens sorted into groups, once for all layers that share ids and gates. All memory is on the device.
struct Groups {
    GroupTotals* totals;
    Pair* pairs;                 // [T k] by position
    ShrinkGroup* shrink_groups;  // [at most T k / kShrinkPairs + min(N, T k)]
    int* tile_tokens;            // [T] tokens that have an expert, ordered by key; tile i has tile_rows of them
    TilePair* tile_pairs;        // [tiles, tile_rows k]
    int* tile_counts;            // [tiles] pairs of each tile
    int tile_rows;
    int num_slots;  // k
};

// Of index i: pairs of expert i, and tokens of key i.
struct GroupCount {
    int pairs;
    int tokens;
};

struct GroupStart {
    int pair;   // position of the first pair of expert i
    int token;  // place of the first token of key i
    int group;  // first shrink group of expert i
    int count;  // pairs of expert i
};

// A token's key: the buckets of its lowest and its second lowest expert. Experts fall into buckets of equal size, in order.
struct GroupParams {
    Groups groups;
    const int* ids;      // [T, k]; outside [0, N) = no expert
    const float* gates;  // [T, k]
    GroupCount* counts;  // [chunks, indices] of kGroupTokens tokens each; after the scan: of all chunks before
    GroupStart* starts;  // [indices]
    int* positions;      // [T, k] of each pair; -1 = none
    int num_tokens;      // T
    int num_adapters;    // N
    int num_indices;     // the larger of N and the number of keys
    int lowest_buckets;
    int second_buckets;
    int reserved;
};

// One adapted matrix.
struct SgmvTarget {
    void* y;                     // [T, out] Number, added to
    const void* a;               // [N, r, in] Number
    const void* b;               // [N, out, r] Number
    const float* scaling;        // [N]; null = 1
    const int* ranks;            // [N] actual rank of each adapter here, 0 = absent; null = r for all
    float* parts;                // [parts, T k, z_stride] by position, where z is in parts
    unsigned* z;                 // [places, z_stride] gate scaling z by place, split (sgmv_split.cuh)
    float* inverses;             // [ranks / kManyRanks, places] of the powers of two in z
    long long y_stride;          // elements between rows
    long long a_adapter_stride;  // elements between adapters
    long long a_row_stride;      // elements between ranks
    long long b_adapter_stride;
    long long b_row_stride;
    int out;
    int rank;      // r
    int z_stride;  // r, padded to kRankStep
    int flags;     // SgmvFlags
};

struct SgmvParams {
    Groups groups;
    const void* x;       // [T, in] Number
    long long x_stride;  // elements between rows
    int cols;            // in
    int num_pairs;       // T k: rows of a part of z
    int num_places;      // tiles tile_rows k: rows of z
    int num_parts;       // of z: all of in's, for sgmv_sum to add, or 1 where the shrink adds them itself
    int num_targets;     // of this launch
    int reserved;
    SgmvTarget targets[kSgmvTargets];
};

}  // namespace fusedmerge
