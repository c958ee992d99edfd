// Linears whose tokens each bring their own mixture of adapters, for T <= 16 tokens, at the speed of reading W once.
//
//   y[t] = round(W x[t] + bias + sum over slots j of gate[t,j] * scaling[ids[t,j]] * B[ids[t,j]] (A[ids[t,j]] x[t]) + residual[t])
//
//   | up to 4 targets | shape                  | dtype          | bytes moved, once per launch                               |
//   | weight          | [out, in]              | bf16, fp16     | read; the roofline                                         |
//   | a, b            | [N,r,in], [N,out,r]    | weight's       | read: the tokens' distinct adapters (a: all N of a router) |
//   | x, y            | [T, in], [T, out]      | weight's       | x is read by every block, from L2; y is written            |
//   | z               | [splits, T, slots, r]  | float32        | written by the prologue, read by the GEMV, in L2           |
//
// Floor, top-2 on Llama-2-7B: + 4.8 % of the backbone's bytes at r = 64, + 1.2 % at r = 16. Two launches:
//
//   prologue   x, and z = A x            grid: a block for each 64 KB of A        prologue.cuh
//   gemv       W x, and + B z            persistent, two blocks a multiprocessor  gemv.cuh
//
// Both are launched programmatically: the second fills its rings with W while the first runs (for T <= 8 up to 13 MB over 132
// multiprocessors; where a block of the first sits, shared memory leaves room for one of the second, not two).
// No atomics, no spinning, no state between launches; a token's bits depend on its own x, ids and gates alone (products.cuh), not on the
// batch, the grid or the run.
#pragma once

#include "gemv.cuh"
#include "prologue.cuh"

namespace fusedmerge {

template <int kTokenTiles>
constexpr int kPrologueSharedBytes = static_cast<int>(sizeof(PrologueMemory<kTokenTiles>));
template <int kTokenTiles>
constexpr int kGemvSharedBytes = static_cast<int>(sizeof(GemvMemory<kTokenTiles>));
static_assert(kPrologueSharedBytes<1> == 72032 && kPrologueSharedBytes<2> == 78528, "fusedmerge/backend/linear.py states other sizes");
static_assert(kGemvSharedBytes<1> == 95040 && kGemvSharedBytes<2> == 99200, "fusedmerge/backend/linear.py states other sizes");

template <class T, int kTokenTiles>
FM_KERNEL(kThreads)
prologue_kernel(const FM_GRID_CONSTANT LinearParams params) {
    run_prologue<T, kTokenTiles>(params);
}

template <class T, int kTokenTiles>
FM_KERNEL_OF(kThreads, kBlocksPerMultiprocessor)
gemv_kernel(const FM_GRID_CONSTANT LinearParams params) {
    run_gemv<T, kTokenTiles>(params);
}

}  // namespace fusedmerge
