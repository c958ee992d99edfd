// launch.h on the host simulator: device pointers are host pointers, and a launch runs the kernels' own sources.
#include <cstring>
#include <string>

#include "fusedmerge/kernel/switch.cuh"
#include "launch.h"

namespace fusedmerge {
namespace {

template <class Live, class Source, class Factor>
void enter(const void* params) {
    switch_kernel<Live, Source, Factor>(*static_cast<const SwitchParams*>(params));
}

sim::Entry find(const SwitchLaunch& launch) {
    if (launch.live == Number::kBf16 && launch.source == Number::kBf16 && launch.factor == Number::kBf16) return enter<Bf16, Bf16, Bf16>;
    if (launch.live == Number::kBf16 && launch.source == Number::kFp8E4M3 && launch.factor == Number::kBf16)
        return enter<Bf16, Fp8E4M3, Bf16>;
    if (launch.live == Number::kFloat32 && launch.source == Number::kFloat32) return enter<float, float, float>;
    return nullptr;
}

}  // namespace

bool launch_available() noexcept { return true; }

fusedmerge_result query_device(const char*, int, fusedmerge_device& device) noexcept {
    device = {4, 99 << 10};
    return FUSEDMERGE_OK;
}

fusedmerge_result prepare_switch(const char*, const SwitchLaunch&) noexcept { return FUSEDMERGE_OK; }

fusedmerge_result launch_switch(const char* operation, const SwitchLaunch& launch, const SwitchParams& params, fusedmerge_stream) noexcept {
    sim::Entry entry = find(launch);
    if (entry == nullptr) return fail(FUSEDMERGE_INTERNAL_ERROR, "%s: the simulator has no such kernel", operation);
    const sim::Options how{2, 1, 2, 2, 7};  // threads shuffled, copies at random
    std::string error = sim::launch(entry, &params, launch.grid, kThreads, launch.shared_bytes, how);
    return error.empty() ? FUSEDMERGE_OK : fail(FUSEDMERGE_CUDA_ERROR, "%s: %s", operation, error.c_str());
}

fusedmerge_result write_device(const char*, void* to, const void* from, size_t num_bytes, fusedmerge_stream) noexcept {
    std::memcpy(to, from, num_bytes);
    return FUSEDMERGE_OK;
}

fusedmerge_result zero_device(const char*, void* to, size_t num_bytes, fusedmerge_stream) noexcept {
    std::memset(to, 0, num_bytes);
    return FUSEDMERGE_OK;
}

fusedmerge_result read_device(const char*, void* to, const void* from, size_t num_bytes, fusedmerge_stream) noexcept {
    std::memcpy(to, from, num_bytes);
    return FUSEDMERGE_OK;
}

}  // namespace fusedmerge
