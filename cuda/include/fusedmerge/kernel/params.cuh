// What the host hands to the kernels: plain structs, the same bytes in C++, on the device and in Python (ctypes, tests/test_sim_switch.py).
// Strides count elements. Shape letters: N adapters, r rank (padded in the bank to a multiple of 16), k slots of a selection.
#pragma once

namespace fusedmerge {

constexpr int kMaxSlots = 32;     // k: slots of one selection
constexpr int kRankStep = 16;     // the bank's ranks are padded to a multiple of this with zeros
constexpr int kThreads = 256;     // threads of a block
constexpr int kStripCols = 256;   // columns of a unit of work
constexpr int kStepRows = 64;     // rows of one step through a unit
constexpr int kChunkDepth = 128;  // ranks that the mma path holds in registers at a time

// Bits of SwitchSegment::flags, set by the planner: where 16-byte accesses (8-byte for an fp8 source) are aligned in every row.
enum SegmentFlags { kLiveAligned = 1, kSourceAligned = 2, kAAligned = 4, kBAligned = 8 };

// Bits of SwitchState::status, set by the device, cleared by the host.
enum SwitchStatus { kStatusBadId = 1, kStatusBadGate = 2, kStatusNonFinite = 4 };

// One adapted matrix. In place, source and live are the same storage.
struct SwitchSegment {
    void* live;                 // [rows, cols] Live
    const void* source;         // [rows, cols] Source: the base, or live itself
    const void* a;              // [N, r, cols] Factor
    const void* b;              // [N, rows, r] Factor
    const float* scaling;       // [N]
    const int* ranks;           // [N] actual rank of each adapter here, 0 = absent; null = r for all
    const float* source_scale;  // [rows >> scale_row_shift, cols >> scale_col_shift] of an fp8 source; null = 1
    long long live_stride;      // elements between rows
    long long source_stride;
    long long a_adapter_stride;  // elements between adapters
    long long a_row_stride;      // elements between ranks
    long long b_adapter_stride;
    long long b_row_stride;
    long long scale_stride;  // elements between rows of scales
    long long first_unit;    // set by the planner: units of all segments before this one
    int rows;
    int cols;
    int rank;             // r, a multiple of kRankStep
    int scale_row_shift;  // log2 of rows per scale; 31 = one scale for all rows
    int scale_col_shift;
    int unit_rows;  // set by the planner: rows of a unit, a multiple of kStepRows
    int flags;      // set by the planner: SegmentFlags
    int reserved;
};

// Device memory owned by one switcher; zeroed by the host before the first launch.
struct SwitchState {
    int valid;                    // 0 forces the next switch
    int num_last;                 // adapters in the mixture that was last applied
    int ticket;                   // blocks that have finished
    int status;                   // SwitchStatus
    int last_ids[kMaxSlots];      // ascending, no duplicates
    float last_gates[kMaxSlots];  // none is zero
};

struct SwitchParams {
    const SwitchSegment* segments;  // [num_segments], on the device
    SwitchState* state;             // on the device
    const int* ids;                 // [k] on the device; -1 = empty slot
    const float* gates;             // [k] on the device
    long long num_units;
    int num_segments;
    int num_slots;        // k
    int num_adapters;     // N
    int inplace;          // live += new - last, instead of live = source + new
    int check_finite;     // set kStatusNonFinite where a stored weight is not finite
    int resident_chunks;  // 1 or 2: set by the planner, with the shared memory that it takes
};

}  // namespace fusedmerge
