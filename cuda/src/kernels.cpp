#include "kernels.h"

#include <cstring>
#include <initializer_list>

namespace fusedmerge {

const NamedKernel* find_kernel(const char* name) {
    for (const KernelFamily& family : {linear_kernels(), sgmv_kernels()}) {
        for (int i = 0; i < family.count; ++i) {
            if (std::strcmp(family.first[i].name, name) == 0) return family.first + i;
        }
    }
    return nullptr;
}

}  // namespace fusedmerge
