// The instruction sets that the CPU kernels are compiled for.
#pragma once

#include <string>
#include <vector>

#include "linear_cpu.h"
#include "merge_cpu.h"

namespace fusedmerge {

struct Variant {
    std::string name;
    MergeUnit merge;
    LinearKernels linear;
};

// Those that this machine runs, the best one last.
const std::vector<Variant>& variants();

// The one of that name; null if this machine has none. "": the best.
const Variant* find_variant(const std::string& name);

}  // namespace fusedmerge
