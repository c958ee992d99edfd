// One unit of the switch with float32 factors: the same sum in FFMA, ranks in order. No speed target; what the mma path is held to.
//
//   a  [16, 256]   shared, one slice of 16 ranks        b  [64, 16]   shared
//
// A thread owns rows ty, ty + 8, ..., ty + 56 and columns 8 tx .. 8 tx + 7 of a 64 x 256 step (tx = thread % 32, ty = thread / 32).
#pragma once

#include "scheduler.cuh"
#include "selection.cuh"
#include "tile.cuh"

namespace fusedmerge {

struct SimtMemory {  // shared memory
    float a[kRankStep][kStripCols];
    float b[kStepRows][kRankStep];
};

FM_DEVICE void copy_slice(SimtMemory& memory, const SwitchSegment& segment, const Unit& unit, const Slice& slice, int first_row) {
    int thread = thread_index();
    const float* a = static_cast<const float*>(slice.a);
    const float* b = static_cast<const float*>(slice.b);
    int a_col = unit.col + thread;
    for (int k = 0; k < kRankStep; ++k) memory.a[k][thread] = a_col < segment.cols ? a[k * segment.a_row_stride + a_col] : 0.0f;
    for (int i = 0; i < kStepRows; i += kThreads / kRankStep) {
        int row = i + thread / kRankStep;
        int k = thread % kRankStep;
        memory.b[row][k] = first_row + row < unit.end_row ? b[(first_row + row) * segment.b_row_stride + k] : 0.0f;
    }
}

FM_DEVICE void multiply_slice(float (&acc)[8][8], const SimtMemory& memory, float ratio) {
    int tx = thread_index() % 32;
    int ty = thread_index() / 32;
    if (ratio != 1.0f) {
        FM_UNROLL
        for (int i = 0; i < 64; ++i) acc[i / 8][i % 8] = multiply(acc[i / 8][i % 8], ratio);
    }
    FM_UNROLL
    for (int k = 0; k < kRankStep; ++k) {
        FM_UNROLL
        for (int i = 0; i < 8; ++i) {
            FM_UNROLL
            for (int c = 0; c < 8; ++c) acc[i][c] = fused_multiply_add(memory.b[ty + 8 * i][k], memory.a[k][8 * tx + c], acc[i][c]);
        }
    }
}

template <class Live, class Source>
FM_DEVICE void finish_values(Finiteness<Live>& finite, const SwitchSegment& segment, const Unit& unit, const float (&acc)[8][8],
                             float coefficient, int first_row) {
    int col = unit.col + thread_index() % 32 * 8;
    int num_cols = segment.cols - col;
    unsigned long long policy = evict_first_policy();
    FM_UNROLL
    for (int i = 0; i < 8; ++i) {
        int row = first_row + thread_index() / 32 + 8 * i;
        if (row >= unit.end_row || num_cols <= 0) continue;
        Octet<Source> source;
        float values[8];
        load_octet(source, static_cast<const Source*>(segment.source) + row * segment.source_stride + col, num_cols,
                   (segment.flags & kSourceAligned) != 0, policy);
        widen_octet(values, source, kSame<Source, Fp8E4M3> ? scale_at(segment, row, col) : 1.0f);
        FM_UNROLL
        for (int c = 0; c < 8; ++c) values[c] = fused_multiply_add(coefficient, acc[i][c], values[c]);
        Octet<Live> octet;
        narrow_octet(octet, values);
        finite.add(octet);
        store_octet(static_cast<Live*>(segment.live) + row * segment.live_stride + col, octet, num_cols,
                    (segment.flags & kLiveAligned) != 0, policy);
    }
}

template <class Live, class Source>
FM_DEVICE bool run_simt_unit(const SelectionMemory& selection, SimtMemory& memory, const SwitchSegment& segment, const Unit& unit) {
    Finiteness<Live> finite;
    FM_NO_UNROLL
    for (int row = unit.first_row; row < unit.end_row; row += kStepRows) {
        float acc[8][8] = {};
        FM_NO_UNROLL
        for (int s = 0; s < selection.total_slices; ++s) {
            Slice slice = find_slice<float>(selection, segment, s);
            block_barrier();  // the previous slice has been used
            copy_slice(memory, segment, unit, slice, row);
            block_barrier();  // this slice is visible
            multiply_slice(acc, memory, slice.ratio);
        }
        finish_values<Live, Source>(finite, segment, unit, acc, selection.experts[selection.num_experts - 1].coefficient, row);
    }
    return finite.all();
}

}  // namespace fusedmerge
