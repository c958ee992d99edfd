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
// K > 128 is several chunks of 128. Where shared memory holds the strips of all of them (two on devices with 227 KB: in place, r = 64,
// top-2), they stay for the whole unit, as fragments from the first step on, and are read into the register strip chunk by chunk; else
// strip and rows are fetched for every step and chunk: right, but bound by L2 (docs/kernels/switch.md).
#pragma once

#include "scheduler.cuh"
#include "selection.cuh"
#include "tile.cuh"

namespace fusedmerge {

constexpr int kChunkSlices = kChunkDepth / kRankStep;
constexpr int kStripPitch = 2 * kStripCols + 16;                // bytes; rows 2t fall on different quarters of the banks
constexpr int kStagePitch = 2 * kChunkSlices * kRankStep + 16;  // bytes; eight rows of an ldmatrix fall on all banks
constexpr int kStripBytes = kChunkSlices * kRankStep * kStripPitch;
constexpr int kStageBytes = kStepRows * kStagePitch;
constexpr int kNumStages = 5;
static_assert(kStripBytes <= (kNumStages - 1) * kStageBytes, "the strip is staged in the ring, beside its last stage");

static_assert(kChunkSlices * kRankStep * 2 * kStripCols <= kStripBytes, "a strip in fragments takes its place");

constexpr int kMaxResidentChunks = 2;
constexpr int kStepShift = 6;
static_assert(kStepRows == 1 << kStepShift, "units begin at multiples of a step");

struct MmaMemory {  // shared memory
    Slice slices[kMaxResidentChunks * kChunkSlices];
    alignas(16) unsigned char tiles[kNumStages * kStageBytes];  // longer where two strips are resident: [2 strips, ring]
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
    int num_slices = 0;                   // in the table
    unsigned char* ring = nullptr;        // kNumStages stages
    Finiteness<Live> finite;
    const bool whole;  // all columns are there, rows aligned, steps full: no octet needs a test

    unsigned strip[kChunkSlices][4][2];  // [slice][tile][fragment word]
    float acc[4][4][4];                  // [16 rows][8 columns][fragment]
    Octet<Source> source[kOctets];       // [8 rows]
    float scale[kOctets];                // of fp8 rows, where each has its own
    float step_scale = 1.0f;             // else: a step never crosses a scale block
    const bool row_scales;

    int source_row, live_row;  // the next rows to load and to store
    const Source* source_at;   // the lane's octet in source_row
    Live* live_at;
    const long long source_step, live_step;  // eight rows
    const int flags;

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
          whole(u.col + kStripCols <= seg.cols && (seg.flags & kSourceAligned) != 0 && (seg.flags & kLiveAligned) != 0 &&
                (u.end_row - u.first_row) % kStepRows == 0),
          row_scales(kSame<Source, Fp8E4M3> && seg.scale_row_shift < kStepShift),
          source_row(u.first_row + group),
          live_row(u.first_row + group),
          source_at(static_cast<const Source*>(seg.source) + source_row * seg.source_stride + col),
          live_at(static_cast<Live*>(seg.live) + live_row * seg.live_stride + col),
          source_step(8 * seg.source_stride),
          live_step(8 * seg.live_stride),
          flags(seg.flags) {}

    // Resident: strips are fetched once and B streams, one stage for each step and chunk. Else each step's chunks are fetched as they are
    // needed. The two share one copy of the code, because two would not fit in the registers together.
    FM_DEVICE void run(int resident_chunks) {
        const int num_chunks = (selection.total_slices + kChunkSlices - 1) / kChunkSlices;
        const bool resident = num_chunks <= resident_chunks;
        ring = memory.tiles + (resident && num_chunks > 1 ? num_chunks * kStripBytes : 0);
        int stage = kNumStages - 1;
        if constexpr (kAhead) load_source();
        FM_NO_UNROLL
        for (int row = unit.first_row; row < unit.end_row; row += kStepRows) {
            clear();
            if constexpr (kSame<Source, Fp8E4M3>) {
                if (!row_scales && num_cols > 0) step_scale = scale_at(segment, row, col);
            }
            FM_NO_UNROLL
            for (int chunk = 0; chunk < num_chunks; ++chunk) {
                const bool first = row == unit.first_row && chunk == 0;
                if (!resident || first) fetch_chunks(chunk, resident ? num_chunks : 1, resident ? unit.end_row : row);
                const bool again = resident && row != unit.first_row;
                if (!again) read_strip(resident ? chunk : 0);
                if (again && num_chunks > 1) move_strip<false>(chunk);
                if (resident) {
                    if (first) fill_ring(num_chunks);
                    stage = stage == kNumStages - 1 ? 0 : stage + 1;
                    advance_ring(stage, row, chunk, num_chunks);
                    if (!again && num_chunks > 1) move_strip<true>(chunk);  // all warps have read it
                }
                multiply_chunk(stage, resident ? chunk : 0);
            }
            const bool more = row + kStepRows < unit.end_row;
            if (whole) {
                finish_rows<true>(more);
            } else {
                finish_rows<false>(more);
            }
        }
    }

    // The strips of `count` chunks, and the first one's rows from `row` on (none at the unit's end) in the last stage.
    FM_DEVICE void fetch_chunks(int first_chunk, int count, int row) {
        load_table(first_chunk, count);
        FM_NO_UNROLL
        for (int chunk = 0; chunk < count; ++chunk) copy_strip(chunk);
        copy_rows(kNumStages - 1, row, 0);
        copy_async_commit();
        copy_async_wait<0>();
        block_barrier();  // strips and rows are in shared memory
    }

    // The place `ahead` steps-and-chunks after (row, chunk); one group is committed whether or not it lies within the unit.
    FM_DEVICE void prefetch_rows(int stage, int row, int chunk, int ahead, int num_chunks) {
        const bool two = num_chunks > 1;
        const int place = chunk + ahead;
        copy_rows(stage, row + (two ? place / 2 : place) * kStepRows, two ? place % 2 : 0);
        copy_async_commit();
    }

    FM_DEVICE void fill_ring(int num_chunks) {
        block_barrier();  // a single strip is in registers; its place becomes the ring
        FM_NO_UNROLL
        for (int stage = 0; stage < kNumStages - 1; ++stage) prefetch_rows(stage, unit.first_row, 0, stage, num_chunks);
    }

    FM_DEVICE void advance_ring(int stage, int row, int chunk, int num_chunks) {
        copy_async_wait<kNumStages - 2>();
        block_barrier();  // this step's rows are visible, and the stage read a step ago is free
        prefetch_rows(stage == 0 ? kNumStages - 1 : stage - 1, row, chunk, kNumStages - 1, num_chunks);
    }

    // The slices of `count` chunks.
    FM_DEVICE void load_table(int first_chunk, int count) {
        int first_slice = first_chunk * kChunkSlices;
        int left = selection.total_slices - first_slice;
        num_slices = left < count * kChunkSlices ? left : count * kChunkSlices;
        block_barrier();  // the previous chunk has been used
        if (thread < num_slices) memory.slices[thread] = find_slice<Factor>(selection, segment, first_slice + thread);
        block_barrier();  // the table is visible
    }

    // How many slices of the table belong to its chunk-th chunk.
    FM_DEVICE int slices_of(int chunk) const {
        int left = num_slices - chunk * kChunkSlices;
        return left < kChunkSlices ? left : kChunkSlices;
    }

    // A chunk's [128, 256] of A.
    FM_DEVICE void copy_strip(int chunk) {
        const Slice* slices = memory.slices + chunk * kChunkSlices;
        unsigned char* to = memory.tiles + chunk * kStripBytes;
        const int count_slices = slices_of(chunk);
        int piece_col = unit.col + 8 * (thread % 32);
        FM_UNROLL
        for (int i = 0; i < 2 * kChunkSlices; ++i) {
            if (i / 2 >= count_slices) break;
            int k = thread / 32 + i % 2 * 8;
            const Factor* a = static_cast<const Factor*>(slices[i / 2].a) + k * segment.a_row_stride;
            int count = segment.cols - piece_col;
            copy_octet(to + (i / 2 * kRankStep + k) * kStripPitch + thread % 32 * 16, count > 0 ? a + piece_col : a, count,
                       (flags & kAAligned) != 0);
        }
    }

    // A chunk's [64, 128] of B from `first_row` on; rows past the unit become zeros.
    FM_DEVICE void copy_rows(int stage, int first_row, int chunk) {
        int piece = thread % 16;
        if (piece / 2 >= slices_of(chunk) || first_row >= unit.end_row) return;
        const Factor* b = static_cast<const Factor*>(memory.slices[chunk * kChunkSlices + piece / 2].b) + piece % 2 * 8;
        FM_UNROLL
        for (int i = 0; i < kStepRows; i += 16) {
            int row = i + thread / 16;
            bool exists = first_row + row < unit.end_row;
            copy_octet(ring + stage * kStageBytes + row * kStagePitch + piece * 16,
                       exists ? b + (first_row + row) * segment.b_row_stride : b, exists ? 8 : 0, (flags & kBAligned) != 0);
        }
    }

    // Each fragment word pairs two ranks of one column: 16 bytes of two rows give the words of all four tiles.
    FM_DEVICE void read_strip(int chunk) {
        const int count = slices_of(chunk);
        const unsigned char* lane = memory.tiles + chunk * kStripBytes + 2 * quad * kStripPitch + warp * 64 + group / 2 * 16;
        FM_UNROLL
        for (int s = 0; s < kChunkSlices; ++s) {
            if (s >= count) break;
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

    // One of several resident strips as this lane holds it in registers: kept in the strip's place, and taken from there.
    template <bool kKeep>
    FM_DEVICE void move_strip(int chunk) {
        Words4* place = reinterpret_cast<Words4*>(memory.tiles + chunk * kStripBytes) + thread;
        const int count = slices_of(chunk);
        FM_UNROLL
        for (int i = 0; i < 2 * kChunkSlices; ++i) {
            if (i / 2 >= count) break;
            Words4 words;
            if constexpr (!kKeep) words = place[i * kThreads];
            FM_UNROLL
            for (int j = 0; j < 4; ++j) {
                if constexpr (kKeep) {
                    words.words[j] = strip[i / 2][j][i % 2];
                } else {
                    strip[i / 2][j][i % 2] = words.words[j];
                }
            }
            if constexpr (kKeep) place[i * kThreads] = words;
        }
    }

    FM_DEVICE void clear() {
        FM_UNROLL
        for (int i = 0; i < 64; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    FM_DEVICE void multiply_chunk(int stage, int chunk) {
        const Slice* slices = memory.slices + chunk * kChunkSlices;
        const int count = slices_of(chunk);
        int lane = thread % kWarpLanes;
        const unsigned char* rows = ring + stage * kStageBytes + lane % 16 * kStagePitch + lane / 16 * 16;
        FM_UNROLL
        for (int s = 0; s < kChunkSlices; ++s) {
            if (s >= count) break;
            float ratio = slices[s].ratio;
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
        for (int i = 0; i < kOctets; ++i) load_next_octet<false>(source[i], scale[i], true);
    }

    // The lane's octet of the next row. The pointers move with it: a table of row addresses would cost 32 registers.
    template <bool kWhole>
    FM_DEVICE void load_next_octet(Octet<Source>& octet, float& octet_scale, bool more) {
        if (kWhole ? more : source_row < unit.end_row && num_cols > 0) {
            load_octet(octet, source_at, kWhole ? 8 : num_cols, kWhole || (flags & kSourceAligned) != 0, policy);
            if constexpr (kSame<Source, Fp8E4M3>) {
                if (row_scales) octet_scale = scale_at(segment, source_row, col);
            }
        }
        source_row += 8;
        source_at += source_step;
    }

    // The only rounding. Each source octet is reloaded for the next step, if there is one, as soon as it is used.
    template <bool kWhole>
    FM_DEVICE void finish_rows(bool more) {
        float coefficient = selection.experts[selection.num_experts - 1].coefficient;
        FM_UNROLL
        for (int i = 0; i < kOctets; ++i) {
            if constexpr (kAhead) {
                finish_octet<kWhole>(i, coefficient, source[i], scale[i]);
                load_next_octet<kWhole>(source[i], scale[i], more);
            } else {
                Octet<Source> octet{};
                float octet_scale = 1.0f;
                load_next_octet<kWhole>(octet, octet_scale, true);
                finish_octet<kWhole>(i, coefficient, octet, octet_scale);
            }
        }
    }

    // Nothing is consumed in a branch: there ptxas would wait for the loads one by one.
    template <bool kWhole>
    FM_DEVICE void finish_octet(int i, float coefficient, const Octet<Source>& octet, float octet_scale) {
        float values[8];
        widen_octet(values, octet, row_scales ? octet_scale : step_scale);
        FM_UNROLL
        for (int c = 0; c < 8; ++c) values[c] = fused_multiply_add(coefficient, acc[i / 2][c / 2][i % 2 * 2 + c % 2], values[c]);
        Octet<Live> narrowed;
        narrow_octet(narrowed, values);
        if (kWhole || (live_row < unit.end_row && num_cols > 0)) {
            finite.add(narrowed);
            store_octet(live_at, narrowed, kWhole ? 8 : num_cols, kWhole || (flags & kLiveAligned) != 0, policy);
        }
        live_row += 8;
        live_at += live_step;
    }
};

}  // namespace fusedmerge
