#include "plan.h"

#include <cstdint>
#include <cstdio>

namespace fusedmerge {
namespace {

constexpr int kMaxUnitRows = 2048;
constexpr int kUnitOverheadRows = 128;  // what starting a unit costs (its strip of A, the ring's first fill), in rows; to be measured

int size_of(Number number) { return number == Number::kFloat32 ? 4 : number == Number::kFp8E4M3 ? 1 : 2; }
bool is_live(int number) { return number >= 0 && number <= 2; }
long long divide_up(long long x, long long y) { return (x + y - 1) / y; }

template <class... Args>
bool refuse(PlanResult& result, const char* format, Args... args) {
    std::snprintf(result.error, sizeof(result.error), format, args...);
    return false;
}

bool check_request(const PlanRequest& request, PlanResult& result) {
    if (!is_live(request.live)) return refuse(result, "switch: live dtype: expected bf16, fp16 or float32, got code %d", request.live);
    bool source_ok = request.source == request.live || request.source == static_cast<int>(Number::kFloat32) ||
                     request.source == static_cast<int>(Number::kFp8E4M3) ||
                     (request.live == static_cast<int>(Number::kFloat32) && is_live(request.source));
    if (!source_ok) return refuse(result, "switch: base dtype: expected live's, float32 or fp8 e4m3, got code %d", request.source);
    if (request.inplace && request.source != request.live)
        return refuse(result, "switch: base dtype: expected live's (code %d) in place, got code %d", request.live, request.source);
    if (request.factor != request.live && request.factor != static_cast<int>(Number::kFloat32))
        return refuse(result, "switch: factor dtype: expected live's (code %d) or float32, got code %d", request.live, request.factor);
    if (request.num_segments < 0) return refuse(result, "switch: segments: expected at least 0, got %d", request.num_segments);
    if (request.num_adapters < 1) return refuse(result, "switch: adapters: expected at least 1, got %d", request.num_adapters);
    if (request.num_slots < 0 || request.num_slots > kMaxSlots)
        return refuse(result, "switch: slots: expected 0 to %d, got %d", kMaxSlots, request.num_slots);
    if (request.num_multiprocessors < 1)
        return refuse(result, "switch: multiprocessors: expected at least 1, got %d", request.num_multiprocessors);
    if (request.unit_rows < 0 || request.unit_rows % kStepRows != 0)
        return refuse(result, "switch: unit rows: expected a multiple of %d, got %d", kStepRows, request.unit_rows);
    int shared_bytes = least_shared_bytes(static_cast<Number>(request.factor));
    if (request.shared_bytes_limit < shared_bytes)
        return refuse(result, "switch: shared memory of a block: expected at least %d bytes, got %d", shared_bytes,
                      request.shared_bytes_limit);
    return true;
}

bool check_segment(const SwitchSegment& s, int i, const PlanRequest& request, PlanResult& result) {
    if (s.rows < 0 || s.cols < 0)
        return refuse(result, "switch: segment %d: expected a shape [rows, cols], got [%d, %d]", i, s.rows, s.cols);
    if (s.rows == 0 || s.cols == 0) return true;
    if (s.live == nullptr || s.source == nullptr || s.a == nullptr || s.b == nullptr || s.scaling == nullptr)
        return refuse(result, "switch: segment %d: expected live, source, a, b and scaling, got a null pointer", i);
    if (s.rank < kRankStep || s.rank % kRankStep != 0)
        return refuse(result, "switch: segment %d: expected a rank padded to a multiple of %d, got %d", i, kRankStep, s.rank);
    if (s.rows > 1 && s.live_stride < s.cols)
        return refuse(result, "switch: segment %d: expected a live stride of at least %d, got %lld", i, s.cols, s.live_stride);
    if (s.rows > 1 && s.source_stride < s.cols)
        return refuse(result, "switch: segment %d: expected a source stride of at least %d, got %lld", i, s.cols, s.source_stride);
    if (s.a_row_stride < s.cols)
        return refuse(result, "switch: segment %d: expected an a row stride of at least %d, got %lld", i, s.cols, s.a_row_stride);
    if (s.rows > 1 && s.b_row_stride < s.rank)
        return refuse(result, "switch: segment %d: expected a b row stride of at least %d, got %lld", i, s.rank, s.b_row_stride);
    if (request.inplace && (s.live != s.source || s.live_stride != s.source_stride))
        return refuse(result, "switch: segment %d: expected source to be live in place, got another matrix", i);
    if (s.scale_row_shift < 0 || s.scale_row_shift > 31 || s.scale_col_shift < 3 || s.scale_col_shift > 31)
        return refuse(result, "switch: segment %d: expected scale shifts of 0-31 (rows) and 3-31 (columns), got %d and %d", i,
                      s.scale_row_shift, s.scale_col_shift);
    return true;
}

bool aligned(const void* pointer, long long stride, long long other_stride, int bytes, int alignment) {
    return reinterpret_cast<uintptr_t>(pointer) % alignment == 0 && stride * bytes % alignment == 0 &&
           other_stride * bytes % alignment == 0;
}

int flags_of(const SwitchSegment& s, const PlanRequest& request) {
    int live = size_of(static_cast<Number>(request.live));
    int source = size_of(static_cast<Number>(request.source));
    int factor = size_of(static_cast<Number>(request.factor));
    int flags = 0;
    if (aligned(s.live, s.live_stride, 0, live, 16)) flags |= kLiveAligned;
    if (aligned(s.source, s.source_stride, 0, source, source == 1 ? 8 : 16)) flags |= kSourceAligned;
    if (aligned(s.a, s.a_row_stride, s.a_adapter_stride, factor, 16)) flags |= kAAligned;
    if (aligned(s.b, s.b_row_stride, s.b_adapter_stride, factor, 16)) flags |= kBAligned;
    return flags;
}

// Panels of (nearly) equal height, at most `height` rows each.
int balanced_rows(int rows, int height) {
    long long panels = divide_up(rows, height);
    return static_cast<int>(divide_up(divide_up(rows, panels), kStepRows) * kStepRows);
}

long long units_of(const SwitchSegment& s, int height) {
    if (s.rows == 0 || s.cols == 0) return 0;
    return divide_up(s.cols, kStripCols) * divide_up(s.rows, balanced_rows(s.rows, height));
}

// The height with the shortest schedule: rounds of the grid times the rows of a unit and its fixed cost.
int choose_height(const PlanRequest& request, const SwitchSegment* segments) {
    if (request.unit_rows > 0) return request.unit_rows;
    int best = kMaxUnitRows;
    double best_cost = -1.0;
    for (int height = kMaxUnitRows; height >= kStepRows; height /= 2) {
        double work = 0.0;
        double longest = 0.0;
        for (int i = 0; i < request.num_segments; ++i) {
            const SwitchSegment& s = segments[i];
            if (s.rows == 0 || s.cols == 0) continue;
            double unit = balanced_rows(s.rows, height) + kUnitOverheadRows;
            work += unit * static_cast<double>(units_of(s, height));
            if (unit > longest) longest = unit;
        }
        double cost = work / request.num_multiprocessors + longest;  // list scheduling: never more than this
        if (best_cost < 0.0 || cost < best_cost) {
            best = height;
            best_cost = cost;
        }
    }
    return best;
}

// Whether a selection may need more than one chunk of ranks of the mma path.
bool is_deep(const PlanRequest& request, const SwitchSegment* segments) {
    if (request.factor == static_cast<int>(Number::kFloat32)) return false;
    int rank = 0;
    for (int i = 0; i < request.num_segments; ++i) rank = segments[i].rank > rank ? segments[i].rank : rank;
    return static_cast<long long>(rank) * request.num_slots * (request.inplace ? 2 : 1) > kChunkDepth;
}

void add_bytes(const SwitchSegment& s, const PlanRequest& request, PlanResult& result) {
    long long elements = static_cast<long long>(s.rows) * s.cols;
    long long adapter =
        static_cast<long long>(s.rank) * (static_cast<long long>(s.rows) + s.cols) * size_of(static_cast<Number>(request.factor));
    result.live_bytes += elements * size_of(static_cast<Number>(request.live));
    result.source_bytes += elements * size_of(static_cast<Number>(request.source));
    if (s.source_scale != nullptr && s.rows > 0 && s.cols > 0)
        result.source_bytes += 4LL * (((s.rows - 1) >> s.scale_row_shift) + 1) * (((s.cols - 1) >> s.scale_col_shift) + 1);
    result.adapter_bytes += adapter;
    result.bank_bytes += adapter * request.num_adapters;
}

}  // namespace

int least_shared_bytes(Number factor) { return factor == Number::kFloat32 ? kSimtSharedBytes : kMmaSharedBytes; }

bool plan_switch(const PlanRequest& request, SwitchSegment* segments, PlanResult& result) {
    result = PlanResult{};
    if (!check_request(request, result)) return false;
    for (int i = 0; i < request.num_segments; ++i) {
        if (!check_segment(segments[i], i, request, result)) return false;
    }
    int height = choose_height(request, segments);
    for (int i = 0; i < request.num_segments; ++i) {
        SwitchSegment& s = segments[i];
        s.unit_rows = s.rows == 0 || s.cols == 0 ? kStepRows : balanced_rows(s.rows, height);
        s.first_unit = result.num_units;
        s.flags = flags_of(s, request);
        result.num_units += units_of(s, height);
        add_bytes(s, request, result);
    }
    long long blocks = result.num_units < request.num_multiprocessors ? result.num_units : request.num_multiprocessors;
    result.grid = blocks < 1 ? 1 : static_cast<int>(blocks);
    result.shared_bytes = least_shared_bytes(static_cast<Number>(request.factor));
    result.resident_chunks = 1;
    if (is_deep(request, segments) && request.shared_bytes_limit >= kMmaSharedBytes + kMmaResidentExtraBytes) {
        result.resident_chunks = 2;
        result.shared_bytes += kMmaResidentExtraBytes;
    }
    result.table_bytes = static_cast<long long>(request.num_segments) * static_cast<long long>(sizeof(SwitchSegment)) +
                         static_cast<long long>(sizeof(SwitchState));
    return true;
}

}  // namespace fusedmerge
