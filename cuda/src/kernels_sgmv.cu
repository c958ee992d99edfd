// The kernels of fused application for many tokens: grouping, shrink, expand.
#include "fusedmerge/kernel/sgmv.cuh"
#include "kernels.h"

namespace fusedmerge {
namespace {

FM_KERNEL(kThreads) group_histogram_kernel(const GroupParams params) { run_group_histogram(params); }
FM_KERNEL(kThreads) group_scan_kernel(const GroupParams params) { run_group_scan(params); }
FM_KERNEL(kThreads) group_scatter_kernel(const GroupParams params) { run_group_scatter(params); }
FM_KERNEL(kThreads) group_tiles_kernel(const GroupParams params) { run_group_tiles(params); }
FM_KERNEL(kThreads) group_small_kernel(const GroupParams params) { run_group_small(params); }

const NamedKernel kKernels[] = {
    named_kernel<GroupParams, group_histogram_kernel>("group_histogram", kThreads),
    named_kernel<GroupParams, group_scan_kernel>("group_scan", kThreads),
    named_kernel<GroupParams, group_scatter_kernel>("group_scatter", kThreads),
    named_kernel<GroupParams, group_tiles_kernel>("group_tiles", kThreads),
    named_kernel<GroupParams, group_small_kernel>("group_small", kThreads),
    named_kernel<SgmvParams, sgmv_shrink_kernel<Bf16, kFewRanks>>("sgmv_shrink_bf16_16", kThreads),
    named_kernel<SgmvParams, sgmv_shrink_kernel<Bf16, kManyRanks>>("sgmv_shrink_bf16_64", kThreads),
    named_kernel<SgmvParams, sgmv_shrink_kernel<Fp16, kFewRanks>>("sgmv_shrink_fp16_16", kThreads),
    named_kernel<SgmvParams, sgmv_shrink_kernel<Fp16, kManyRanks>>("sgmv_shrink_fp16_64", kThreads),
    named_kernel<SgmvParams, sgmv_sum_kernel<Bf16>>("sgmv_sum_bf16", kThreads),
    named_kernel<SgmvParams, sgmv_sum_kernel<Fp16>>("sgmv_sum_fp16", kThreads),
    named_kernel<SgmvParams, sgmv_expand_kernel<Bf16, kFewRanks>>("sgmv_expand_bf16_16", kThreads),
    named_kernel<SgmvParams, sgmv_expand_kernel<Bf16, kManyRanks>>("sgmv_expand_bf16_64", kThreads),
    named_kernel<SgmvParams, sgmv_expand_kernel<Fp16, kFewRanks>>("sgmv_expand_fp16_16", kThreads),
    named_kernel<SgmvParams, sgmv_expand_kernel<Fp16, kManyRanks>>("sgmv_expand_fp16_64", kThreads),
};

}  // namespace

KernelFamily sgmv_kernels() { return {kKernels, static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace fusedmerge
