// The kernels that were compiled in: what the launcher looks up, and nothing of how they were made.
#pragma once

#include "numbers.h"

namespace fusedmerge {

struct SwitchInstance {
    Number live;
    Number source;
    Number factor;
    const void* kernel;  // for cudaFuncSetAttribute and cudaLaunchKernel; its one argument is a SwitchParams
    int shared_bytes;    // dynamic shared memory of a block
};

// Null where the combination does not exist.
const SwitchInstance* find_switch_instance(Number live, Number source, Number factor);

}  // namespace fusedmerge
