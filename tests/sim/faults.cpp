// Kernels that are wrong on purpose, to show that the simulator notices. Each is what a careless edit of the real ones could do.
#include <string>

#include "fusedmerge/kernel/ptx.cuh"

namespace fusedmerge {
namespace {

void divergent_barrier(const void*) {
    if (thread_index() < 40) block_barrier();
}

void barrier_against_warp(const void*) {
    unsigned words[4];
    if (thread_index() < 32) {
        load_matrices(words, shared_memory());
    } else {
        block_barrier();
    }
    if (thread_index() == 5) block_barrier();
}

void half_a_warp(const void*) {
    unsigned words[4];
    if (thread_index() % 32 < 16) load_matrices(words, shared_memory());
}

void unfinished_copy(const void* source) {
    copy_async_16(shared_memory() + 16 * thread_index(), source, 16);
    copy_async_commit();
}

void misaligned_copy(const void* source) {
    copy_async_16(shared_memory() + 8, source, 16);
    copy_async_commit();
    copy_async_wait<0>();
}

void mixed_instructions(const void*) {
    unsigned words[4];
    float c[4] = {};
    if (thread_index() % 2 == 0) {
        load_matrices(words, shared_memory());
    } else {
        multiply_accumulate(c, {1, 2, 3, 4}, {5, 6}, Bf16{});
    }
}

constexpr sim::Entry kFaults[] = {divergent_barrier, barrier_against_warp, half_a_warp,
                                  unfinished_copy,   misaligned_copy,      mixed_instructions};

}  // namespace
}  // namespace fusedmerge

// What the simulator says of the fault; empty if it noticed nothing.
extern "C" const char* fm_sim_fault(int which, const fusedmerge::sim::Options* options) {
    static std::string said;
    alignas(16) static const unsigned char source[16] = {};
    said = fusedmerge::sim::launch(fusedmerge::kFaults[which], source, 2, 64, 4096, *options);
    return said.c_str();
}
