// The switch: put a gated mixture of adapters into every adapted matrix, in one launch.
//
//   live[s] = round(source[s] + sum over experts e, ascending |c_e|, of c_e B_e[s] A_e[s])          c_e = gate_e * scaling_e[s], float32
//
//   | per segment s | shape           | dtype                                   | bytes moved, once per switch          |
//   | live          | [rows, cols]    | bf16, fp16, float32                     | written                               |
//   | source        | [rows, cols]    | live's, float32, fp8 e4m3 with scales   | read (the base; in place: live)       |
//   | a, b          | [N,r,cols], [N,rows,r] | live's (mma) or float32 (FFMA)   | read: chosen adapters only            |
//
// Grid: persistent, any size; kThreads threads; kSwitchSharedBytes of shared memory. Units are walked in order (scheduler.cuh); every
// element's arithmetic is the same whichever block, plan or grid computes it.
//
//   read selection -> unchanged or invalid: return
//   for each unit:  resolve its experts -> none: copy bits | mma unit | FFMA unit
//   ticket -> the last block remembers the selection
//
// After LoRA-Switch's segmented gather matrix multiplication (arXiv 2405.17741, section 3), with a pristine source instead of "-old +new".
#pragma once

#include "switch_mma.cuh"
#include "switch_simt.cuh"

namespace fusedmerge {

constexpr int kSelectionBytes = (static_cast<int>(sizeof(SelectionMemory)) + 127) / 128 * 128;

constexpr int kResidentExtraBytes = kMaxResidentChunks * kStripBytes;  // added where SwitchParams::resident_chunks is 2

template <class Factor>
constexpr int kSwitchSharedBytes = kSelectionBytes + static_cast<int>(kSame<Factor, float> ? sizeof(SimtMemory) : sizeof(MmaMemory));

constexpr int kRowStep = kThreads / 32;  // between a thread's rows in a copied unit
constexpr int kCopyRows = 4;             // of a thread, loaded together

// No expert here: the source's bits (its rounded value where the types differ).
template <class Live, class Source>
FM_DEVICE bool copy_unit(const SwitchSegment& segment, const Unit& unit) {
    int col = unit.col + thread_index() % 32 * 8;
    int num_cols = segment.cols - col;
    unsigned long long policy = evict_first_policy();
    Finiteness<Live> finite;
    if (num_cols <= 0) return true;
    FM_NO_UNROLL
    for (int first = unit.first_row + thread_index() / 32; first < unit.end_row; first += kCopyRows * kRowStep) {
        Octet<Source> octets[kCopyRows];  // all loads go out before the first store
        float scales[kCopyRows];
        FM_UNROLL
        for (int i = 0; i < kCopyRows; ++i) {
            int row = first + i * kRowStep < unit.end_row ? first + i * kRowStep : first;
            load_octet(octets[i], static_cast<const Source*>(segment.source) + row * segment.source_stride + col, num_cols,
                       (segment.flags & kSourceAligned) != 0, policy);
            scales[i] = kSame<Source, Fp8E4M3> ? scale_at(segment, row, col) : 1.0f;
        }
        FM_UNROLL
        for (int i = 0; i < kCopyRows; ++i) {
            Octet<Live> live;
            if constexpr (kSame<Live, Source>) {
                live = octets[i];  // -0 and NaN keep their bits
            } else {
                float values[8];
                widen_octet(values, octets[i], scales[i]);
                narrow_octet(live, values);
            }
            finite.add(live);
            int row = first + i * kRowStep;
            if (row >= unit.end_row) continue;
            store_octet(static_cast<Live*>(segment.live) + row * segment.live_stride + col, live, num_cols,
                        (segment.flags & kLiveAligned) != 0, policy);
        }
    }
    return finite.all();
}

template <class Live, class Source, class Factor>
FM_DEVICE bool run_unit(const SelectionMemory& selection, unsigned char* tiles, const SwitchSegment& segment, const Unit& unit,
                        const SwitchParams& params) {
    if (selection.num_experts == 0) return params.inplace || copy_unit<Live, Source>(segment, unit);
    if constexpr (kSame<Factor, float>) {
        return run_simt_unit<Live, Source>(selection, *reinterpret_cast<SimtMemory*>(tiles), segment, unit);
    } else {
        MmaUnit<Live, Source> mma(selection, *reinterpret_cast<MmaMemory*>(tiles), segment, unit);
        mma.run(params.resident_chunks);
        return mma.finite.all();
    }
}

constexpr int kAtLaunch = -1;  // left to SwitchParams

// The body of a kernel. A just-in-time compiler fixes mode and depth too; the bits are the same.
template <class Live, class Source, class Factor, int kInplace = kAtLaunch, int kResidentChunks = kAtLaunch>
FM_DEVICE void run_switch(SwitchParams params) {
    if constexpr (kInplace != kAtLaunch) params.inplace = kInplace;
    if constexpr (kResidentChunks != kAtLaunch) params.resident_chunks = kResidentChunks;
    SelectionMemory& selection = *reinterpret_cast<SelectionMemory*>(shared_memory());
    unsigned char* tiles = shared_memory() + kSelectionBytes;
    if (!read_selection(selection, params)) return;
    bool finite = true;
    UnitWalk walk(params);
    Unit unit;
    while (walk.next(unit)) {
        resolve_experts<Factor>(selection, params.segments[unit.segment_idx]);
        finite &= run_unit<Live, Source, Factor>(selection, tiles, selection.segment, unit, params);
    }
    bool report = block_any(!finite) && params.check_finite && thread_index() == 0;
    if (report) atomic_or(&params.state->status, kStatusNonFinite);
    finish_selection(selection, params);
}

template <class Live, class Source, class Factor>
FM_KERNEL(kThreads)
switch_kernel(const SwitchParams params) {
    run_switch<Live, Source, Factor>(params);
}

}  // namespace fusedmerge
