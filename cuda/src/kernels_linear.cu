// The kernels of fused application at decode: router, prologue, GEMV.
#include "fusedmerge/kernel/lora_linear.cuh"
#include "kernels.h"

namespace fusedmerge {
namespace {

const NamedKernel kKernels[] = {
    named_kernel<RouteParams, route_kernel<Bf16>>("route_bf16", kThreads),
    named_kernel<LinearParams, prologue_kernel<Bf16, 1>>("prologue_bf16_8", kThreads),
    named_kernel<LinearParams, prologue_kernel<Bf16, 2>>("prologue_bf16_16", kThreads),
    named_kernel<LinearParams, gemv_kernel<Bf16, 1>>("gemv_bf16_8", kThreads),
    named_kernel<LinearParams, gemv_kernel<Bf16, 2>>("gemv_bf16_16", kThreads),
    named_kernel<RouteParams, route_kernel<Fp16>>("route_fp16", kThreads),
    named_kernel<LinearParams, prologue_kernel<Fp16, 1>>("prologue_fp16_8", kThreads),
    named_kernel<LinearParams, prologue_kernel<Fp16, 2>>("prologue_fp16_16", kThreads),
    named_kernel<LinearParams, gemv_kernel<Fp16, 1>>("gemv_fp16_8", kThreads),
    named_kernel<LinearParams, gemv_kernel<Fp16, 2>>("gemv_fp16_16", kThreads),
};

}  // namespace

KernelFamily linear_kernels() { return {kKernels, static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0]))}; }

}  // namespace fusedmerge
