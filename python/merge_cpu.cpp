// Plan and threads of the CPU merge; the arithmetic is in merge_fma.cpp and merge_amx.cpp.
#include "merge_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "threads.h"

namespace fusedmerge {
namespace {

void copy_unit(const Unit& unit) {
    const Segment& s = *unit.segment;
    const int64_t size = s.dtype == Dtype::kFloat32 ? 4 : 2;
    for (int64_t row = unit.row; row < unit.row + unit.rows; ++row) {
        std::byte* live = static_cast<std::byte*>(s.live) + (row * s.live_stride + unit.col) * size;
        const std::byte* source = static_cast<const std::byte*>(s.source) + (row * s.source_stride + unit.col) * size;
        if (live != source) std::memcpy(live, source, unit.cols * size);
    }
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// All units of a switch, numbered from 0: a segment's units follow the previous segment's, row by row.
class Plan {
  public:
    explicit Plan(std::vector<Segment> segments) : segments_(std::move(segments)), ends_(segments_.size()) {
        for (size_t i = 0; i < segments_.size(); ++i) {
            Segment& s = segments_[i];
            auto unused = [](const Expert& e) { return e.coefficient == 0 || e.rank == 0; };
            s.experts.erase(std::remove_if(s.experts.begin(), s.experts.end(), unused), s.experts.end());
            std::stable_sort(s.experts.begin(), s.experts.end(),
                             [](const Expert& x, const Expert& y) { return std::fabs(x.coefficient) < std::fabs(y.coefficient); });
            num_units_ += ceil_div(s.rows, kUnitRows) * ceil_div(s.cols, kUnitCols);
            ends_[i] = num_units_;
        }
    }

    int64_t num_units() const { return num_units_; }

    Unit unit(int64_t idx) const {
        const size_t i = std::upper_bound(ends_.begin(), ends_.end(), idx) - ends_.begin();
        const Segment& s = segments_[i];
        const int64_t within = i == 0 ? idx : idx - ends_[i - 1];
        const int64_t row = within / ceil_div(s.cols, kUnitCols) * kUnitRows;
        const int64_t col = within % ceil_div(s.cols, kUnitCols) * kUnitCols;
        return {&s, row, col, std::min(kUnitRows, s.rows - row), std::min(kUnitCols, s.cols - col)};
    }

    // Enough for every unit and variant: packed A and B, and a strip, all of them float32.
    size_t workspace_bytes() const {
        int64_t deepest = 0;
        for (const Segment& s : segments_) {
            int64_t depth = 0;
            for (const Expert& e : s.experts) depth += ceil_div(e.rank, kDepthAlign) * kDepthAlign;
            deepest = std::max(deepest, depth);
        }
        return deepest == 0 ? 0 : (deepest * (kUnitRows + kUnitCols) + kStripRows * kPitch) * sizeof(float);
    }

  private:
    std::vector<Segment> segments_;
    std::vector<int64_t> ends_;
    int64_t num_units_ = 0;
};

struct AlignedDelete {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Workspace = std::unique_ptr<std::byte, AlignedDelete>;

void run_units(const Plan& plan, MergeUnit merge, std::atomic<int64_t>& next, std::byte* workspace) {
    const DefaultFloatEnvironment environment;
    for (int64_t idx = next++; idx < plan.num_units(); idx = next++) {
        const Unit unit = plan.unit(idx);
        unit.segment->experts.empty() ? copy_unit(unit) : merge(unit, workspace);
    }
}

}  // namespace

void merge_cpu(std::vector<Segment> segments, int threads, MergeUnit merge) {
    const Plan plan(std::move(segments));
    const size_t num_workers = std::max<int64_t>(1, std::min<int64_t>(threads, plan.num_units()));
    std::vector<Workspace> workspaces;
    for (size_t i = 0; i < num_workers; ++i) {
        workspaces.emplace_back(static_cast<std::byte*>(::operator new(plan.workspace_bytes(), std::align_val_t{64})));
    }
    std::atomic<int64_t> next{0};
    run_on_threads(static_cast<int>(num_workers), [&](int worker) { run_units(plan, merge, next, workspaces[worker].get()); });
}

}  // namespace fusedmerge
