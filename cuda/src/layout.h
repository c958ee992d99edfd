// The bytes that host, device and Python agree on. Included where g++ compiles and where nvcc does, in its passes for host and device.
#pragma once

#include <cstddef>

#include "fusedmerge/fusedmerge.h"
#include "fusedmerge/kernel/linear_params.cuh"
#include "fusedmerge/kernel/params.cuh"
#include "fusedmerge/kernel/sgmv_params.cuh"

namespace fusedmerge {

#define FM_AT(type, field, offset) static_assert(offsetof(type, field) == (offset), #type "." #field " moved")

static_assert(sizeof(SwitchSegment) == 152 && alignof(SwitchSegment) == 8, "SwitchSegment has another size");
FM_AT(SwitchSegment, live_stride, 56);
FM_AT(SwitchSegment, first_unit, 112);
FM_AT(SwitchSegment, rows, 120);
FM_AT(SwitchSegment, flags, 144);

static_assert(sizeof(SwitchState) == 272 && alignof(SwitchState) == 4, "SwitchState has another size");
FM_AT(SwitchState, valid, 0);
FM_AT(SwitchState, num_last, 4);
FM_AT(SwitchState, status, 12);
FM_AT(SwitchState, last_ids, 16);
FM_AT(SwitchState, last_gates, 144);

static_assert(sizeof(RouteParams) == 80 && alignof(RouteParams) == 8, "RouteParams has another size");
FM_AT(RouteParams, cols, 56);
static_assert(sizeof(LinearTarget) == 152 && alignof(LinearTarget) == 8, "LinearTarget has another size");
FM_AT(LinearTarget, weight_stride, 64);
FM_AT(LinearTarget, rows, 120);
static_assert(sizeof(LinearParams) == 824 && alignof(LinearParams) == 8, "LinearParams has another size");
FM_AT(LinearParams, routers, 608);
FM_AT(LinearParams, x, 672);
FM_AT(LinearParams, x_stride, 736);
FM_AT(LinearParams, epsilon, 768);
FM_AT(LinearParams, flags, 816);

static_assert(sizeof(SwitchParams) == 64 && alignof(SwitchParams) == 8, "SwitchParams has another size");
FM_AT(SwitchParams, num_units, 32);
FM_AT(SwitchParams, resident_chunks, 60);

static_assert(sizeof(Groups) == 56 && sizeof(GroupParams) == 120, "Groups or GroupParams has another size");
FM_AT(GroupParams, ids, 56);
static_assert(sizeof(SgmvTarget) == 120 && sizeof(SgmvParams) == 576, "SgmvTarget or SgmvParams has another size");
FM_AT(SgmvParams, targets, 96);
static_assert(sizeof(ShrinkGroup) == 16 && sizeof(TilePair) == 16 && sizeof(GroupTotals) == 16, "a grouped struct has another size");

// The C API's own: what a program that was compiled against an earlier header of this version hands over.
static_assert(sizeof(fusedmerge_switch_target) == 136, "fusedmerge_switch_target has another size");
FM_AT(fusedmerge_switch_target, live_stride, 56);
FM_AT(fusedmerge_switch_target, rows, 112);
static_assert(sizeof(fusedmerge_switch_options) == 56, "fusedmerge_switch_options has another size");
FM_AT(fusedmerge_switch_options, mode, 16);
FM_AT(fusedmerge_switch_options, device, 48);
static_assert(sizeof(fusedmerge_switch_figures) == 56, "fusedmerge_switch_figures has another size");
static_assert(sizeof(fusedmerge_switch_state) == 268, "fusedmerge_switch_state has another size");

#undef FM_AT

static_assert(FUSEDMERGE_MAX_SLOTS == kMaxSlots && FUSEDMERGE_RANK_STEP == kRankStep, "the C API states another limit");
static_assert(+FUSEDMERGE_STATE_BAD_ID == +kStatusBadId && +FUSEDMERGE_STATE_BAD_GATE == +kStatusBadGate &&
                  +FUSEDMERGE_STATE_NON_FINITE == +kStatusNonFinite,
              "the C API names other flags");

}  // namespace fusedmerge
