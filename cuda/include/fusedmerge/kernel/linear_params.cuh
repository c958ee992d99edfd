// What the host hands to the kernels of fused application (decode): plain structs, mirrored in fusedmerge/backend/linear_params.py.
// Strides count elements. Shape letters: T tokens, N adapters, k slots of a token, r rank (any; not padded).
#pragma once

#include "params.cuh"

namespace fusedmerge {

constexpr int kMaxTokens = 16;    // T of prologue and GEMV
constexpr int kMaxTargets = 4;    // matrices that share one x in a launch
constexpr int kMmaRows = 16;      // ranks of an adapter that a block multiplies with x at a time
constexpr int kTileRows = 32;     // rows of a weight
constexpr int kSplitCols = 2048;  // columns of x that one unit of the shrink covers; z is a sum over splits
constexpr int kZPitchStep = 8;    // z's ranks are padded to a multiple of this with zeros

// Where every row begins at a multiple of 16 bytes. Bits of LinearTarget::flags, of LinearParams::flags and of RouteParams::flags.
enum TargetFlags { kTargetWeightAligned = 1, kTargetAAligned = 2, kTargetBAligned = 4 };
enum SourceFlags { kXAligned = 1, kInputAligned = 2, kSecondAligned = 4, kNormAligned = 8, kSumAligned = 16, kRouterAligned = 32 };
constexpr int kRouterWide = 64;  // beside them: the router is float32

// The argument of `route`.
struct RouteParams {
    const void* x;            // [T, in]
    const void* router;       // [N, in], of x's type or float32
    const int* mask;          // [T]; 0 = padding; null = no padding
    int* ids;                 // [T, k], written
    float* gates;             // [T, k], written
    long long x_stride;       // between tokens
    long long router_stride;  // between adapters
    int cols;                 // in
    int num_adapters;         // N
    int num_slots;            // k, at most kMaxSlots
    int normalize;            // softmax over the top k (k > 1), not over all N
    int flags;                // kXAligned, kRouterAligned, kRouterWide
    int reserved;
};

// One matrix of the group that shares x, with its adapters.
struct LinearTarget {
    const void* weight;          // [out, in]
    const void* a;               // [N, r, in]
    const void* b;               // [N, out, r]
    const float* scaling;        // [N]; null = 1
    const void* bias;            // [out]; null = none
    const void* residual;        // [T, out]; null = none
    void* y;                     // [T, out], written
    float* z;                    // [splits, T, slots, z_pitch], workspace: A x before gate and scaling
    long long weight_stride;     // between rows
    long long a_adapter_stride;  // between adapters
    long long a_row_stride;      // between ranks
    long long b_adapter_stride;
    long long b_row_stride;
    long long residual_stride;  // between tokens
    long long y_stride;
    int rows;             // out
    int rank;             // r
    int z_pitch;          // r padded to a multiple of kZPitchStep
    int first_tile;       // tiles of kTileRows rows of all targets before this one
    int first_rank_tile;  // tiles of kMmaRows ranks of all targets before this one
    int routing;          // whose choice of adapters its tokens take, of the launch's num_routings
    int flags;            // TargetFlags
    int reserved;
};

// How x comes about. Each arrow is one rounding to x's dtype.
enum SourceKind {
    kSourcePlain = 0,  // x = input
    kSourceNorm = 1,   // sum = input (+ second ->); x = norm_weight (sum / sqrt(mean(sum^2) + epsilon) ->) ->
    kSourceSilu = 2,   // x = (silu(input) ->) second ->
};

// The argument of prologue and GEMV.
struct LinearParams {
    LinearTarget targets[kMaxTargets];
    // Of each routing, where there are routers: [N, in], of x's type, or all float32; and elements between adapters.
    const void* routers[kMaxTargets];
    long long router_strides[kMaxTargets];
    const void* x;            // [T, in]: input itself, or what the prologue writes
    const void* input;        // [T, in]
    const void* second;       // [T, in]; null = none
    const void* norm_weight;  // [in]
    void* sum;                // [T, in], written: the residual stream; null = not wanted. Not input, nor second
    int* ids;                 // [routings, T, k]: read, or written where there are routers; -1 = empty slot
    float* gates;             // [routings, T, k]: read, or written where there are routers
    float* logits;            // [routings, T, N], workspace of routers; null = ids and gates are known
    long long x_stride;       // between tokens
    long long input_stride;
    long long second_stride;
    long long sum_stride;
    float epsilon;
    int source;  // SourceKind
    int tokens;  // T, at most kMaxTokens
    int cols;    // in
    int num_targets;
    int num_tiles;       // of kTileRows rows, of all targets
    int num_rank_tiles;  // of kMmaRows ranks, of all targets
    int num_splits;      // of kSplitCols columns
    int num_adapters;    // N
    int num_routings;    // routers, or 1
    int num_slots;       // k of each routing; of all, at most kMaxSlots
    int normalize;       // as RouteParams
    int flags;           // SourceFlags
    int reserved;
};

}  // namespace fusedmerge
