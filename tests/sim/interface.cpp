// The simulator library's C interface: plan a switch, run it, ask for version and struct layouts. Pointers are host pointers.
#include <cstddef>
#include <string>

#include "describe.h"
#include "fusedmerge/kernel/switch.cuh"
#include "kernels.h"
#include "plan.h"
#include "ptx.h"

namespace {

using namespace fusedmerge;

static_assert(kSwitchSharedBytes<Bf16> == kMmaSharedBytes && kSwitchSharedBytes<float> == kSimtSharedBytes, "plan.h states another size");
static_assert(kResidentExtraBytes == kMmaResidentExtraBytes, "plan.h states another size");

using SimOptions = sim::Options;

thread_local std::string last_error;

template <class Live, class Source, class Factor>
void enter(const void* params) {
    switch_kernel<Live, Source, Factor>(*static_cast<const SwitchParams*>(params));
}

struct Kernel {
    sim::Entry entry = nullptr;
    int shared_bytes = 0;
};

template <class Live, class Source>
Kernel pick_factor(Number live, Number factor) {
    if (factor == Number::kFloat32) return {enter<Live, Source, float>, kSwitchSharedBytes<float>};
    if constexpr (!kSame<Live, float>) {
        if (factor == live) return {enter<Live, Source, Live>, kSwitchSharedBytes<Live>};
    }
    return {};
}

template <class Live>
Kernel pick_source(Number live, Number source, Number factor) {
    if (source == Number::kFloat32) return pick_factor<Live, float>(live, factor);
    if (source == Number::kFp8E4M3) return pick_factor<Live, Fp8E4M3>(live, factor);
    if constexpr (kSame<Live, float>) {
        if (source == Number::kBf16) return pick_factor<Live, Bf16>(live, factor);
        if (source == Number::kFp16) return pick_factor<Live, Fp16>(live, factor);
    } else {
        if (source == live) return pick_factor<Live, Live>(live, factor);
    }
    return {};
}

Kernel pick(Number live, Number source, Number factor) {
    switch (live) {
        case Number::kBf16:
            return pick_source<Bf16>(live, source, factor);
        case Number::kFp16:
            return pick_source<Fp16>(live, source, factor);
        case Number::kFloat32:
            return pick_source<float>(live, source, factor);
        default:
            return {};
    }
}

std::string type_name(int number) {
    constexpr const char* kNames[] = {"fusedmerge::Bf16", "fusedmerge::Fp16", "float", "fusedmerge::Fp8E4M3"};
    return kNames[number];
}

// What the compiler calls a kernel of kernels.h: "gemv_bf16_16" is gemv_kernel<fusedmerge::Bf16, 2>, its tiles being 8 tokens wide.
std::string ptx_name(const std::string& name) {
    for (int number : {0, 1}) {
        size_t at = name.find(number == 0 ? "_bf16" : "_fp16");
        if (at == std::string::npos) continue;
        int size = at + 5 < name.size() ? std::stoi(name.substr(at + 6)) : 0;  // ranks; or tokens, of which a tile has 8
        if (name.rfind("sgmv", 0) != 0) size /= 8;
        return name.substr(0, at) + "_kernel<" + type_name(number) + (size > 0 ? ", " + std::to_string(size) : "") + ">";
    }
    return name + "_kernel";
}

}  // namespace

extern "C" {

// 0 = planned; otherwise result->error says why not.
int fm_sim_plan(const PlanRequest* request, SwitchSegment* segments, PlanResult* result) {
    return plan_switch(*request, segments, *result) ? 0 : 1;
}

// 0 = the launch ended; otherwise fm_sim_error() says what the simulator objected to.
int fm_sim_switch(int live, int source, int factor, const SwitchParams* params, int grid, int shared_bytes, const sim::Options* options) {
    Kernel kernel = pick(static_cast<Number>(live), static_cast<Number>(source), static_cast<Number>(factor));
    if (kernel.entry == nullptr) {
        last_error = "no such combination of dtypes";
        return 1;
    }
    if (shared_bytes < kernel.shared_bytes + (params->resident_chunks > 1 ? kResidentExtraBytes : 0)) {
        last_error = "the kernel needs more shared memory";
        return 1;
    }
    if (ptx::in_use()) {
        std::string name = "switch_kernel<" + type_name(live) + ", " + type_name(source) + ", " + type_name(factor) + ">";
        last_error = ptx::run(name, params, sizeof(SwitchParams), grid, kThreads, shared_bytes, *options);
    } else {
        last_error = sim::launch(kernel.entry, params, grid, kThreads, shared_bytes, *options);
    }
    return last_error.empty() ? 0 : 1;
}

// The same for a kernel of kernels.h.
int fm_sim_kernel(const char* name, const void* params, int params_bytes, int grid, int shared_bytes, const sim::Options* options) {
    const NamedKernel* kernel = find_kernel(name);
    if (kernel == nullptr || kernel->params_bytes != params_bytes) {
        last_error = std::string(kernel == nullptr ? "no such kernel: " : "params of another size: ") + name;
        return 1;
    }
    if (ptx::in_use()) {
        last_error = ptx::run(ptx_name(name), params, params_bytes, grid, kernel->threads, shared_bytes, *options);
    } else {
        auto entry = reinterpret_cast<sim::Entry>(const_cast<void*>(kernel->kernel));
        last_error = sim::launch(entry, params, grid, kernel->threads, shared_bytes, *options);
    }
    return last_error.empty() ? 0 : 1;
}

// From now on launches execute this PTX (null: the kernels' C++ again), and count their traffic, if that is wanted.
void fm_sim_use_ptx(const char* text, int counts) { ptx::use(text, counts != 0); }
void fm_sim_traffic(ptx::Traffic* since_last) { *since_last = ptx::take_traffic(); }

void fm_sim_hide(void* from, long long num_bytes) { sim::hide(from, num_bytes); }

const char* fm_sim_error() { return last_error.c_str(); }

int fm_sim_shared_bytes(int factor) {
    return factor == static_cast<int>(Number::kFloat32) ? kSwitchSharedBytes<float> : kSwitchSharedBytes<Bf16>;
}

float fm_sim_dot(float c, const float* a, const float* b, int depth, int extra_bits) {
    return sim::dot_truncated(c, a, b, depth, extra_bits);
}
float fm_sim_fp16(float x) { return sim::fp16_to_float(sim::float_to_fp16(x)); }
unsigned fm_sim_bf16(float x) { return sim::float_to_bf16(x); }
float fm_sim_fp8(unsigned bits) { return widen_fp8(bits); }

// The package's version that this library was built for (fusedmerge/backend/sim.py compares it, and the layouts, with its own).
const char* fm_sim_version() { return FUSEDMERGE_VERSION; }

// "Struct.field offset size" lines for what kernels, planner and simulator read, for the equality test with Python.
const char* fm_sim_layout() {
    static const std::string layout = [] {
        std::string text = describe_structs();
        FM_FIELD(SimOptions, thread_order);
        FM_FIELD(SimOptions, tensor_core);
        FM_FIELD(SimOptions, async_copies);
        FM_FIELD(SimOptions, resident_blocks);
        FM_FIELD(SimOptions, seed);
        return text;
    }();
    return layout.c_str();
}

}  // extern "C"
