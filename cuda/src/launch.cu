// The device side of the C API: one CUDA runtime call for each thing that it asks for, and its error.
#include <cuda_runtime_api.h>

#include "instances.h"
#include "launch.h"
#include "launch_check.h"
#include "layout.h"

namespace fusedmerge {
namespace {

const SwitchInstance* find(const SwitchLaunch& launch) noexcept { return find_switch_instance(launch.live, launch.source, launch.factor); }

fusedmerge_result no_instance(const char* operation, const SwitchLaunch& launch) noexcept {
    return fail(FUSEDMERGE_INTERNAL_ERROR, "%s: kernel: expected one for dtypes %d, %d and %d, got none", operation,
                static_cast<int>(launch.live), static_cast<int>(launch.source), static_cast<int>(launch.factor));
}

}  // namespace

bool launch_available() noexcept { return true; }

fusedmerge_result query_device(const char* operation, int ordinal, fusedmerge_device& device) noexcept {
    fusedmerge_device found{};
    cudaError_t error = cudaDeviceGetAttribute(&found.num_multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&found.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
    }
    if (error == cudaSuccess) device = found;
    return check(error, operation);
}

// The limit is raised to all that the device has, not to this plan's need: another plan of the same kernel may need more.
fusedmerge_result prepare_switch(const char* operation, const SwitchLaunch& launch) noexcept {
    const SwitchInstance* instance = find(launch);
    if (instance == nullptr) return no_instance(operation, launch);
    int ordinal = 0;
    fusedmerge_device device{};
    if (fusedmerge_result result = check(cudaGetDevice(&ordinal), operation)) return result;
    if (fusedmerge_result result = query_device(operation, ordinal, device)) return result;
    if (launch.shared_bytes > device.shared_bytes_per_block) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: shared memory: expected a plan for at most %d bytes a block (device %d), got %d",
                    operation, device.shared_bytes_per_block, ordinal, launch.shared_bytes);
    }
    return check(cudaFuncSetAttribute(instance->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes_per_block),
                 operation);
}

fusedmerge_result launch_switch(const char* operation, const SwitchLaunch& launch, const SwitchParams& params,
                                fusedmerge_stream stream) noexcept {
    const SwitchInstance* instance = find(launch);
    if (instance == nullptr) return no_instance(operation, launch);
    SwitchParams copy = params;
    void* arguments[] = {&copy};
    return check(cudaLaunchKernel(instance->kernel, dim3(static_cast<unsigned>(launch.grid)), dim3(kThreads), arguments,
                                  static_cast<size_t>(launch.shared_bytes), stream),
                 operation);
}

fusedmerge_result write_device(const char* operation, void* to, const void* from, size_t num_bytes, fusedmerge_stream stream) noexcept {
    if (fusedmerge_result result = check(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyHostToDevice, stream), operation)) return result;
    return check(cudaStreamSynchronize(stream), operation);
}

fusedmerge_result zero_device(const char* operation, void* to, size_t num_bytes, fusedmerge_stream stream) noexcept {
    return check(cudaMemsetAsync(to, 0, num_bytes, stream), operation);
}

fusedmerge_result read_device(const char* operation, void* to, const void* from, size_t num_bytes, fusedmerge_stream stream) noexcept {
    if (fusedmerge_result result = check(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyDeviceToHost, stream), operation)) return result;
    return check(cudaStreamSynchronize(stream), operation);
}

}  // namespace fusedmerge
