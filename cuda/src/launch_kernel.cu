// Launches of named kernels, and of functions that a just-in-time compiler made; both with a programmatic edge where one is asked for.
#include <cuda.h>
#include <cuda_runtime_api.h>

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

// Which code the device runs is the driver's choice: it is asked, not the device.
cudaError_t has_edge(const void* kernel, bool& programmatic) noexcept {
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    programmatic = error == cudaSuccess && attributes.ptxVersion >= kProgrammaticVersion;
    return error;
}

struct Driver {
    CUresult (*launch)(const CUlaunchConfig*, CUfunction, void**, void**) = nullptr;
    CUresult (*attribute)(int*, CUfunction_attribute, CUfunction) = nullptr;
    CUresult (*error_name)(CUresult, const char**) = nullptr;
};

template <class Function>
cudaError_t load(const char* name, Function& function) noexcept {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status);
#else
    cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status);
#endif
    if (error == cudaSuccess && status != cudaDriverEntryPointSuccess) error = cudaErrorSymbolNotFound;
    function = reinterpret_cast<Function>(found);
    return error;
}

fusedmerge_result load_driver(const char* operation, Driver& driver) noexcept {
    cudaError_t error = load("cuLaunchKernelEx", driver.launch);
    if (error == cudaSuccess) error = load("cuFuncGetAttribute", driver.attribute);
    if (error == cudaSuccess) error = load("cuGetErrorName", driver.error_name);
    return check(error, operation);
}

}  // namespace

fusedmerge_result prepare_kernel(const char* operation, const char* name) noexcept {
    const NamedKernel* kernel = nullptr;
    if (fusedmerge_result result = find(operation, name, kernel)) return result;
    int ordinal = 0;
    fusedmerge_device device{};
    if (fusedmerge_result result = check(cudaGetDevice(&ordinal), operation)) return result;
    if (fusedmerge_result result = query_device(operation, ordinal, device)) return result;
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
    bool programmatic = false;
    if (launch.programmatic) {
        if (fusedmerge_result result = check(has_edge(kernel->kernel, programmatic), operation)) return result;
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
    config.numAttrs = programmatic ? 1 : 0;
    void* arguments[] = {const_cast<void*>(params)};
    return check(cudaLaunchKernelExC(&config, kernel->kernel, arguments), operation);
}

fusedmerge_result launch_function(const char* operation, const FunctionLaunch& launch, const void* params,
                                  fusedmerge_stream stream) noexcept {
    // The driver launches into the thread's current context, and a thread that has only allocated may have none yet.
    int ordinal = 0;
    if (fusedmerge_result result = check(cudaGetDevice(&ordinal), operation)) return result;
    if (fusedmerge_result result = check(cudaSetDevice(ordinal), operation)) return result;
    Driver driver;
    if (fusedmerge_result result = load_driver(operation, driver)) return result;
    auto function = static_cast<CUfunction>(launch.function);
    int ptx_version = 0;
    CUresult error = CUDA_SUCCESS;
    if (launch.programmatic) error = driver.attribute(&ptx_version, CU_FUNC_ATTRIBUTE_PTX_VERSION, function);
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
    config.numAttrs = ptx_version >= kProgrammaticVersion ? 1 : 0;
    void* arguments[] = {const_cast<void*>(params)};
    if (error == CUDA_SUCCESS) error = driver.launch(&config, function, arguments, nullptr);
    if (error == CUDA_SUCCESS) return FUSEDMERGE_OK;
    const char* name = nullptr;
    driver.error_name(error, &name);
    return fail(FUSEDMERGE_CUDA_ERROR, "%s: CUDA driver: expected success, got %s", operation, name ? name : "an error without a name");
}

}  // namespace fusedmerge
