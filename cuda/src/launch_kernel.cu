// Launches of named kernels, and of functions that a just-in-time compiler made; both with a programmatic edge where one is asked for.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>

#include "kernels.h"
#include "launch.h"
#include "launch_check.h"

namespace fusedmerge {
namespace {

constexpr int kProgrammaticVersion = 90;  // PTX for compute capability 9.0 and later has the instructions that wait inside

fusedmerge_result find(const char* operation, const char* name, const NamedKernel*& kernel) noexcept {
    kernel = find_kernel(name);
    if (kernel != nullptr) return FUSEDMERGE_OK;
    return fail(FUSEDMERGE_INTERNAL_ERROR, "%s: kernel: expected one of the library's, got \"%s\"", operation, name);
}

// An entry point of the driver, looked up until it is found: it stays where it is as long as the process lives, so that threads which look
// at the same time find the same.
template <class Function>
cudaError_t load(const char* name, std::atomic<Function>& function) noexcept {
    if (function.load(std::memory_order_relaxed) != nullptr) return cudaSuccess;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status);
#else
    cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status);
#endif
    if (error == cudaSuccess && status != cudaDriverEntryPointSuccess) error = cudaErrorSymbolNotFound;
    if (error == cudaSuccess) function.store(reinterpret_cast<Function>(found), std::memory_order_relaxed);
    return error;
}

struct Driver {
    std::atomic<CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**)> launch{nullptr};
    std::atomic<CUresult (*)(CUresult, const char**)> error_name{nullptr};
};

Driver driver;

fusedmerge_result load_driver(const char* operation) noexcept {
    cudaError_t error = load("cuLaunchKernelEx", driver.launch);
    if (error == cudaSuccess) error = load("cuGetErrorName", driver.error_name);
    return check(error, operation);
}

}  // namespace

fusedmerge_result prepare_kernel(const char* operation, const char* name, bool& takes_edge) noexcept {
    const NamedKernel* kernel = nullptr;
    if (fusedmerge_result result = find(operation, name, kernel)) return result;
    int ordinal = 0;
    fusedmerge_device device{};
    if (fusedmerge_result result = check(cudaGetDevice(&ordinal), operation)) return result;
    if (fusedmerge_result result = query_device(operation, ordinal, device)) return result;
    // Which code the device runs is the driver's choice: it is asked, not the device.
    cudaFuncAttributes attributes{};
    if (fusedmerge_result result = check(cudaFuncGetAttributes(&attributes, kernel->kernel), operation)) return result;
    takes_edge = attributes.ptxVersion >= kProgrammaticVersion;
    return check(cudaFuncSetAttribute(kernel->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes_per_block),
                 operation);
}

fusedmerge_result launch_kernel(const char* operation, const KernelLaunch& launch, const void* params, int params_bytes,
                                fusedmerge_stream stream) noexcept {
    const NamedKernel* kernel = nullptr;
    if (fusedmerge_result result = find(operation, launch.name, kernel)) return result;
    if (params_bytes != kernel->params_bytes) {
        return fail(FUSEDMERGE_INTERNAL_ERROR, "%s: params of %s: expected %d bytes, got %d", operation, launch.name, kernel->params_bytes,
                    params_bytes);
    }
    cudaLaunchAttribute edge{};
    edge.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    edge.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(launch.grid));
    config.blockDim = dim3(static_cast<unsigned>(kernel->threads));
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = stream;
    config.attrs = &edge;
    config.numAttrs = launch.programmatic ? 1 : 0;
    void* arguments[] = {const_cast<void*>(params)};
    return check(cudaLaunchKernelExC(&config, kernel->kernel, arguments), operation);
}

fusedmerge_result launch_function(const char* operation, const FunctionLaunch& launch, const void* params,
                                  fusedmerge_stream stream) noexcept {
    // The driver launches into the thread's current context, and a thread that has only allocated may have none yet.
    int ordinal = 0;
    if (fusedmerge_result result = check(cudaGetDevice(&ordinal), operation)) return result;
    if (fusedmerge_result result = check(cudaSetDevice(ordinal), operation)) return result;
    if (fusedmerge_result result = load_driver(operation)) return result;
    CUlaunchAttribute edge{};
    edge.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    edge.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config{};
    config.gridDimX = static_cast<unsigned>(launch.grid);
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
    config.blockDimX = static_cast<unsigned>(launch.threads);
    config.sharedMemBytes = static_cast<unsigned>(launch.shared_bytes);
    config.hStream = stream;
    config.attrs = &edge;
    config.numAttrs = launch.programmatic ? 1 : 0;
    void* arguments[] = {const_cast<void*>(params)};
    CUresult error = driver.launch.load()(&config, static_cast<CUfunction>(launch.function), arguments, nullptr);
    if (error == CUDA_SUCCESS) return FUSEDMERGE_OK;
    const char* name = nullptr;
    driver.error_name.load()(error, &name);
    return fail(FUSEDMERGE_CUDA_ERROR, "%s: CUDA driver: expected success, got %s", operation, name ? name : "an error without a name");
}

}  // namespace fusedmerge
