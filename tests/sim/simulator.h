// The host simulator: what platform.cuh and ptx.cuh call when no CUDA compiler is at work.
//
// One fiber per CUDA thread; a fiber runs until it meets a barrier, a warp-wide instruction, an atomic or its end. Several blocks are
// resident and take turns at random; blocks start in index order. A launch fails, with a message, on divergent barriers (threads that can
// never meet), misaligned 16-byte accesses, and asynchronous copies that nobody waited for. Shared memory starts as NaN. Not modelled:
// fences, memory order, overlapping launches (but see `hide`), cache policies, bank conflicts, timing.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

namespace fusedmerge::sim {

enum class ThreadOrder { kForward = 0, kReverse = 1, kShuffled = 2 };
enum class TensorCore { kA100 = 0, kH100 = 1 };                 // one extra alignment bit over k8 blocks; two over k16
enum class AsyncCopies { kLate = 0, kEarly = 1, kRandom = 2 };  // data moves at the wait, at the issue, or at either

struct Options {
    int thread_order;
    int tensor_core;
    int async_copies;
    int resident_blocks;
    unsigned seed;
};

using Entry = void (*)(const void* argument);

// Runs `entry(argument)` on every thread of the grid. Empty = success, else what went wrong.
std::string launch(Entry entry, const void* argument, int num_blocks, int num_threads, int shared_bytes, const Options& options);

int thread_index();
int block_index();
int grid_size();
unsigned char* shared_memory();

bool block_barrier(bool value);  // true where any thread of the block brought true
int atomic_add(int* where, int value);
void atomic_or(int* where, int value);

// The next launch finds these bytes to be NaN until a thread of it calls grid_wait: what an earlier kernel has yet to write. It fails where
// a thread ends that did not call it: the launch could end before that kernel.
void hide(void* from, long long num_bytes);
void grid_wait();

// Reads a byte, for AddressSanitizer to see.
void touch(const void* from);

void copy_async(void* shared, const void* global, int size, int num_bytes);
void copy_async_commit();
void copy_async_wait(int num_pending);

void load_matrices(unsigned (&words)[4], const void* shared_row);
void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bf16);

void warp_barrier();
unsigned shuffle_xor(unsigned value, int mask);  // what the lane whose number differs by the mask's bits brought
unsigned shuffle(unsigned value, int lane);      // what a lane brought
unsigned equal_lanes(unsigned value);            // those that brought this value

void load_aligned(unsigned* words, const void* from, int num_bytes, unsigned long long policy);
void store_aligned(void* to, const unsigned* words, int num_bytes, unsigned long long policy);

unsigned short float_to_bf16(float x);
unsigned short float_to_fp16(float x);
float fp16_to_float(unsigned short bits);

// NaN in each half of the word whose exponent is all ones.
inline unsigned non_finite_halves(unsigned word, unsigned exponent) {
    unsigned low = (word & exponent) == exponent ? 0x7fffu : 0u;
    return (word >> 16 & exponent) == exponent ? low | 0x7fff0000u : low;
}

inline float bits_to_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline unsigned float_to_bits(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// One dot product of a tensor core: c + sum a[k] b[k], products exact, all terms aligned to the largest exponent and truncated, the sum
// truncated to float32; `extra_bits` are kept below float32's last place while aligning.
float dot_truncated(float c, const float* a, const float* b, int depth, int extra_bits);

}  // namespace fusedmerge::sim
