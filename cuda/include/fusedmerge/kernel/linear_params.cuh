// What the host hands to the kernels of fused application (decode): plain structs, mirrored in fusedmerge/backend/linear_params.py.
// Strides count elements. Shape letters: T tokens, N adapters, k slots of a token, r rank (any; not padded).
#pragma once

#include "params.cuh"

namespace fusedmerge {

// The argument of `route`. Aligned: rows of x and router begin at multiples of 16 bytes.
struct RouteParams {
    const void* x;            // [T, in]
    const void* router;       // [N, in]
    const int* mask;          // [T]; 0 = padding; null = no padding
    int* ids;                 // [T, k], written
    float* gates;             // [T, k], written
    long long x_stride;       // between tokens
    long long router_stride;  // between adapters
    int cols;                 // in
    int num_adapters;         // N
    int num_slots;            // k, at most kMaxSlots
    int normalize;            // softmax over the top k (k > 1), not over all N
    int x_aligned;
    int router_aligned;
};

}  // namespace fusedmerge
