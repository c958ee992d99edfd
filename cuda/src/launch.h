// What the C API needs of a device. launch.cu is CUDA; launch_none.cpp stands in where no nvcc was at hand; tests/cpp/launch_sim.cpp runs
// the kernels on the host simulator, so that everything above this interface is tested without a GPU.
#pragma once

#include <cstddef>

#include "error.h"
#include "fusedmerge/kernel/params.cuh"
#include "numbers.h"

namespace fusedmerge {

struct SwitchLaunch {
    Number live;
    Number source;
    Number factor;
    int grid;
    int shared_bytes;
};

// A launch of a kernel of kernels.h. Programmatic: it may start before the stream's last kernel has ended, and waits for it inside
// (grid_wait); only for code that takes such an edge, which is code for compute capability 9.0 or later.
struct KernelLaunch {
    const char* name;
    int grid;
    int shared_bytes;
    bool programmatic;
};

bool launch_available() noexcept;

// `operation` is the function of the C API that asks, for messages.
fusedmerge_result query_device(const char* operation, int ordinal, fusedmerge_device& device) noexcept;

// The current device's kernel may use the shared memory that launches of it need.
fusedmerge_result prepare_switch(const char* operation, const SwitchLaunch& launch) noexcept;
fusedmerge_result launch_switch(const char* operation, const SwitchLaunch& launch, const SwitchParams& params,
                                fusedmerge_stream stream) noexcept;

// The same for a kernel that has a name. takes_edge: whether launches of it may be programmatic. `params` is copied before launch_kernel
// returns.
fusedmerge_result prepare_kernel(const char* operation, const char* name, bool& takes_edge) noexcept;
fusedmerge_result launch_kernel(const char* operation, const KernelLaunch& launch, const void* params, int params_bytes,
                                fusedmerge_stream stream) noexcept;

// The same for a function of the driver's (a CUfunction): what a just-in-time compiler made and its loader readied.
struct FunctionLaunch {
    void* function;
    int grid;
    int threads;
    int shared_bytes;
    bool programmatic;
};
fusedmerge_result launch_function(const char* operation, const FunctionLaunch& launch, const void* params,
                                  fusedmerge_stream stream) noexcept;

// In the stream's order. `from` may be reused when write_device returns; `to` is filled when read_device returns.
fusedmerge_result write_device(const char* operation, void* to, const void* from, size_t num_bytes, fusedmerge_stream stream) noexcept;
fusedmerge_result zero_device(const char* operation, void* to, size_t num_bytes, fusedmerge_stream stream) noexcept;
fusedmerge_result read_device(const char* operation, void* to, const void* from, size_t num_bytes, fusedmerge_stream stream) noexcept;

}  // namespace fusedmerge
