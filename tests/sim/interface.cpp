// The simulator library's C interface: plan a switch, run it, ask for version and struct layouts. Pointers are host pointers.
#include <cstddef>
#include <string>

#include "fusedmerge/kernel/switch.cuh"
#include "plan.h"

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
    last_error = sim::launch(kernel.entry, params, grid, kThreads, shared_bytes, *options);
    return last_error.empty() ? 0 : 1;
}

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

#define FIELD(type, field) \
    text += #type "." #field " " + std::to_string(offsetof(type, field)) + " " + std::to_string(sizeof(type::field)) + "\n"

// "Struct.field offset size" lines for what the kernels read, for the equality test with Python.
const char* fm_sim_layout() {
    static const std::string layout = [] {
        std::string text;
        FIELD(SwitchSegment, live);
        FIELD(SwitchSegment, source);
        FIELD(SwitchSegment, a);
        FIELD(SwitchSegment, b);
        FIELD(SwitchSegment, scaling);
        FIELD(SwitchSegment, ranks);
        FIELD(SwitchSegment, source_scale);
        FIELD(SwitchSegment, live_stride);
        FIELD(SwitchSegment, source_stride);
        FIELD(SwitchSegment, a_adapter_stride);
        FIELD(SwitchSegment, a_row_stride);
        FIELD(SwitchSegment, b_adapter_stride);
        FIELD(SwitchSegment, b_row_stride);
        FIELD(SwitchSegment, scale_stride);
        FIELD(SwitchSegment, first_unit);
        FIELD(SwitchSegment, rows);
        FIELD(SwitchSegment, cols);
        FIELD(SwitchSegment, rank);
        FIELD(SwitchSegment, scale_row_shift);
        FIELD(SwitchSegment, scale_col_shift);
        FIELD(SwitchSegment, unit_rows);
        FIELD(SwitchSegment, flags);
        FIELD(SwitchSegment, reserved);
        FIELD(SwitchState, valid);
        FIELD(SwitchState, num_last);
        FIELD(SwitchState, ticket);
        FIELD(SwitchState, status);
        FIELD(SwitchState, last_ids);
        FIELD(SwitchState, last_gates);
        FIELD(SwitchParams, segments);
        FIELD(SwitchParams, state);
        FIELD(SwitchParams, ids);
        FIELD(SwitchParams, gates);
        FIELD(SwitchParams, num_units);
        FIELD(SwitchParams, num_segments);
        FIELD(SwitchParams, num_slots);
        FIELD(SwitchParams, num_adapters);
        FIELD(SwitchParams, inplace);
        FIELD(SwitchParams, check_finite);
        FIELD(SwitchParams, resident_chunks);
        return text;
    }();
    return layout.c_str();
}

// The same for what the planner and the simulator read.
const char* fm_sim_host_layout() {
    static const std::string layout = [] {
        std::string text;
        FIELD(PlanRequest, live);
        FIELD(PlanRequest, source);
        FIELD(PlanRequest, factor);
        FIELD(PlanRequest, inplace);
        FIELD(PlanRequest, num_segments);
        FIELD(PlanRequest, num_adapters);
        FIELD(PlanRequest, num_slots);
        FIELD(PlanRequest, num_multiprocessors);
        FIELD(PlanRequest, shared_bytes_limit);
        FIELD(PlanRequest, unit_rows);
        FIELD(PlanResult, num_units);
        FIELD(PlanResult, live_bytes);
        FIELD(PlanResult, source_bytes);
        FIELD(PlanResult, adapter_bytes);
        FIELD(PlanResult, bank_bytes);
        FIELD(PlanResult, table_bytes);
        FIELD(PlanResult, grid);
        FIELD(PlanResult, shared_bytes);
        FIELD(PlanResult, resident_chunks);
        FIELD(PlanResult, error);
        FIELD(SimOptions, thread_order);
        FIELD(SimOptions, tensor_core);
        FIELD(SimOptions, async_copies);
        FIELD(SimOptions, resident_blocks);
        FIELD(SimOptions, seed);
        return text;
    }();
    return layout.c_str();
}
#undef FIELD

}  // extern "C"
