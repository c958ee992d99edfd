// The switch on a GPU: two layers, one launch for each mixture, every weight against a double reference.
#include <cuda_runtime_api.h>
#include <fusedmerge/fusedmerge.h>

#include <cstdio>
#include <cstdlib>

#include "layer.h"

namespace {

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "mixture: CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
}

void check(fusedmerge_result result) {
    if (result == FUSEDMERGE_OK) return;
    std::fprintf(stderr, "mixture: %s: %s\n", fusedmerge_result_name(result), fusedmerge_last_error());
    std::exit(1);
}

// Device memory with a copy of `values`.
template <class T>
T* upload(const std::vector<T>& values) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, values.size() * sizeof(T)));
    check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return static_cast<T*>(memory);
}

fusedmerge_switch_target upload(const Layer& layer) {
    fusedmerge_switch_target target{};
    target.live = upload(layer.base);
    target.base = upload(layer.base);
    target.a = upload(layer.a);
    target.b = upload(layer.b);
    target.scaling = upload(layer.scaling);
    target.live_stride = target.base_stride = target.a_row_stride = layer.cols;
    target.a_adapter_stride = static_cast<int64_t>(kRank) * layer.cols;
    target.b_row_stride = kRank;
    target.b_adapter_stride = static_cast<int64_t>(kRank) * layer.rows;
    target.rows = layer.rows;
    target.cols = layer.cols;
    target.rank = kRank;
    return target;
}

struct Mixture {
    const char* name;
    std::vector<int32_t> ids;
    std::vector<float> gates;
    std::vector<double> per_adapter;  // the same, as the reference takes it
};

}  // namespace

int run_on_gpu(int ordinal) {
    check(cudaSetDevice(ordinal));
    const std::vector<Layer> layers{make_layer(1024, 512, 1), make_layer(301, 777, 2)};
    std::vector<fusedmerge_switch_target> targets;
    for (const Layer& layer : layers) targets.push_back(upload(layer));

    fusedmerge_switch_options options = FUSEDMERGE_SWITCH_OPTIONS_INIT;
    options.num_adapters = kAdapters;
    options.max_slots = 3;
    options.safe = 1;
    check(fusedmerge_device_query(ordinal, &options.device));
    fusedmerge_switch_plan* plan = nullptr;
    check(fusedmerge_switch_plan_create(&options, targets.data(), static_cast<int32_t>(targets.size()), &plan));
    fusedmerge_switch_figures figures{};
    check(fusedmerge_switch_plan_query(plan, &figures));

    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    void* workspace = nullptr;
    check(cudaMalloc(&workspace, static_cast<size_t>(figures.workspace_bytes)));
    check(cudaDeviceSynchronize());  // the uploads went to another stream
    check(fusedmerge_switch_init(plan, workspace, static_cast<size_t>(figures.workspace_bytes), stream));

    long long wrong = 0;
    const std::vector<Mixture> mixtures{
        {"two experts", {0, 2}, {0.75f, -0.5f}, {0.75, 0.0, -0.5, 0.0}},
        {"a duplicate and an empty slot", {3, -1, 3}, {0.25f, 0.0f, 0.5f}, {0.0, 0.0, 0.0, 0.75}},
        {"no expert", {-1}, {0.0f}, {0.0, 0.0, 0.0, 0.0}},
    };
    for (const Mixture& mixture : mixtures) {
        int32_t* ids = upload(mixture.ids);
        float* gates = upload(mixture.gates);
        check(cudaDeviceSynchronize());
        check(fusedmerge_switch_run(plan, workspace, ids, gates, static_cast<int32_t>(mixture.ids.size()), stream));
        fusedmerge_switch_state state{};
        check(fusedmerge_switch_read_state(plan, workspace, &state, stream));  // waits
        long long wrong_here = state.flags != 0;
        for (size_t i = 0; i < layers.size(); ++i) {
            std::vector<uint16_t> live(layers[i].base.size());
            check(cudaMemcpy(live.data(), targets[i].live, live.size() * sizeof(uint16_t), cudaMemcpyDeviceToHost));
            wrong_here += count_wrong(layers[i], live, mixture.per_adapter);
        }
        std::printf("GPU part: %s: %d active, %lld wrong weights\n", mixture.name, state.num_active, wrong_here);
        wrong += wrong_here;
        check(cudaFree(ids));
        check(cudaFree(gates));
    }
    fusedmerge_switch_plan_destroy(plan);
    for (const fusedmerge_switch_target& target : targets) {
        for (const void* memory :
             {static_cast<const void*>(target.live), target.base, target.a, target.b, static_cast<const void*>(target.scaling)}) {
            check(cudaFree(const_cast<void*>(memory)));
        }
    }
    check(cudaFree(workspace));
    check(cudaStreamDestroy(stream));
    return wrong == 0 ? 0 : 1;
}
