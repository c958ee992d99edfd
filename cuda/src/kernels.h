// Kernels by name. A family (kernels_linear.cu, ...) is a table of its instances: nvcc compiles it into the library, g++ (-x c++) into the
// simulator, and fusedmerge/backend/kernels.py names its entries. Each kernel's one argument is a plain struct.
#pragma once

namespace fusedmerge {

struct NamedKernel {
    const char* name;
    const void* kernel;  // for cudaLaunchKernelExC; in the simulator a sim::Entry
    int threads;         // of a block
    int params_bytes;    // of its argument
};

struct KernelFamily {
    const NamedKernel* first;
    int count;
};

KernelFamily linear_kernels();
KernelFamily sgmv_kernels();

// Null where there is none of that name.
const NamedKernel* find_kernel(const char* name);

#if defined(__CUDACC__)
template <class Params, void (*kKernel)(Params)>
const void* kernel_pointer() {
    return reinterpret_cast<const void*>(kKernel);
}
#else
template <class Params, void (*kKernel)(Params)>
void enter_kernel(const void* params) {
    kKernel(*static_cast<const Params*>(params));
}
template <class Params, void (*kKernel)(Params)>
const void* kernel_pointer() {
    return reinterpret_cast<const void*>(&enter_kernel<Params, kKernel>);
}
#endif

// One entry of a family's table.
template <class Params, void (*kKernel)(Params)>
NamedKernel named_kernel(const char* name, int threads) {
    return {name, kernel_pointer<Params, kKernel>(), threads, static_cast<int>(sizeof(Params))};
}

}  // namespace fusedmerge
