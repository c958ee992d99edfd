// params.cuh is plain C++: a host program may fill its structs without a CUDA compiler.
#include "fusedmerge/kernel/params.cuh"

int main() {
    fusedmerge::SwitchParams params{};
    return params.num_slots == 0 && sizeof(fusedmerge::SwitchSegment) == 152 ? 0 : 1;
}
