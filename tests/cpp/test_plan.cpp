// The planner by itself: numbering of units, alignment, bytes, shared memory, refusals.
#include <cstdint>
#include <vector>

#include "check.h"
#include "plan.h"

using namespace fusedmerge;

namespace {

constexpr int kBf16 = 0, kFloat32 = 2, kFp8 = 3;
constexpr int kAmpereShared = 166912, kHopperShared = 232448, kAdaShared = 101376;

template <class T = void>
T* address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

SwitchSegment segment(int rows, int cols, int rank = 64, long long stride = 0) {
    SwitchSegment s{};
    s.live = address(1 << 20);
    s.source = address(2 << 20);
    s.a = address(3 << 20);
    s.b = address(4 << 20);
    s.scaling = address<float>(5 << 20);
    s.rows = rows;
    s.cols = cols;
    s.rank = rank;
    s.live_stride = s.source_stride = s.a_row_stride = stride > 0 ? stride : cols;
    s.a_adapter_stride = static_cast<long long>(rank) * s.a_row_stride;
    s.b_row_stride = rank;
    s.b_adapter_stride = static_cast<long long>(rows) * rank;
    s.scale_row_shift = s.scale_col_shift = 31;
    return s;
}

PlanRequest request(int num_segments, int multiprocessors = 132, int shared = kHopperShared) {
    return {kBf16, kBf16, kBf16, 0, num_segments, 8, 2, multiprocessors, shared, 0};
}

PlanResult plan(const PlanRequest& asked, std::vector<SwitchSegment>& segments) {
    PlanResult result{};
    CHECK(plan_switch(asked, segments.data(), result));
    CHECK(result.error[0] == '\0');
    return result;
}

void refuses(const PlanRequest& asked, std::vector<SwitchSegment> segments, const char* part) {
    PlanResult result{};
    CHECK(!plan_switch(asked, segments.data(), result));
    if (std::strstr(result.error, part) == nullptr) {
        std::fprintf(stderr, "expected \"%s\", got \"%s\"\n", part, result.error);
        ++num_failures;
    }
}

// Units are numbered without gaps, and cover each segment's rows, whatever the device.
void test_units() {
    for (int multiprocessors : {1, 4, 84, 132, 148}) {
        std::vector<SwitchSegment> segments{segment(4096, 4096), segment(0, 4096),    segment(1, 1),        segment(1024, 4096),
                                            segment(1, 4096),    segment(4097, 4095), segment(4096, 11008), segment(11008, 4096)};
        PlanRequest asked = request(static_cast<int>(segments.size()), multiprocessors);
        PlanResult result = plan(asked, segments);
        long long next = 0;
        for (const SwitchSegment& s : segments) {
            CHECK(s.first_unit == next);
            CHECK(s.unit_rows >= kStepRows && s.unit_rows % kStepRows == 0 && s.unit_rows <= 2048);
            if (s.rows > 0) next += (s.rows + s.unit_rows - 1LL) / s.unit_rows * ((s.cols + kStripCols - 1) / kStripCols);
        }
        CHECK(next == result.num_units);
        CHECK(result.grid == (next < multiprocessors ? next : multiprocessors));
    }
}

void test_bytes() {
    std::vector<SwitchSegment> segments{segment(4096, 11008), segment(0, 7)};
    PlanResult result = plan(request(2), segments);
    CHECK(result.live_bytes == 2LL * 4096 * 11008 && result.source_bytes == result.live_bytes);
    CHECK(result.adapter_bytes == 2LL * 64 * (4096 + 11008 + 7));
    CHECK(result.bank_bytes == 8 * result.adapter_bytes);
    CHECK(result.table_bytes == 2LL * static_cast<long long>(sizeof(SwitchSegment)) + static_cast<long long>(sizeof(SwitchState)));

    std::vector<SwitchSegment> scaled{segment(4096, 11008)};
    scaled[0].source_scale = address<float>(6 << 20);
    scaled[0].scale_row_shift = scaled[0].scale_col_shift = 7;
    scaled[0].scale_stride = 86;
    PlanRequest asked = request(1);
    asked.source = kFp8;
    CHECK(plan(asked, scaled).source_bytes == 4096LL * 11008 + 4 * 32 * 86);

    std::vector<SwitchSegment> none;
    PlanResult empty = plan(request(0), none);
    CHECK(empty.num_units == 0 && empty.grid == 1 && empty.table_bytes == static_cast<long long>(sizeof(SwitchState)));
}

// Counts beyond 2^31 survive: many large segments, rows far apart, adapters far apart.
void test_large() {
    std::vector<SwitchSegment> segments(600, segment(65536, 65536, 512, 1LL << 33));
    for (SwitchSegment& s : segments) s.a_adapter_stride = s.b_adapter_stride = 1LL << 42;
    PlanRequest asked = request(600);
    asked.num_adapters = 4096;
    PlanResult result = plan(asked, segments);
    CHECK(result.live_bytes == 600LL * 2 * 65536 * 65536);
    CHECK(result.bank_bytes == 600LL * 4096 * 2 * 512 * 131072);
    CHECK(segments.back().first_unit == 599LL * (result.num_units / 600));
    CHECK(segments.back().flags == (kLiveAligned | kSourceAligned | kAAligned | kBAligned));
}

void test_alignment() {
    auto flags = [](void (*change)(SwitchSegment&)) {
        std::vector<SwitchSegment> one{segment(64, 256)};
        change(one[0]);
        plan(request(1), one);
        return one[0].flags;
    };
    constexpr int kAll = kLiveAligned | kSourceAligned | kAAligned | kBAligned;
    CHECK(flags([](SwitchSegment&) {}) == kAll);
    CHECK(flags([](SwitchSegment& s) { s.live = address((1 << 20) + 2); }) == (kAll & ~kLiveAligned));
    CHECK(flags([](SwitchSegment& s) { s.live_stride = 257; }) == (kAll & ~kLiveAligned));
    CHECK(flags([](SwitchSegment& s) { s.source_stride = (1LL << 33) + 4; }) == (kAll & ~kSourceAligned));
    CHECK(flags([](SwitchSegment& s) { s.a_adapter_stride += 1; }) == (kAll & ~kAAligned));
    CHECK(flags([](SwitchSegment& s) { s.b_row_stride = 68; }) == (kAll & ~kBAligned));
}

// Two chunks of ranks stay in shared memory only where it is large enough and a mixture may need them.
void test_resident_chunks() {
    auto chunks = [](int rank, int slots, int inplace, int shared, int factor) {
        std::vector<SwitchSegment> one{segment(64, 256, rank)};
        if (inplace) one[0].source = one[0].live;
        PlanRequest asked = request(1, 132, shared);
        asked.num_slots = slots;
        asked.inplace = inplace;
        asked.factor = factor;
        PlanResult result = plan(asked, one);
        CHECK(result.shared_bytes <= shared);
        CHECK(result.shared_bytes ==
              least_shared_bytes(static_cast<Number>(factor)) + (result.resident_chunks == 2 ? kMmaResidentExtraBytes : 0));
        return result.resident_chunks;
    };
    CHECK(chunks(64, 2, 0, kHopperShared, kBf16) == 1);
    CHECK(chunks(64, 2, 1, kHopperShared, kBf16) == 2);
    CHECK(chunks(64, 2, 1, kAmpereShared, kBf16) == 1);
    CHECK(chunks(64, 2, 1, kAdaShared, kBf16) == 1);
    CHECK(chunks(512, 32, 0, kHopperShared, kBf16) == 2);
    CHECK(chunks(512, 32, 0, kHopperShared, kFloat32) == 1);
}

void test_refusals() {
    auto with = [](void (*change)(PlanRequest&)) {
        PlanRequest asked = request(1);
        change(asked);
        return asked;
    };
    std::vector<SwitchSegment> one{segment(64, 256)};
    refuses(with([](PlanRequest& r) { r.live = kFp8; }), one, "live dtype");
    refuses(with([](PlanRequest& r) { r.source = 1; }), one, "base dtype");
    refuses(with([](PlanRequest& r) { r.inplace = 1, r.source = kFloat32; }), one, "base dtype");
    refuses(with([](PlanRequest& r) { r.factor = 1; }), one, "factor dtype");
    refuses(with([](PlanRequest& r) { r.num_adapters = 0; }), one, "adapters: expected at least 1, got 0");
    refuses(with([](PlanRequest& r) { r.num_slots = 33; }), one, "slots: expected 0 to 32, got 33");
    refuses(with([](PlanRequest& r) { r.num_multiprocessors = 0; }), one, "multiprocessors");
    refuses(with([](PlanRequest& r) { r.shared_bytes_limit = 49152; }), one, "shared memory of a block: expected at least 91520");
    refuses(with([](PlanRequest& r) { r.unit_rows = 63; }), one, "unit rows: expected a multiple of 64");
    refuses(with([](PlanRequest& r) { r.inplace = 1; }), one, "expected source to be live in place");

    auto changed = [](void (*change)(SwitchSegment&)) {
        std::vector<SwitchSegment> segments{segment(64, 256)};
        change(segments[0]);
        return segments;
    };
    refuses(request(1), changed([](SwitchSegment& s) { s.rows = -1; }), "[-1, 256]");
    refuses(request(1), changed([](SwitchSegment& s) { s.b = nullptr; }), "null pointer");
    refuses(request(1), changed([](SwitchSegment& s) { s.rank = 8; }), "multiple of 16, got 8");
    refuses(request(1), changed([](SwitchSegment& s) { s.live_stride = 255; }), "live stride of at least 256, got 255");
    refuses(request(1), changed([](SwitchSegment& s) { s.source_stride = 0; }), "source stride");
    refuses(request(1), changed([](SwitchSegment& s) { s.a_row_stride = 1; }), "a row stride");
    refuses(request(1), changed([](SwitchSegment& s) { s.b_row_stride = 63; }), "b row stride of at least 64, got 63");
    refuses(request(1), changed([](SwitchSegment& s) { s.scale_col_shift = 2; }), "scale shifts");
}

}  // namespace

int main() {
    test_units();
    test_bytes();
    test_large();
    test_alignment();
    test_resident_chunks();
    test_refusals();
    return num_failures == 0 ? 0 : 1;
}
