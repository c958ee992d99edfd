// An engine that instantiates the switch for itself, and launches it with its own runtime.
#include "fusedmerge/kernel/switch.cuh"

void launch_switch(const fusedmerge::SwitchParams& params, int grid, cudaStream_t stream) {
    using namespace fusedmerge;
    switch_kernel<Bf16, Bf16, Bf16><<<grid, kThreads, kSwitchSharedBytes<Bf16>, stream>>>(params);
}
