// The C interface as a consumer links it, without a device: versions, plans, sizes, every refusal and its message.
#include <cstddef>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

extern "C" size_t c_layout(size_t index);
extern "C" fusedmerge_switch_options c_options(void);

namespace {

constexpr const char* kCreate = "fusedmerge_switch_plan_create: ";
constexpr fusedmerge_device kH100 = {132, 232448};

alignas(16) unsigned char storage[4096];  // only its address counts: host functions follow no pointer

fusedmerge_switch_options options() {
    fusedmerge_switch_options made = FUSEDMERGE_SWITCH_OPTIONS_INIT;
    made.num_adapters = 8;
    made.max_slots = 2;
    made.device = kH100;
    return made;
}

fusedmerge_switch_target target(int rows = 4096, int cols = 11008, int rank = 64) {
    fusedmerge_switch_target made{};
    made.live = storage;
    made.base = storage + 1024;
    made.a = made.b = storage + 2048;
    made.scaling = reinterpret_cast<const float*>(storage);
    made.live_stride = made.base_stride = made.a_row_stride = cols;
    made.a_adapter_stride = static_cast<int64_t>(rank) * cols;
    made.b_row_stride = rank;
    made.b_adapter_stride = static_cast<int64_t>(rows) * rank;
    made.rows = rows;
    made.cols = cols;
    made.rank = rank;
    return made;
}

struct Plan {
    fusedmerge_switch_plan* handle = nullptr;
    Plan() {
        std::vector<fusedmerge_switch_target> targets{target(), target(1024, 4096)};
        fusedmerge_switch_options chosen = options();
        CHECK_OK(fusedmerge_switch_plan_create(&chosen, targets.data(), 2, &handle));
    }
    ~Plan() { fusedmerge_switch_plan_destroy(handle); }
};

void test_library() {
    CHECK(fusedmerge_version() == FUSEDMERGE_VERSION);
    CHECK(fusedmerge_has_cuda() == FUSEDMERGE_TEST_CUDA);
    CHECK(std::string(fusedmerge_result_name(FUSEDMERGE_CUDA_ERROR)) == "FUSEDMERGE_CUDA_ERROR");
    CHECK(std::string(fusedmerge_result_name(static_cast<fusedmerge_result>(99))) == "unknown");
}

void test_c_and_cpp_agree() {
    const size_t layout[] = {sizeof(fusedmerge_switch_target),
                             offsetof(fusedmerge_switch_target, base_scale),
                             offsetof(fusedmerge_switch_target, base_scale_stride),
                             offsetof(fusedmerge_switch_target, reserved),
                             sizeof(fusedmerge_switch_options),
                             offsetof(fusedmerge_switch_options, mode),
                             offsetof(fusedmerge_switch_options, device),
                             sizeof(fusedmerge_switch_figures),
                             sizeof(fusedmerge_switch_state),
                             offsetof(fusedmerge_switch_state, gates),
                             sizeof(fusedmerge_result)};
    for (size_t i = 0; i < sizeof(layout) / sizeof(layout[0]); ++i) CHECK(c_layout(i) == layout[i]);
    fusedmerge_switch_options from_c = c_options();
    fusedmerge_switch_options from_cpp = FUSEDMERGE_SWITCH_OPTIONS_INIT;
    CHECK(std::memcmp(&from_c, &from_cpp, sizeof(from_c)) == 0);
}

void test_figures() {
    Plan plan;
    fusedmerge_switch_figures figures{};
    CHECK_OK(fusedmerge_switch_plan_query(plan.handle, &figures));
    CHECK(figures.live_bytes == 2LL * (4096 * 11008 + 1024 * 4096) && figures.base_bytes == figures.live_bytes);
    CHECK(figures.adapter_bytes == 2LL * 64 * (4096 + 11008 + 1024 + 4096) && figures.bank_bytes == 8 * figures.adapter_bytes);
    CHECK(figures.workspace_bytes == 2 * 152 + 272);
    CHECK(figures.grid == 132 && figures.num_units >= 132 && figures.shared_bytes <= kH100.shared_bytes_per_block);
    CHECK_FAILS(fusedmerge_switch_plan_query(nullptr, &figures), FUSEDMERGE_INVALID_ARGUMENT, "fusedmerge_switch_plan_query: ", "plan");
    CHECK_FAILS(fusedmerge_switch_plan_query(plan.handle, nullptr), FUSEDMERGE_INVALID_ARGUMENT,
                "fusedmerge_switch_plan_query: ", "figures");
    fusedmerge_switch_plan_destroy(nullptr);
}

void refuses_options(const char* part, void (*change)(fusedmerge_switch_options&)) {
    fusedmerge_switch_options chosen = options();
    fusedmerge_switch_target one = target();
    change(chosen);
    auto* plan = reinterpret_cast<fusedmerge_switch_plan*>(storage);
    CHECK_FAILS(fusedmerge_switch_plan_create(&chosen, &one, 1, &plan), FUSEDMERGE_INVALID_ARGUMENT, kCreate, part);
    CHECK(plan == nullptr);
}

void refuses_target(const char* part, void (*change)(fusedmerge_switch_options&, fusedmerge_switch_target&)) {
    fusedmerge_switch_options chosen = options();
    fusedmerge_switch_target both[] = {target(), target()};
    change(chosen, both[1]);
    if (chosen.mode == FUSEDMERGE_INPLACE) both[0].base = nullptr;
    fusedmerge_switch_plan* plan = nullptr;
    CHECK_FAILS(fusedmerge_switch_plan_create(&chosen, both, 2, &plan), FUSEDMERGE_INVALID_ARGUMENT, kCreate, part);
    CHECK(plan == nullptr);
}

void test_refused_options() {
    using Options = fusedmerge_switch_options;
    refuses_options("got 48 and 136", [](Options& o) { o.options_size = 48; });
    refuses_options("got 56 and 128", [](Options& o) { o.target_size = 128; });
    refuses_options("options.mode", [](Options& o) { o.mode = 2; });
    refuses_options("options.safe: expected 0 or 1, got -1", [](Options& o) { o.safe = -1; });
    refuses_options("options.reserved", [](Options& o) { o.reserved = 1; });
    refuses_options("live dtype", [](Options& o) { o.live_dtype = FUSEDMERGE_FP8_E4M3; });
    refuses_options("base dtype", [](Options& o) { o.base_dtype = FUSEDMERGE_FP16; });
    refuses_options("factor dtype", [](Options& o) { o.factor_dtype = FUSEDMERGE_FP16; });
    refuses_options("adapters", [](Options& o) { o.num_adapters = 0; });
    refuses_options("slots: expected 0 to 32, got 33", [](Options& o) { o.max_slots = 33; });
    refuses_options("multiprocessors", [](Options& o) { o.device = {}; });
    refuses_options("shared memory", [](Options& o) { o.device.shared_bytes_per_block = 49152; });
}

void test_refused_targets() {
    using Options = fusedmerge_switch_options;
    using Target = fusedmerge_switch_target;
    refuses_target("target 1: reserved", [](Options&, Target& t) { t.reserved = 1; });
    refuses_target("target 1: base: expected storage apart from live", [](Options&, Target& t) { t.base = t.live; });
    refuses_target("target 1: base: expected null in place", [](Options& o, Target&) { o.mode = FUSEDMERGE_INPLACE; });
    refuses_target("target 1: base_scale: expected null", [](Options&, Target& t) { t.base_scale = t.scaling; });
    refuses_target("target 1: base_scale_stride: expected at least 86, got 85", [](Options& o, Target& t) {
        o.base_dtype = FUSEDMERGE_FP8_E4M3;
        t.base_scale = t.scaling;
        t.base_scale_row_shift = t.base_scale_col_shift = 7;
        t.base_scale_stride = 85;
    });
    refuses_target("scale shifts", [](Options& o, Target& t) {
        o.base_dtype = FUSEDMERGE_FP8_E4M3;
        t.base_scale = t.scaling;
    });
    refuses_target("segment 1: expected a rank padded to a multiple of 16, got 8", [](Options&, Target& t) { t.rank = 8; });
    refuses_target("null pointer", [](Options&, Target& t) { t.base = nullptr; });
    refuses_target("live stride of at least 11008, got 11007", [](Options&, Target& t) { t.live_stride = 11007; });

    fusedmerge_switch_options chosen = options();
    fusedmerge_switch_target one = target();
    fusedmerge_switch_plan* plan = nullptr;
    CHECK_FAILS(fusedmerge_switch_plan_create(&chosen, &one, 1, nullptr), FUSEDMERGE_INVALID_ARGUMENT, kCreate, "plan");
    CHECK_FAILS(fusedmerge_switch_plan_create(nullptr, &one, 1, &plan), FUSEDMERGE_INVALID_ARGUMENT, kCreate, "options");
    CHECK_FAILS(fusedmerge_switch_plan_create(&chosen, nullptr, 1, &plan), FUSEDMERGE_INVALID_ARGUMENT, kCreate, "targets");
    CHECK_FAILS(fusedmerge_switch_plan_create(&chosen, &one, -1, &plan), FUSEDMERGE_INVALID_ARGUMENT, kCreate, "num_targets");
    CHECK_OK(fusedmerge_switch_plan_create(&chosen, nullptr, 0, &plan));
    fusedmerge_switch_plan_destroy(plan);
}

// Arguments are checked before a device is asked for.
void test_refused_calls() {
    Plan plan;
    int32_t ids[3] = {0, 1, 2};
    float gates[3] = {1, 1, 1};
    const char* init = "fusedmerge_switch_init: ";
    const char* run = "fusedmerge_switch_run: ";
    constexpr fusedmerge_result kInvalid = FUSEDMERGE_INVALID_ARGUMENT;
    CHECK_FAILS(fusedmerge_switch_init(nullptr, storage, sizeof(storage), nullptr), kInvalid, init, "plan");
    CHECK_FAILS(fusedmerge_switch_init(plan.handle, nullptr, sizeof(storage), nullptr), kInvalid, init, "workspace");
    CHECK_FAILS(fusedmerge_switch_init(plan.handle, storage + 8, sizeof(storage), nullptr), kInvalid, init, "16-byte alignment");
    CHECK_FAILS(fusedmerge_switch_init(plan.handle, storage, 575, nullptr), kInvalid, init, "expected at least 576, got 575");
    CHECK_FAILS(fusedmerge_switch_run(plan.handle, storage, ids, gates, 3, nullptr), kInvalid, run, "expected 0 to 2");
    CHECK_FAILS(fusedmerge_switch_run(plan.handle, storage, ids, gates, -1, nullptr), kInvalid, run, "got -1");
    CHECK_FAILS(fusedmerge_switch_run(plan.handle, storage, nullptr, gates, 2, nullptr), kInvalid, run, "ids");
    CHECK_FAILS(fusedmerge_switch_run(plan.handle, storage, ids, nullptr, 2, nullptr), kInvalid, run, "gates");
    CHECK_FAILS(fusedmerge_switch_invalidate(plan.handle, nullptr, nullptr), kInvalid, "fusedmerge_switch_invalidate: ", "workspace");
    CHECK_FAILS(fusedmerge_switch_read_state(plan.handle, storage, nullptr, nullptr), kInvalid, "fusedmerge_switch_read_state: ", "state");
    CHECK_FAILS(fusedmerge_device_query(0, nullptr), kInvalid, "fusedmerge_device_query: ", "device");
}

// Without a device, with CUDA or not, every call that needs one fails and says so; it neither throws nor ends the process.
void test_without_device() {
    fusedmerge_device device{};
    fusedmerge_result found = fusedmerge_device_query(0, &device);
    if (found == FUSEDMERGE_OK) {
        CHECK(device.num_multiprocessors > 0 && device.shared_bytes_per_block > 0);
        return;
    }
    CHECK(found == (fusedmerge_has_cuda() ? FUSEDMERGE_CUDA_ERROR : FUSEDMERGE_NOT_AVAILABLE));
    Plan plan;
    fusedmerge_switch_state state{};
    CHECK_FAILS(fusedmerge_switch_init(plan.handle, storage, sizeof(storage), nullptr), found, "fusedmerge_switch_init: ", "expected");
    CHECK_FAILS(fusedmerge_switch_run(plan.handle, storage, nullptr, nullptr, 0, nullptr), found, "fusedmerge_switch_run: ", "expected");
    CHECK_FAILS(fusedmerge_switch_invalidate(plan.handle, storage, nullptr), found, "fusedmerge_switch_invalidate: ", "expected");
    CHECK_FAILS(fusedmerge_switch_read_state(plan.handle, storage, &state, nullptr), found, "fusedmerge_switch_read_state: ", "expected");
}

void test_error_is_the_threads_own() {
    std::string other = "unset";
    fusedmerge_switch_figures figures{};
    CHECK_FAILS(fusedmerge_switch_plan_query(nullptr, &figures), FUSEDMERGE_INVALID_ARGUMENT, "fusedmerge_switch_plan_query: ", "plan");
    std::thread([&other] { other = fusedmerge_last_error(); }).join();
    CHECK(other.empty());
    CHECK(fusedmerge_last_error()[0] != '\0');
}

}  // namespace

int main() {
    test_library();
    test_c_and_cpp_agree();
    test_figures();
    test_refused_options();
    test_refused_targets();
    test_refused_calls();
    test_without_device();
    test_error_is_the_threads_own();
    return num_failures == 0 ? 0 : 1;
}
