// The C API: check -> plan -> launch -> error check. Nothing here is CUDA; launch.h is all that is asked of a device.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>
#include <utility>
#include <vector>

#include "launch.h"
#include "layout.h"
#include "numbers.h"
#include "plan.h"

using namespace fusedmerge;

static_assert(FUSEDMERGE_BF16 == static_cast<int>(Number::kBf16) && FUSEDMERGE_FP16 == static_cast<int>(Number::kFp16) &&
                  FUSEDMERGE_FLOAT32 == static_cast<int>(Number::kFloat32) && FUSEDMERGE_FP8_E4M3 == static_cast<int>(Number::kFp8E4M3),
              "the C API numbers dtypes in another way");

struct fusedmerge_switch_plan {
    PlanRequest request;
    PlanResult result;
    int check_finite;
    std::vector<SwitchSegment> segments;

    // Workspace: the segments, then the state.
    SwitchState* state_in(void* workspace) const {
        return reinterpret_cast<SwitchState*>(static_cast<SwitchSegment*>(workspace) + segments.size());
    }

    SwitchLaunch launch() const {
        return {static_cast<Number>(request.live), static_cast<Number>(request.source), static_cast<Number>(request.factor), result.grid,
                result.shared_bytes};
    }
};

namespace fusedmerge {
namespace {

thread_local char last_error[512];

}  // namespace

fusedmerge_result fail(fusedmerge_result result, const char* format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    return result;
}

namespace {

fusedmerge_result bad(const char* operation, const char* field, const char* expected, long long got) noexcept {
    return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: %s: expected %s, got %lld", operation, field, expected, got);
}

fusedmerge_result null(const char* operation, const char* field) noexcept {
    return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: %s: expected a pointer, got null", operation, field);
}

fusedmerge_result check_options(const char* operation, const fusedmerge_switch_options& options) noexcept {
    if (options.options_size != sizeof(options) || options.target_size != sizeof(fusedmerge_switch_target)) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT,
                    "%s: options: expected sizes of %zu and %zu bytes (FUSEDMERGE_SWITCH_OPTIONS_INIT of this version), got %zu and %zu",
                    operation, sizeof(options), sizeof(fusedmerge_switch_target), options.options_size, options.target_size);
    }
    if (options.mode != FUSEDMERGE_EXACT && options.mode != FUSEDMERGE_INPLACE) {
        return bad(operation, "options.mode", "FUSEDMERGE_EXACT (0) or FUSEDMERGE_INPLACE (1)", options.mode);
    }
    if (options.safe != 0 && options.safe != 1) return bad(operation, "options.safe", "0 or 1", options.safe);
    if (options.reserved != 0) return bad(operation, "options.reserved", "0", options.reserved);
    return FUSEDMERGE_OK;
}

// What the planner does not know: a base that is live itself, scales of a base that has none.
fusedmerge_result check_target(const char* operation, const fusedmerge_switch_options& options, const fusedmerge_switch_target& target,
                               int i) noexcept {
    const bool inplace = options.mode == FUSEDMERGE_INPLACE;
    if (target.reserved != 0) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: target %d: reserved: expected 0, got %d", operation, i, target.reserved);
    }
    if (inplace && target.base != nullptr) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: target %d: base: expected null in place, got a pointer", operation, i);
    }
    if (!inplace && target.base != nullptr && target.base == target.live) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: target %d: base: expected storage apart from live, got live", operation, i);
    }
    if (target.base_scale == nullptr) return FUSEDMERGE_OK;
    if (options.base_dtype != FUSEDMERGE_FP8_E4M3) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: target %d: base_scale: expected null for a base that is not fp8, got a pointer",
                    operation, i);
    }
    if (target.base_scale_row_shift < 0 || target.base_scale_row_shift > 31 || target.base_scale_col_shift < 3 ||
        target.base_scale_col_shift > 31) {
        return FUSEDMERGE_OK;  // the planner says so
    }
    if (target.rows <= 0 || target.cols <= 0 || (target.rows - 1) >> target.base_scale_row_shift == 0) return FUSEDMERGE_OK;
    const int num_scales = ((target.cols - 1) >> target.base_scale_col_shift) + 1;
    if (target.base_scale_stride < num_scales) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: target %d: base_scale_stride: expected at least %d, got %lld", operation, i,
                    num_scales, static_cast<long long>(target.base_scale_stride));
    }
    return FUSEDMERGE_OK;
}

SwitchSegment segment_of(const fusedmerge_switch_target& target, bool inplace) noexcept {
    SwitchSegment s{};
    s.live = target.live;
    s.source = inplace ? target.live : target.base;
    s.a = target.a;
    s.b = target.b;
    s.scaling = target.scaling;
    s.ranks = target.ranks;
    s.source_scale = target.base_scale;
    s.live_stride = target.live_stride;
    s.source_stride = inplace ? target.live_stride : target.base_stride;
    s.a_adapter_stride = target.a_adapter_stride;
    s.a_row_stride = target.a_row_stride;
    s.b_adapter_stride = target.b_adapter_stride;
    s.b_row_stride = target.b_row_stride;
    s.scale_stride = target.base_scale_stride;
    s.rows = target.rows;
    s.cols = target.cols;
    s.rank = target.rank;
    s.scale_row_shift = target.base_scale == nullptr ? 31 : target.base_scale_row_shift;
    s.scale_col_shift = target.base_scale == nullptr ? 31 : target.base_scale_col_shift;
    return s;
}

PlanRequest request_of(const fusedmerge_switch_options& options, int num_targets) noexcept {
    PlanRequest request{};
    request.live = options.live_dtype;
    request.source = options.base_dtype;
    request.factor = options.factor_dtype;
    request.inplace = options.mode == FUSEDMERGE_INPLACE;
    request.num_segments = num_targets;
    request.num_adapters = options.num_adapters;
    request.num_slots = options.max_slots;
    request.num_multiprocessors = options.device.num_multiprocessors;
    request.shared_bytes_limit = options.device.shared_bytes_per_block;
    return request;
}

fusedmerge_result create_plan(const char* operation, const fusedmerge_switch_options& options, const fusedmerge_switch_target* targets,
                              int num_targets, fusedmerge_switch_plan** plan) {
    fusedmerge_switch_plan made{};
    made.request = request_of(options, num_targets);
    made.check_finite = options.safe;
    made.segments.reserve(static_cast<size_t>(num_targets));
    for (int i = 0; i < num_targets; ++i) {
        if (fusedmerge_result result = check_target(operation, options, targets[i], i)) return result;
        made.segments.push_back(segment_of(targets[i], made.request.inplace != 0));
    }
    if (!plan_switch(made.request, made.segments.data(), made.result)) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: %s", operation, made.result.error);
    }
    *plan = new fusedmerge_switch_plan(std::move(made));
    return FUSEDMERGE_OK;
}

fusedmerge_result check_workspace(const char* operation, const fusedmerge_switch_plan* plan, const void* workspace) noexcept {
    if (plan == nullptr) return null(operation, "plan");
    if (workspace == nullptr) return null(operation, "workspace");
    auto address = reinterpret_cast<uintptr_t>(workspace);
    if (address % 16 != 0) return bad(operation, "workspace", "16-byte alignment", static_cast<long long>(address));
    return FUSEDMERGE_OK;
}

}  // namespace
}  // namespace fusedmerge

extern "C" {

int fusedmerge_version(void) { return FUSEDMERGE_VERSION; }

int fusedmerge_has_cuda(void) { return launch_available(); }

const char* fusedmerge_last_error(void) { return last_error; }

const char* fusedmerge_result_name(fusedmerge_result result) {
    switch (result) {
        case FUSEDMERGE_OK:
            return "FUSEDMERGE_OK";
        case FUSEDMERGE_INVALID_ARGUMENT:
            return "FUSEDMERGE_INVALID_ARGUMENT";
        case FUSEDMERGE_OUT_OF_MEMORY:
            return "FUSEDMERGE_OUT_OF_MEMORY";
        case FUSEDMERGE_NOT_AVAILABLE:
            return "FUSEDMERGE_NOT_AVAILABLE";
        case FUSEDMERGE_CUDA_ERROR:
            return "FUSEDMERGE_CUDA_ERROR";
        case FUSEDMERGE_INTERNAL_ERROR:
            return "FUSEDMERGE_INTERNAL_ERROR";
    }
    return "unknown";
}

fusedmerge_result fusedmerge_device_query(int ordinal, fusedmerge_device* device) {
    if (device == nullptr) return null(__func__, "device");
    return query_device(__func__, ordinal, *device);
}

fusedmerge_result fusedmerge_switch_plan_create(const fusedmerge_switch_options* options, const fusedmerge_switch_target* targets,
                                                int32_t num_targets, fusedmerge_switch_plan** plan) {
    if (plan == nullptr) return null(__func__, "plan");
    *plan = nullptr;
    if (options == nullptr) return null(__func__, "options");
    if (num_targets < 0) return bad(__func__, "num_targets", "at least 0", num_targets);
    if (targets == nullptr && num_targets > 0) return null(__func__, "targets");
    if (fusedmerge_result result = check_options(__func__, *options)) return result;
    try {
        return create_plan(__func__, *options, targets, num_targets, plan);
    } catch (const std::bad_alloc&) {
        return fail(FUSEDMERGE_OUT_OF_MEMORY, "%s: host memory: expected room for %d targets, got none", __func__, num_targets);
    } catch (const std::exception& error) {
        return fail(FUSEDMERGE_INTERNAL_ERROR, "%s: %s", __func__, error.what());
    }
}

void fusedmerge_switch_plan_destroy(fusedmerge_switch_plan* plan) { delete plan; }

fusedmerge_result fusedmerge_switch_plan_query(const fusedmerge_switch_plan* plan, fusedmerge_switch_figures* figures) {
    if (plan == nullptr) return null(__func__, "plan");
    if (figures == nullptr) return null(__func__, "figures");
    const PlanResult& result = plan->result;
    *figures = {result.table_bytes, result.live_bytes, result.source_bytes, result.adapter_bytes,
                result.bank_bytes,  result.num_units,  result.grid,         result.shared_bytes};
    return FUSEDMERGE_OK;
}

fusedmerge_result fusedmerge_switch_init(const fusedmerge_switch_plan* plan, void* workspace, size_t workspace_bytes,
                                         fusedmerge_stream stream) {
    if (fusedmerge_result result = check_workspace(__func__, plan, workspace)) return result;
    if (workspace_bytes < static_cast<size_t>(plan->result.table_bytes)) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: workspace_bytes: expected at least %lld, got %zu", __func__, plan->result.table_bytes,
                    workspace_bytes);
    }
    if (fusedmerge_result result = prepare_switch(__func__, plan->launch())) return result;
    if (fusedmerge_result result = zero_device(__func__, plan->state_in(workspace), sizeof(SwitchState), stream)) return result;
    if (plan->segments.empty()) return FUSEDMERGE_OK;
    return write_device(__func__, workspace, plan->segments.data(), plan->segments.size() * sizeof(SwitchSegment), stream);
}

fusedmerge_result fusedmerge_switch_run(const fusedmerge_switch_plan* plan, void* workspace, const int32_t* ids, const float* gates,
                                        int32_t num_slots, fusedmerge_stream stream) {
    if (fusedmerge_result result = check_workspace(__func__, plan, workspace)) return result;
    if (num_slots < 0 || num_slots > plan->request.num_slots) {
        return fail(FUSEDMERGE_INVALID_ARGUMENT, "%s: num_slots: expected 0 to %d (the plan's max_slots), got %d", __func__,
                    plan->request.num_slots, num_slots);
    }
    if (ids == nullptr && num_slots > 0) return null(__func__, "ids");
    if (gates == nullptr && num_slots > 0) return null(__func__, "gates");
    SwitchParams params{};
    params.segments = static_cast<const SwitchSegment*>(workspace);
    params.state = plan->state_in(workspace);
    params.ids = ids;
    params.gates = gates;
    params.num_units = plan->result.num_units;
    params.num_segments = plan->request.num_segments;
    params.num_slots = num_slots;
    params.num_adapters = plan->request.num_adapters;
    params.inplace = plan->request.inplace;
    params.check_finite = plan->check_finite;
    params.resident_chunks = plan->result.resident_chunks;
    return launch_switch(__func__, plan->launch(), params, stream);
}

fusedmerge_result fusedmerge_switch_invalidate(const fusedmerge_switch_plan* plan, void* workspace, fusedmerge_stream stream) {
    if (fusedmerge_result result = check_workspace(__func__, plan, workspace)) return result;
    return zero_device(__func__, &plan->state_in(workspace)->valid, sizeof(int), stream);
}

fusedmerge_result fusedmerge_switch_read_state(const fusedmerge_switch_plan* plan, void* workspace, fusedmerge_switch_state* state,
                                               fusedmerge_stream stream) {
    if (fusedmerge_result result = check_workspace(__func__, plan, workspace)) return result;
    if (state == nullptr) return null(__func__, "state");
    SwitchState* device_state = plan->state_in(workspace);
    SwitchState found{};
    if (fusedmerge_result result = read_device(__func__, &found, device_state, sizeof(found), stream)) return result;
    if (found.status != 0) {
        if (fusedmerge_result result = zero_device(__func__, &device_state->status, sizeof(int), stream)) return result;
    }
    *state = {};
    state->valid = found.valid;
    state->num_active = found.num_last;
    state->flags = found.status;
    for (int i = 0; i < found.num_last && i < kMaxSlots; ++i) {
        state->ids[i] = found.last_ids[i];
        state->gates[i] = found.last_gates[i];
    }
    return FUSEDMERGE_OK;
}

}  // extern "C"
