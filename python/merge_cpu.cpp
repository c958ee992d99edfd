// Plan, variants and threads of the CPU merge; the arithmetic is in merge_fma.cpp and merge_amx.cpp.
#include "merge_cpu.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>

#if defined(FUSEDMERGE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedmerge {
namespace {

#if defined(FUSEDMERGE_AMX)
// The processor has bfloat16 tiles, and the kernel lets this process use them (it saves their 8 KiB only for processes that ask).
bool has_amx() {
    constexpr unsigned kBFloat16Tiles = 1u << 22, kTiles = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBFloat16Tiles) && (edx & kTiles) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Variant {
    std::string name;
    MergeUnit merge;
};

const std::vector<Variant>& variants() {
    static const std::vector<Variant> found = [] {
        std::vector<Variant> list{{"portable", merge_unit_portable}};
#if defined(FUSEDMERGE_X86)
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back({"avx2", merge_unit_avx2});
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
            list.push_back({"avx512", merge_unit_avx512});
#if defined(FUSEDMERGE_AMX)
            if (has_amx()) list.push_back({"amx", merge_unit_amx});
#endif
        }
#endif
        return list;
    }();
    return found;
}

// Whatever rounding and flushing modes the process has set, this thread computes with the default ones until the end of the scope.
class DefaultFloatEnvironment {
  public:
    DefaultFloatEnvironment() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
    DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
    DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

  private:
    std::fenv_t saved_;
};

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

const std::vector<std::string>& isas() {
    static const std::vector<std::string> names = [] {
        std::vector<std::string> list;
        for (const Variant& variant : variants()) list.push_back(variant.name);
        return list;
    }();
    return names;
}

void merge_cpu(std::vector<Segment> segments, int threads, const std::string& isa) {
    const auto variant = std::find_if(variants().begin(), variants().end(), [&](const Variant& v) { return v.name == isa; });
    const Plan plan(std::move(segments));
    const size_t num_workers = std::max<int64_t>(1, std::min<int64_t>(threads, plan.num_units()));
    std::vector<Workspace> workspaces;
    for (size_t i = 0; i < num_workers; ++i) {
        workspaces.emplace_back(static_cast<std::byte*>(::operator new(plan.workspace_bytes(), std::align_val_t{64})));
    }
    std::vector<std::thread> workers;
    workers.reserve(num_workers);
    std::atomic<int64_t> next{0};
    try {
        for (size_t i = 1; i < num_workers; ++i) {
            workers.emplace_back(run_units, std::cref(plan), variant->merge, std::ref(next), workspaces[i].get());
        }
    } catch (const std::system_error&) {  // no more threads to be had: those that run do all the work, to the same bits
    }
    run_units(plan, variant->merge, next, workspaces[0].get());
    for (std::thread& worker : workers) worker.join();
}

}  // namespace fusedmerge
