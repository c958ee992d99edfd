// Units of work: a strip of kStripCols columns by `unit_rows` rows of one segment, numbered by the planner.
//
// Within a segment strips count first, then row panels, so blocks that run at the same time read neighbouring columns of the same rows and
// share B in L2; segments follow each other, so they share one layer's adapters.
#pragma once

#include "params.cuh"
#include "platform.cuh"

namespace fusedmerge {

struct Unit {
    int segment_idx;
    int col;  // first column
    int first_row;
    int end_row;  // first_row < end_row <= rows
};

// A persistent block's walk: units block, block + grid, block + 2 grid, ...
struct UnitWalk {
    const SwitchParams& params;
    long long next_unit;
    int segment_idx;

    FM_DEVICE explicit UnitWalk(const SwitchParams& p) : params(p), next_unit(block_index()), segment_idx(0) {}

    FM_DEVICE bool next(Unit& unit) {
        if (next_unit >= params.num_units) return false;
        advance_segment();
        const SwitchSegment& segment = params.segments[segment_idx];
        int local = static_cast<int>(next_unit - segment.first_unit);
        int num_strips = (segment.cols + kStripCols - 1) / kStripCols;
        int panel = local / num_strips;
        unit.segment_idx = segment_idx;
        unit.col = (local - panel * num_strips) * kStripCols;
        unit.first_row = panel * segment.unit_rows;
        unit.end_row = segment.rows - unit.first_row < segment.unit_rows ? segment.rows : unit.first_row + segment.unit_rows;
        next_unit += grid_size();
        return true;
    }

    // The last segment whose first unit is not beyond next_unit; segments before the current one are behind us.
    FM_DEVICE void advance_segment() {
        int low = segment_idx;
        int high = params.num_segments;
        int probe = low + 1;  // most often the same segment or the next one
        while (low + 1 < high) {
            if (params.segments[probe].first_unit <= next_unit) {
                low = probe;
            } else {
                high = probe;
            }
            probe = low + (high - low) / 2;
        }
        segment_idx = low;
    }
};

}  // namespace fusedmerge
