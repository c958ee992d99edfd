// The kernels of fused application at decode: router, prologue, GEMV.
#include "fusedmerge/kernel/route.cuh"
#include "kernels.h"

namespace fusedmerge {
namespace {

const NamedKernel kKernels[] = {
    named_kernel<RouteParams, route_kernel<Bf16>>("route_bf16", kThreads),
    named_kernel<RouteParams, route_kernel<Fp16>>("route_fp16", kThreads),
};

}  // namespace

KernelFamily linear_kernels() { return {kKernels, static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace fusedmerge
