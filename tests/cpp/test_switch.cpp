// The C interface from plan to merged weights, on the host simulator: every call between create and destroy, against a double reference.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"

namespace {

using Bits = uint16_t;  // of a bf16

float widen(Bits bits) {
    uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

Bits narrow(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return static_cast<Bits>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// e4m3 whose bits the test chooses among normal numbers: 1.fraction * 2^(exponent - 7).
float widen_fp8(uint8_t bits) {
    float value = std::ldexp(1.0f + (bits & 7) / 8.0f, (bits >> 3 & 15) - 7);
    return bits & 0x80 ? -value : value;
}

constexpr int kAdapters = 3, kRank = 32;

struct Target {
    int rows, cols;
    std::vector<Bits> base, live, a, b;
    std::vector<uint8_t> base8;
    std::vector<float> scaling{2.0f, 0.5f, 1.0f}, scale;
    std::vector<int32_t> ranks{32, 16, 32};

    Target(int rows, int cols, unsigned seed) : rows(rows), cols(cols) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        auto fill = [&](std::vector<Bits>& values, size_t count, float size) {
            values.resize(count);
            for (Bits& value : values) value = narrow(size * normal(random));
        };
        const size_t elements = static_cast<size_t>(rows) * cols;
        fill(base, elements, 0.02f);
        fill(a, static_cast<size_t>(kAdapters) * kRank * cols, 0.1f);
        fill(b, static_cast<size_t>(kAdapters) * kRank * rows, 0.1f);
        live.assign(elements, 0x7fc0);  // NaN: every weight must be written
        base8.resize(elements);
        for (uint8_t& value : base8) value = static_cast<uint8_t>((random() & 0x87) | (4 + random() % 4) << 3);
        scale.resize(static_cast<size_t>(rows));
        for (float& value : scale) value = 0.05f + 0.01f * std::fabs(normal(random));
        for (int row = 0; row < rows; ++row) {  // adapter 1 has rank 16: what lies behind must not be added
            for (int k = 16; k < kRank; ++k) b[(static_cast<size_t>(rows) + row) * kRank + k] = narrow(3.0f);
        }
    }

    fusedmerge_switch_target describe(bool inplace, bool fp8) {
        fusedmerge_switch_target made{};
        made.live = live.data();
        made.base = inplace ? nullptr : fp8 ? static_cast<const void*>(base8.data()) : base.data();
        made.a = a.data();
        made.b = b.data();
        made.scaling = scaling.data();
        made.ranks = ranks.data();
        made.live_stride = made.base_stride = made.a_row_stride = cols;
        made.a_adapter_stride = static_cast<int64_t>(kRank) * cols;
        made.b_row_stride = kRank;
        made.b_adapter_stride = static_cast<int64_t>(kRank) * rows;
        made.rows = rows;
        made.cols = cols;
        made.rank = kRank;
        if (fp8) {
            made.base_scale = scale.data();
            made.base_scale_stride = 1;
            made.base_scale_col_shift = 31;
        }
        return made;
    }

    double base_value(int row, int col, bool fp8) const {
        size_t i = static_cast<size_t>(row) * cols + col;
        return fp8 ? scale[row] * widen_fp8(base8[i]) : widen(base[i]);
    }

    // The farthest that a weight is from the double truth, in units of what is allowed; `slack` is added to half an ulp.
    double worst(const std::vector<double>& gates, bool fp8, double slack) const {
        double worst = 0.0;
        for (int row = 0; row < rows; ++row) {
            for (int col = 0; col < cols; ++col) {
                double truth = base_value(row, col, fp8), size = std::fabs(truth);
                for (int id = 0; id < kAdapters; ++id) {
                    for (int k = 0; gates[id] != 0.0 && k < ranks[id]; ++k) {
                        double term = gates[id] * scaling[id] * widen(b[(static_cast<size_t>(id) * rows + row) * kRank + k]) *
                                      widen(a[(static_cast<size_t>(id) * kRank + k) * cols + col]);
                        truth += term;
                        size += std::fabs(term);
                    }
                }
                double got = widen(live[static_cast<size_t>(row) * cols + col]);
                double error = std::fabs(got - truth) / (std::fmax(std::fabs(got), std::fabs(truth)) * 0x1p-8 + slack * size);
                if (!(error <= worst)) worst = error;  // NaN too
            }
        }
        return worst;
    }
};

struct Switcher {
    std::vector<Target> targets{Target(70, 264, 1), Target(1, 1, 2), Target(65, 33, 3)};
    std::vector<uint64_t> workspace;
    fusedmerge_switch_plan* plan = nullptr;
    fusedmerge_switch_figures figures{};
    bool fp8;

    explicit Switcher(fusedmerge_mode mode, bool use_fp8 = false) : fp8(use_fp8) {
        fusedmerge_switch_options options = FUSEDMERGE_SWITCH_OPTIONS_INIT;
        options.mode = mode;
        options.safe = 1;
        options.base_dtype = fp8 ? FUSEDMERGE_FP8_E4M3 : FUSEDMERGE_BF16;
        options.num_adapters = kAdapters;
        options.max_slots = 4;
        CHECK_OK(fusedmerge_device_query(0, &options.device));
        std::vector<fusedmerge_switch_target> described;
        for (Target& target : targets) {
            if (mode == FUSEDMERGE_INPLACE) target.live = target.base;
            described.push_back(target.describe(mode == FUSEDMERGE_INPLACE, fp8));
        }
        CHECK_OK(fusedmerge_switch_plan_create(&options, described.data(), static_cast<int32_t>(described.size()), &plan));
        CHECK_OK(fusedmerge_switch_plan_query(plan, &figures));
        // The caller's description may go; the workspace is exactly as large as told, and guarded behind.
        workspace.assign(static_cast<size_t>(figures.workspace_bytes) / 8 + 3, 0xabababababababab);
        CHECK_OK(fusedmerge_switch_init(plan, memory(), static_cast<size_t>(figures.workspace_bytes), nullptr));
    }
    ~Switcher() {
        CHECK(workspace.back() == 0xabababababababab);
        fusedmerge_switch_plan_destroy(plan);
    }

    void* memory() { return workspace.data() + (reinterpret_cast<uintptr_t>(workspace.data()) % 16 != 0); }

    void run(std::vector<int32_t> ids, std::vector<float> gates) {
        CHECK_OK(fusedmerge_switch_run(plan, memory(), ids.data(), gates.data(), static_cast<int32_t>(ids.size()), nullptr));
    }

    fusedmerge_switch_state state() {
        fusedmerge_switch_state found{};
        CHECK_OK(fusedmerge_switch_read_state(plan, memory(), &found, nullptr));
        return found;
    }

    double worst(const std::vector<double>& gates, double slack = 0x1p-18) const {
        double worst = 0.0;
        for (const Target& target : targets) worst = std::fmax(worst, target.worst(gates, fp8, slack));
        return worst;
    }
};

void test_exact(bool fp8) {
    Switcher switcher(FUSEDMERGE_EXACT, fp8);
    CHECK(switcher.state().valid == 0);
    switcher.run({2, -1, 0, 2}, {0.25f, 0.0f, -0.75f, 0.25f});
    CHECK(switcher.worst({-0.75, 0.0, 0.5}) <= 1.0);
    fusedmerge_switch_state state = switcher.state();
    CHECK(state.valid == 1 && state.flags == 0 && state.num_active == 2);
    CHECK(state.ids[0] == 0 && state.gates[0] == -0.75f && state.ids[1] == 2 && state.gates[1] == 0.5f && state.ids[2] == 0);
    switcher.run({1}, {1.5f});
    CHECK(switcher.worst({0.0, 1.5, 0.0}) <= 1.0);
    switcher.run({}, {});
    CHECK(switcher.worst({0.0, 0.0, 0.0}) <= 1.0 && switcher.state().num_active == 0);
    if (!fp8) {
        for (const Target& target : switcher.targets) CHECK(target.live == target.base);
    }
}

// The same mixture again writes nothing; after invalidate it writes.
void test_unchanged_and_invalidate() {
    Switcher switcher(FUSEDMERGE_EXACT);
    switcher.run({0, 1}, {0.5f, 0.5f});
    std::vector<Bits> merged = switcher.targets[0].live;
    switcher.targets[0].live[5] = 0x4242;
    switcher.run({1, 0}, {0.5f, 0.5f});
    CHECK(switcher.targets[0].live[5] == 0x4242);
    CHECK_OK(fusedmerge_switch_invalidate(switcher.plan, switcher.memory(), nullptr));
    CHECK(switcher.state().valid == 0);
    switcher.run({1, 0}, {0.5f, 0.5f});
    CHECK(switcher.targets[0].live == merged && switcher.state().valid == 1);
}

void test_inplace() {
    Switcher switcher(FUSEDMERGE_INPLACE);
    switcher.run({0, 1}, {0.5f, 0.25f});
    CHECK(switcher.worst({0.5, 0.25, 0.0}) <= 1.0);
    switcher.run({0, 2}, {0.5f, -0.5f});
    CHECK(switcher.worst({0.5, 0.0, -0.5}, 0x1p-8) <= 1.0);  // each switch rounds once
    switcher.run({}, {});
    for (const Target& target : switcher.targets) {
        for (size_t i = 0; i < target.base.size(); ++i) CHECK(std::fabs(widen(target.live[i]) - widen(target.base[i])) < 0.005f);
    }
}

// What is wrong on the device changes no weight, is told once, and does not stay.
void test_device_errors() {
    Switcher switcher(FUSEDMERGE_EXACT);
    switcher.run({0}, {1.0f});
    std::vector<Bits> merged = switcher.targets[0].live;
    switcher.run({kAdapters}, {1.0f});
    switcher.run({1}, {INFINITY});
    CHECK(switcher.targets[0].live == merged);
    fusedmerge_switch_state state = switcher.state();
    CHECK(state.flags == (FUSEDMERGE_STATE_BAD_ID | FUSEDMERGE_STATE_BAD_GATE) && state.num_active == 1 && state.ids[0] == 0);
    CHECK(switcher.state().flags == 0);
    switcher.run({0}, {3e38f});  // times its scaling: infinite
    CHECK(switcher.state().flags == FUSEDMERGE_STATE_NON_FINITE);
    switcher.run({1}, {1.0f});
    CHECK(switcher.worst({0.0, 1.0, 0.0}) <= 1.0 && switcher.state().flags == 0);
}

}  // namespace

int main() {
    test_exact(false);
    test_exact(true);
    test_unchanged_and_invalidate();
    test_inplace();
    test_device_errors();
    return num_failures == 0 ? 0 : 1;
}
