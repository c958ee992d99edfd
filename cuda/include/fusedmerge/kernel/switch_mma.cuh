// One unit of the switch on tensor cores: live = round(source + c_last * acc), acc = sum over experts of (c_e / c_last) B_e A_e.
//
//   strip   [K, 256] of A      registers: 64 words a lane hold 128 ranks x 32 columns of a warp
//   rows    [64, K] of B       shared: a ring of kNumStages stages filled by cp.async, read by ldmatrix
//   source  [64, 256]          global -> registers, 16 bytes at a time, one step ahead
//   live    [64, 256]          registers -> global
//
// K is the mixture's padded rank on this target. A warp owns 64 rows x 32 columns of each step as 4 x 4 mma tiles. Columns are permuted so
// that a lane's 8 accumulators of one row are neighbours: column 2t + i of tile j is the warp's column 8t + 2j + i.
//
//   step s       | wait B(s) | barrier | fetch B(s+4) | mma from B(s) | fma, round, store live(s), reload source(s+1) octet by octet |
//
// K > 128 (several chunks) re-stages A for every step and chunk: right, but not fast (docs/kernels/switch.md).
#pragma once

#include "scheduler.cuh"
#include "selection.cuh"
#include "tile.cuh"

namespace fusedmerge {

constexpr int kChunkSlices = 8;                                    // slices of 16 ranks that the register strip holds
constexpr int kStripPitch = 2 * kStripCols + 32;                   // bytes; rows 2t and 2t+2 fall on different halves of the banks
constexpr int kStagePitch = 2 * kChunkSlices * kRankStep + 16;     // bytes; eight rows of an ldmatrix fall on all banks
constexpr int kStripBytes = kChunkSlices * kRankStep * kStripPitch;
constexpr int kStageBytes = kStepRows * kStagePitch;
constexpr int kNumStages = 5;
static_assert(kStripBytes <= (kNumStages - 1) * kStageBytes, "the strip is staged in the ring, beside its last stage");

struct MmaMemory {  // shared memory
    alignas(16) unsigned char stages[kNumStages * kStageBytes];
    Slice slices[kChunkSlices];
};

template <class Live, class Source>
struct MmaUnit {
    using Factor = Live;
    static constexpr int kOctets = kStepRows / 8;        // of a lane in a step
    static constexpr bool kAhead = sizeof(Source) <= 2;  // source is loaded a step ahead; a float32 one would not fit in the registers

    const SelectionMemory& selection;
    MmaMemory& memory;
    const SwitchSegment& segment;
    const Unit& unit;
    const unsigned long long policy;
    const int thread, warp, group, quad;  // group = g, quad = t of the fragment layout
    const int col, num_cols;              // the lane's first column, and how many remain from there
    int num_slices = 0;                   // of the current chunk
    bool finite = true;

    unsigned strip[kChunkSlices][4][2];  // [slice][tile][fragment word]
    float acc[4][4][4];                  // [16 rows][8 columns][fragment]
    Octet<Source> source[kOctets];       // [8 rows]
    float scale[kOctets];

    int source_row, live_row;  // the next rows to load and to store
    const Source* source_at;   // the lane's octet in source_row
    Live* live_at;

    FM_DEVICE MmaUnit(const SelectionMemory& s, MmaMemory& m, const SwitchSegment& seg, const Unit& u)
        : selection(s),
          memory(m),
          segment(seg),
          unit(u),
          policy(evict_first_policy()),
          thread(fresh_thread_index()),
          warp(thread / kWarpLanes),
          group(thread % kWarpLanes / 4),
          quad(thread % 4),
          col(u.col + 32 * warp + 8 * quad),
          num_cols(seg.cols - col),
          source_row(u.first_row + group),
          live_row(u.first_row + group),
          source_at(static_cast<const Source*>(seg.source) + source_row * seg.source_stride + col),
          live_at(static_cast<Live*>(seg.live) + live_row * seg.live_stride + col) {}

    // One chunk: the strip is fetched once and B streams. Several: strip and rows of each chunk are fetched for every step. The two share one
    // copy of the code, because two would not fit in the registers together.
    FM_DEVICE void run() {
        const bool streaming = selection.total_slices <= kChunkSlices;
        int stage = kNumStages - 1;
        if constexpr (kAhead) load_source();
        FM_NO_UNROLL
        for (int row = unit.first_row; row < unit.end_row; row += kStepRows) {
            clear();
            FM_NO_UNROLL
            for (int first_slice = 0; first_slice < selection.total_slices; first_slice += kChunkSlices) {
                if (!streaming || row == unit.first_row) fetch_chunk(first_slice, streaming ? unit.end_row : row);
                if (streaming) {
                    if (row == unit.first_row) fill_ring();
                    stage = stage == kNumStages - 1 ? 0 : stage + 1;
                    advance_ring(stage, row);
                }
                multiply_chunk(stage);
            }
            finish_rows();
        }
    }

    // The strip of a chunk into registers, and its rows from `row` on (none at the unit's end) into the last stage.
    FM_DEVICE void fetch_chunk(int first_slice, int row) {
        load_table(first_slice);
        copy_strip();
        copy_rows(kNumStages - 1, row);
        copy_async_commit();
        copy_async_wait<0>();
        block_barrier();  // strip and rows are in shared memory
        read_strip();
    }

    FM_DEVICE void fill_ring() {
        block_barrier();  // the strip is in registers; its place becomes the ring
        FM_NO_UNROLL
        for (int stage = 0; stage < kNumStages - 1; ++stage) {
            copy_rows(stage, unit.first_row + stage * kStepRows);
            copy_async_commit();
        }
    }

    FM_DEVICE void advance_ring(int stage, int row) {
        copy_async_wait<kNumStages - 2>();
        block_barrier();  // this step's rows are visible, and the stage read a step ago is free
        copy_rows(stage == 0 ? kNumStages - 1 : stage - 1, row + (kNumStages - 1) * kStepRows);
        copy_async_commit();
    }

    // The slices of the chunk that begins at `first_slice`; its first barrier ends the use of the previous chunk.
    FM_DEVICE void load_table(int first_slice) {
        int left = selection.total_slices - first_slice;
        num_slices = left < kChunkSlices ? left : kChunkSlices;
        block_barrier();  // the previous chunk has been used
        if (thread < num_slices) memory.slices[thread] = find_slice<Factor>(selection, segment, first_slice + thread);
        block_barrier();  // the table is visible
    }

    // 8 values of a factor into shared memory; `count` of them exist.
    FM_DEVICE void copy_piece(unsigned char* to, const Factor* from, int count, bool aligned) {
        if (aligned) {
            copy_async_16(to, from, count >= 8 ? 16 : count > 0 ? 2 * count : 0);
        } else {
            for (int i = 0; i < 8; ++i) reinterpret_cast<unsigned short*>(to)[i] = i < count ? from[i].bits : 0;
        }
    }

    // The chunk's [128, 256] of A.
    FM_DEVICE void copy_strip() {
        int piece_col = unit.col + 8 * (thread % 32);
        FM_UNROLL
        for (int i = 0; i < 2 * kChunkSlices; ++i) {
            if (i / 2 >= num_slices) break;
            int k = thread / 32 + i % 2 * 8;
            const Factor* a = static_cast<const Factor*>(memory.slices[i / 2].a) + k * segment.a_row_stride;
            int count = segment.cols - piece_col;
            copy_piece(memory.stages + (i / 2 * kRankStep + k) * kStripPitch + thread % 32 * 16, count > 0 ? a + piece_col : a, count,
                       (segment.flags & kAAligned) != 0);
        }
    }

    // The chunk's [64, 128] of B from `first_row` on; rows past the unit become zeros.
    FM_DEVICE void copy_rows(int stage, int first_row) {
        int piece = thread % 16;
        if (piece / 2 >= num_slices || first_row >= unit.end_row) return;
        const Factor* b = static_cast<const Factor*>(memory.slices[piece / 2].b) + piece % 2 * 8;
        FM_UNROLL
        for (int i = 0; i < kStepRows; i += 16) {
            int row = i + thread / 16;
            bool exists = first_row + row < unit.end_row;
            copy_piece(memory.stages + stage * kStageBytes + row * kStagePitch + piece * 16,
                       exists ? b + (first_row + row) * segment.b_row_stride : b, exists ? 8 : 0,
                       (segment.flags & kBAligned) != 0);
        }
    }

    // Each fragment word pairs two ranks of one column: 16 bytes of two rows give the words of all four tiles.
    FM_DEVICE void read_strip() {
        const unsigned char* lane = memory.stages + 2 * quad * kStripPitch + warp * 64 + group / 2 * 16;
        FM_UNROLL
        for (int s = 0; s < kChunkSlices; ++s) {
            if (s >= num_slices) break;
            FM_UNROLL
            for (int half = 0; half < 2; ++half) {
                const unsigned char* row = lane + (s * kRankStep + half * 8) * kStripPitch;
                const Words4 even = *reinterpret_cast<const Words4*>(row);
                const Words4 odd = *reinterpret_cast<const Words4*>(row + kStripPitch);
                FM_UNROLL
                for (int j = 0; j < 4; ++j) strip[s][j][half] = pair_halves(even.words[j], odd.words[j], group % 2 != 0);
            }
        }
    }

    FM_DEVICE void clear() {
        FM_UNROLL
        for (int i = 0; i < 64; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    FM_DEVICE void multiply_chunk(int stage) {
        int lane = thread % kWarpLanes;
        const unsigned char* rows = memory.stages + stage * kStageBytes + lane % 16 * kStagePitch + lane / 16 * 16;
        FM_UNROLL
        for (int s = 0; s < kChunkSlices; ++s) {
            if (s >= num_slices) break;
            float ratio = memory.slices[s].ratio;
            if (ratio != 1.0f) rescale(ratio);
            unsigned fragments[4][4];
            FM_UNROLL
            for (int m = 0; m < 4; ++m) load_matrices(fragments[m], rows + m * 16 * kStagePitch + s * 2 * kRankStep);
            FM_UNROLL
            for (int i = 0; i < 16; ++i) multiply_accumulate(acc[i / 4][i % 4], fragments[i / 4], strip[s][i % 4], Factor{});
        }
    }

    FM_DEVICE void rescale(float ratio) {
        FM_UNROLL
        for (int i = 0; i < 64; ++i) acc[i / 16][i / 4 % 4][i % 4] = multiply(acc[i / 16][i / 4 % 4][i % 4], ratio);
    }

    // All octets of a step, in the order in which they are used: the lane's rows group, group + 8, ..., group + 56.
    FM_DEVICE void load_source() {
        FM_UNROLL
        for (int i = 0; i < kOctets; ++i) load_next_octet(source[i], scale[i]);
    }

    // The lane's octet of the next row. The pointers move with it: a table of row addresses would cost 32 registers.
    FM_DEVICE void load_next_octet(Octet<Source>& octet, float& octet_scale) {
        if (source_row < unit.end_row && num_cols > 0) {
            load_octet(octet, source_at, num_cols, (segment.flags & kSourceAligned) != 0, policy);
            if constexpr (kSame<Source, Fp8E4M3>) octet_scale = scale_at(segment, source_row, col);
        }
        source_row += 8;
        source_at += 8 * segment.source_stride;
    }

    // The only rounding. Each source octet is reloaded for the next step as soon as it is used.
    FM_DEVICE void finish_rows() {
        float coefficient = selection.experts[selection.num_experts - 1].coefficient;
        FM_UNROLL
        for (int i = 0; i < kOctets; ++i) {
            if constexpr (kAhead) {
                finish_octet(i, coefficient, source[i], scale[i]);
                load_next_octet(source[i], scale[i]);
            } else {
                Octet<Source> octet{};
                float octet_scale = 1.0f;
                load_next_octet(octet, octet_scale);
                finish_octet(i, coefficient, octet, octet_scale);
            }
        }
    }

    FM_DEVICE void finish_octet(int i, float coefficient, const Octet<Source>& octet, float octet_scale) {
        if (live_row < unit.end_row && num_cols > 0) {
            float values[8];
            widen_octet(values, octet, octet_scale);
            FM_UNROLL
            for (int c = 0; c < 8; ++c) values[c] = fused_multiply_add(coefficient, acc[i / 2][c / 2][i % 2 * 2 + c % 2], values[c]);
            finite &= store_values(live_at, values, num_cols, (segment.flags & kLiveAligned) != 0, policy);
        }
        live_row += 8;
        live_at += 8 * segment.live_stride;
    }
};

}  // namespace fusedmerge
