// The library as built without nvcc: it plans and checks; whatever needs a device says why it cannot be had.
#include "launch.h"

namespace fusedmerge {
namespace {

fusedmerge_result refuse(const char* operation) noexcept {
    return fail(FUSEDMERGE_NOT_AVAILABLE, "%s: library: expected one with CUDA, got one that was built without nvcc", operation);
}

}  // namespace

bool launch_available() noexcept { return false; }

fusedmerge_result query_device(const char* operation, int, fusedmerge_device&) noexcept { return refuse(operation); }

fusedmerge_result prepare_switch(const char* operation, const SwitchLaunch&) noexcept { return refuse(operation); }

fusedmerge_result launch_switch(const char* operation, const SwitchLaunch&, const SwitchParams&, fusedmerge_stream) noexcept {
    return refuse(operation);
}

fusedmerge_result prepare_kernel(const char* operation, const char*, bool&) noexcept { return refuse(operation); }

fusedmerge_result launch_kernel(const char* operation, const KernelLaunch&, const void*, int, fusedmerge_stream) noexcept {
    return refuse(operation);
}

fusedmerge_result launch_function(const char* operation, const FunctionLaunch&, const void*, fusedmerge_stream) noexcept {
    return refuse(operation);
}

fusedmerge_result write_device(const char* operation, void*, const void*, size_t, fusedmerge_stream) noexcept { return refuse(operation); }

fusedmerge_result zero_device(const char* operation, void*, size_t, fusedmerge_stream) noexcept { return refuse(operation); }

fusedmerge_result read_device(const char* operation, void*, const void*, size_t, fusedmerge_stream) noexcept { return refuse(operation); }

}  // namespace fusedmerge
