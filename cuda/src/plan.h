// The planner: everything about a launch that is known before it. No CUDA, no allocation on a device, no global state.
//
// The caller fills the segments (pointers, shapes, strides); plan_switch checks them, chooses each segment's unit height, numbers the units
// and sets the alignment flags. Results depend on the request alone, and the bits of a switch do not depend on the plan.
#pragma once

#include "fusedmerge/kernel/params.cuh"
#include "numbers.h"

namespace fusedmerge {

struct PlanRequest {
    int live;    // Number
    int source;  // Number; in place: live's
    int factor;  // Number: live's or float32
    int inplace;
    int num_segments;
    int num_adapters;         // N
    int num_slots;            // k, at most kMaxSlots
    int num_multiprocessors;  // of the device
    int shared_bytes_limit;   // of a block on the device (opt-in)
    int unit_rows;            // 0 = choose; else this height everywhere (a multiple of kStepRows)
};

struct PlanResult {
    long long num_units;
    long long live_bytes;     // written by a switch
    long long source_bytes;   // read by an exact switch, scales included
    long long adapter_bytes;  // read per chosen adapter of full rank
    long long bank_bytes;     // a and b of all N adapters
    long long table_bytes;    // device memory of the segment table and the state
    int grid;
    int shared_bytes;
    int resident_chunks;  // for SwitchParams
    char error[256];      // operation, field, expected, got; empty on success
};

// Fills first_unit, unit_rows and flags of `segments`. False, with `result.error` and nothing else changed, where the request is not valid.
bool plan_switch(const PlanRequest& request, SwitchSegment* segments, PlanResult& result);

// Shared memory of a block; equal to the kernels' own constants, which static_asserts check where both are compiled.
constexpr int kMmaSharedBytes = 91520;
constexpr int kMmaResidentExtraBytes = 135168;  // for two resident chunks
constexpr int kSimtSharedBytes = 24576;
int least_shared_bytes(Number factor);

}  // namespace fusedmerge
