// Fused application on the CPU, from the arguments of the CUDA kernels (fusedmerge/kernel/lora_linear.cuh tells what they compute):
//
//     x = source(input);  ids, gates = route(x);  z = A x     prologue
//     y = round(W x + sum of gate scaling B z + bias + residual)     GEMV, which reads W once, whatever T is
//
//   | x, W, A, B, y | bf16 or fp16                                                                                |
//   | z             | float32 [T, k, z_pitch] of each target: of the slots that are used, whoever chose them |
//
// Pipeline: x is widened to float32 (for W: once a launch, or left as pairs of bfloat16 where the processor multiplies those) -> threads
// take the next 16 rows from one counter -> each row is a dot product in vectors of float32, two chains of at most 1,024 columns, then sums
// of those; B z goes on in the same vectors -> bias, residual, one rounding. An element's arithmetic depends on nothing but its own row and
// token: not on T, on the thread or on the launch.
#pragma once

#include "fusedmerge/kernel/linear_params.cuh"
#include "merge_cpu.h"

namespace fusedmerge {

// One instruction set's. Throw std::bad_alloc before any write.
struct LinearKernels {
    void (*prologue)(const LinearParams& params, Dtype dtype, int threads);
    void (*gemv)(const LinearParams& params, Dtype dtype, int threads);
    void (*add)(const LinearParams& params, Dtype dtype, int threads);  // any T; the first target's y += B z; no W, no routers
    void (*route)(const RouteParams& params, Dtype dtype, int tokens, int threads);
};

extern const LinearKernels linear_portable, linear_avx2, linear_avx512, linear_avx512bf16;

}  // namespace fusedmerge
