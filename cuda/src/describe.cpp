#include "describe.h"

#include <cstddef>

#include "fusedmerge/kernel/linear_params.cuh"
#include "plan.h"

namespace fusedmerge {

std::string describe_structs() {
    std::string text;
    FM_FIELD(SwitchSegment, live);
    FM_FIELD(SwitchSegment, source);
    FM_FIELD(SwitchSegment, a);
    FM_FIELD(SwitchSegment, b);
    FM_FIELD(SwitchSegment, scaling);
    FM_FIELD(SwitchSegment, ranks);
    FM_FIELD(SwitchSegment, source_scale);
    FM_FIELD(SwitchSegment, live_stride);
    FM_FIELD(SwitchSegment, source_stride);
    FM_FIELD(SwitchSegment, a_adapter_stride);
    FM_FIELD(SwitchSegment, a_row_stride);
    FM_FIELD(SwitchSegment, b_adapter_stride);
    FM_FIELD(SwitchSegment, b_row_stride);
    FM_FIELD(SwitchSegment, scale_stride);
    FM_FIELD(SwitchSegment, first_unit);
    FM_FIELD(SwitchSegment, rows);
    FM_FIELD(SwitchSegment, cols);
    FM_FIELD(SwitchSegment, rank);
    FM_FIELD(SwitchSegment, scale_row_shift);
    FM_FIELD(SwitchSegment, scale_col_shift);
    FM_FIELD(SwitchSegment, unit_rows);
    FM_FIELD(SwitchSegment, flags);
    FM_FIELD(SwitchSegment, reserved);
    FM_FIELD(SwitchState, valid);
    FM_FIELD(SwitchState, num_last);
    FM_FIELD(SwitchState, ticket);
    FM_FIELD(SwitchState, status);
    FM_FIELD(SwitchState, last_ids);
    FM_FIELD(SwitchState, last_gates);
    FM_FIELD(SwitchParams, segments);
    FM_FIELD(SwitchParams, state);
    FM_FIELD(SwitchParams, ids);
    FM_FIELD(SwitchParams, gates);
    FM_FIELD(SwitchParams, num_units);
    FM_FIELD(SwitchParams, num_segments);
    FM_FIELD(SwitchParams, num_slots);
    FM_FIELD(SwitchParams, num_adapters);
    FM_FIELD(SwitchParams, inplace);
    FM_FIELD(SwitchParams, check_finite);
    FM_FIELD(SwitchParams, resident_chunks);
    FM_FIELD(PlanRequest, live);
    FM_FIELD(PlanRequest, source);
    FM_FIELD(PlanRequest, factor);
    FM_FIELD(PlanRequest, inplace);
    FM_FIELD(PlanRequest, num_segments);
    FM_FIELD(PlanRequest, num_adapters);
    FM_FIELD(PlanRequest, num_slots);
    FM_FIELD(PlanRequest, num_multiprocessors);
    FM_FIELD(PlanRequest, shared_bytes_limit);
    FM_FIELD(PlanRequest, unit_rows);
    FM_FIELD(PlanResult, num_units);
    FM_FIELD(PlanResult, live_bytes);
    FM_FIELD(PlanResult, source_bytes);
    FM_FIELD(PlanResult, adapter_bytes);
    FM_FIELD(PlanResult, bank_bytes);
    FM_FIELD(PlanResult, table_bytes);
    FM_FIELD(PlanResult, grid);
    FM_FIELD(PlanResult, shared_bytes);
    FM_FIELD(PlanResult, resident_chunks);
    FM_FIELD(PlanResult, error);
    FM_FIELD(RouteParams, x);
    FM_FIELD(RouteParams, router);
    FM_FIELD(RouteParams, mask);
    FM_FIELD(RouteParams, ids);
    FM_FIELD(RouteParams, gates);
    FM_FIELD(RouteParams, x_stride);
    FM_FIELD(RouteParams, router_stride);
    FM_FIELD(RouteParams, cols);
    FM_FIELD(RouteParams, num_adapters);
    FM_FIELD(RouteParams, num_slots);
    FM_FIELD(RouteParams, normalize);
    FM_FIELD(RouteParams, x_aligned);
    FM_FIELD(RouteParams, router_aligned);
    return text;
}

}  // namespace fusedmerge
