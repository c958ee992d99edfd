// Plans the switch of Llama-2-7B on the host, shows how errors arrive, and, where there is a GPU, switches a mixture and checks it.
#include <fusedmerge/fusedmerge.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "layer.h"

namespace {

bool expect(bool condition, const char* what) {
    if (!condition) std::fprintf(stderr, "mixture: not so: %s (%s)\n", what, fusedmerge_last_error());
    return condition;
}

// A target of which only shapes and alignment count: host functions follow no pointer.
fusedmerge_switch_target describe(int rows, int cols, int rank) {
    static const char memory[64] = {};
    fusedmerge_switch_target target{};
    target.live = const_cast<char*>(memory);
    target.base = memory + 32;
    target.a = target.b = memory;
    target.scaling = reinterpret_cast<const float*>(memory);
    target.live_stride = target.base_stride = target.a_row_stride = cols;
    target.a_adapter_stride = static_cast<int64_t>(rank) * cols;
    target.b_row_stride = rank;
    target.b_adapter_stride = static_cast<int64_t>(rank) * rows;
    target.rows = rows;
    target.cols = cols;
    target.rank = rank;
    return target;
}

bool plan_on_host() {
    std::vector<fusedmerge_switch_target> targets;
    for (int layer = 0; layer < 32; ++layer) {
        for (int i = 0; i < 4; ++i) targets.push_back(describe(4096, 4096, 64));   // q, k, v, o
        for (int i = 0; i < 2; ++i) targets.push_back(describe(11008, 4096, 64));  // gate, up
        targets.push_back(describe(4096, 11008, 64));                              // down
    }
    fusedmerge_switch_options options = FUSEDMERGE_SWITCH_OPTIONS_INIT;
    options.num_adapters = 8;
    options.max_slots = 2;
    options.device = {132, 232448};  // an H100; fusedmerge_device_query tells the device at hand
    fusedmerge_switch_plan* plan = nullptr;
    fusedmerge_switch_figures figures{};
    bool right = expect(fusedmerge_switch_plan_create(&options, targets.data(), 224, &plan) == FUSEDMERGE_OK, "a plan is made") &&
                 expect(fusedmerge_switch_plan_query(plan, &figures) == FUSEDMERGE_OK, "it has figures") &&
                 expect(figures.live_bytes == 32LL * 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008), "it writes every weight once") &&
                 expect(figures.grid == 132, "it fills the device");
    std::printf("Llama-2-7B, r = 64: %.2f GB written, %.2f GB read, %.2f GB for each adapter; workspace %lld bytes, %lld units\n",
                figures.live_bytes / 1e9, figures.base_bytes / 1e9, figures.adapter_bytes / 1e9,
                static_cast<long long>(figures.workspace_bytes), static_cast<long long>(figures.num_units));
    fusedmerge_switch_plan_destroy(plan);
    return right;
}

bool meet_errors() {
    fusedmerge_switch_options options = FUSEDMERGE_SWITCH_OPTIONS_INIT;
    options.device = {132, 232448};
    fusedmerge_switch_target target = describe(4096, 4096, 8);
    fusedmerge_switch_plan* plan = nullptr;
    bool right = expect(fusedmerge_switch_plan_create(&options, &target, 1, &plan) == FUSEDMERGE_INVALID_ARGUMENT, "rank 8 is refused") &&
                 expect(std::strstr(fusedmerge_last_error(), "multiple of 16, got 8") != nullptr, "the message says why") &&
                 expect(plan == nullptr, "no plan is left behind");
    std::printf("an error: %s\n", fusedmerge_last_error());
    return right && expect(fusedmerge_switch_run(nullptr, nullptr, nullptr, nullptr, 0, nullptr) == FUSEDMERGE_INVALID_ARGUMENT,
                           "a run needs a plan");
}

}  // namespace

int main() {
    if (!expect(fusedmerge_version() / 100 == FUSEDMERGE_VERSION / 100, "header and library are of one version")) return 1;
    if (!plan_on_host() || !meet_errors()) return 1;
    std::printf("host part: right\n");
#ifdef MIXTURE_ON_GPU
    fusedmerge_device device{};
    if (fusedmerge_device_query(0, &device) == FUSEDMERGE_OK) return run_on_gpu(0);
    std::printf("GPU part: not run (%s)\n", fusedmerge_last_error());
#else
    std::printf("GPU part: not built (no CUDA toolkit, or a library without CUDA)\n");
#endif
    return 0;
}
