// SGMV: each token's own mixture of adapters beside a linear, for many tokens, without merging.
//
//   y[t] = round(y[t] + sum over the experts e of token t, ascending, of gate[t, e] scaling[e] B[e] (A[e] x[t]))         sums in float32
//
//   |            | shape           | dtype       | bytes moved                                                                       |
//   | x          | [T, in]         | bf16, fp16  | read once from HBM, k times from L2; targets of a launch share it                 |
//   | a          | [N, r, in]      | x's         | experts in use once from HBM, once for each 128 of an expert's pairs from L2      |
//   | z          | [T k, r]        | two of x's  | written once; read once for each 256 columns of y, from L2                        |
//   | b          | [N, out, r]     | x's         | experts in use once from HBM, once for each tile of tokens that has them from L2  |
//   | y          | [T, out]        | x's         | read and written once; may be a column range of packed qkv                        |
//
// Launches: group.cuh's four, or one, once for a forward; then two or three for each set of linears that share x, on any grid: blocks walk
// units.
//
//   group (group.cuh)   ids, gates -> pairs by expert, tiles of tokens
//   shrink              z = gate scaling A x, a warp for 16 pairs of one expert and 64 ranks, or 16 where a launch has no more
//   sum                 few pairs alone: A x in float32 parts -> z
//   expand              y += B z, a block for a tile of tokens and 256 columns, all experts of the tile inside
//
// Sum and expand are launched programmatically (sm_90 and later): they begin when the kernel before has no block left to start, and wait
// inside, every thread, for it to have ended. The shrink is a plain launch. So what came before it (groups, ranks, scaling, A, B, x, y) has
// ended when they begin, and may be read before the wait; parts, z and inverses may not.
//
// An element's arithmetic depends on its token's own experts alone, in ascending order. After Punica's SGMV (arXiv 2310.18547), with
// several gated experts for a token, and LoRA-Switch's mixtures (arXiv 2405.17741).
#pragma once

#include "group.cuh"
#include "sgmv_expand.cuh"
#include "sgmv_shrink.cuh"

namespace fusedmerge {

template <class Number, int kRanks>
FM_KERNEL_OF(kThreads, kRanks == kFewRanks ? 2 : 1)
sgmv_shrink_kernel(const SgmvParams params) {
    run_sgmv_shrink<Number, kRanks>(params);
}

template <class Number>
FM_KERNEL(kThreads)
sgmv_sum_kernel(const SgmvParams params) {
    run_sgmv_sum<Number>(params);
}

template <class Number, int kRanks>
FM_KERNEL_OF(kThreads, kExpandBlocks)
sgmv_expand_kernel(const SgmvParams params) {
    run_sgmv_expand<Number, kRanks>(params);
}

}  // namespace fusedmerge
