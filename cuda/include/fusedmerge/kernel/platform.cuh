// The one place where nvcc, NVRTC and the host simulator differ.
//
// Everything else in this directory is written against the names below. Under nvcc and NVRTC they are CUDA; under a plain C++ compiler they
// are the simulator (tests/sim/simulator.h), which runs one fiber per CUDA thread.
#pragma once

#if defined(__CUDACC__)  // nvcc and NVRTC

#define FM_DEVICE __device__ __forceinline__
#define FM_KERNEL(threads) FM_KERNEL_OF(threads, 1)
#define FM_KERNEL_OF(threads, blocks) __global__ void __launch_bounds__(threads, blocks)  // blocks on a multiprocessor at once
#define FM_UNROLL _Pragma("unroll")
#define FM_NO_UNROLL _Pragma("unroll 1")
#define FM_UNROLL_4 _Pragma("unroll 4")
#define FM_PTX(device, host) device
#if __CUDA_ARCH__ >= 900
#define FM_PTX_90(device, host) device
#else
#define FM_PTX_90(device, host)
#endif
#if __CUDA_ARCH__ >= 890
#define FM_PTX_89(device, otherwise) device
#else
#define FM_PTX_89(device, otherwise) otherwise
#endif
#define FM_GRID_CONSTANT __grid_constant__

namespace fusedmerge {
FM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FM_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FM_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }
FM_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    return shared_bytes;
}
FM_DEVICE void block_barrier() { __syncthreads(); }
FM_DEVICE void warp_barrier() { __syncwarp(); }
FM_DEVICE bool block_any(bool value) { return __syncthreads_or(value) != 0; }
FM_DEVICE void device_fence() { __threadfence(); }
FM_DEVICE int atomic_add(int* where, int value) { return atomicAdd(where, value); }
FM_DEVICE void atomic_or(int* where, int value) { atomicOr(where, value); }
FM_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }
FM_DEVICE float divide(float x, float y) { return __fdiv_rn(x, y); }
FM_DEVICE float add(float x, float y) { return __fadd_rn(x, y); }
FM_DEVICE float fused_multiply_add(float x, float y, float z) { return __fmaf_rn(x, y, z); }
FM_DEVICE float magnitude(float x) { return fabsf(x); }
FM_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
FM_DEVICE float exponential(float x) { return expf(x); }  // to two ulps; the host's last bit may differ
FM_DEVICE float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
FM_DEVICE unsigned float_to_bits(float x) { return __float_as_uint(x); }
FM_DEVICE int count_bits(unsigned x) { return __popc(x); }
}  // namespace fusedmerge

#else  // the host simulator

#include "simulator.h"

#define FM_DEVICE inline
#define FM_KERNEL(threads) void
#define FM_KERNEL_OF(threads, blocks) void
#define FM_UNROLL
#define FM_NO_UNROLL
#define FM_UNROLL_4
#define FM_PTX(device, host) host
#define FM_PTX_90(device, host) host
#define FM_PTX_89(device, otherwise) otherwise
#define FM_GRID_CONSTANT

namespace fusedmerge {
FM_DEVICE int thread_index() { return sim::thread_index(); }
FM_DEVICE int block_index() { return sim::block_index(); }
FM_DEVICE int grid_size() { return sim::grid_size(); }
FM_DEVICE unsigned char* shared_memory() { return sim::shared_memory(); }
FM_DEVICE void block_barrier() { sim::block_barrier(false); }
FM_DEVICE void warp_barrier() { sim::warp_barrier(); }
FM_DEVICE bool block_any(bool value) { return sim::block_barrier(value); }
FM_DEVICE void device_fence() {}
FM_DEVICE int atomic_add(int* where, int value) { return sim::atomic_add(where, value); }
FM_DEVICE void atomic_or(int* where, int value) { sim::atomic_or(where, value); }
FM_DEVICE float multiply(float x, float y) { return x * y; }
FM_DEVICE float divide(float x, float y) { return x / y; }
FM_DEVICE float add(float x, float y) { return x + y; }
FM_DEVICE float fused_multiply_add(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
FM_DEVICE float magnitude(float x) { return __builtin_fabsf(x); }
FM_DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
FM_DEVICE float exponential(float x) { return __builtin_expf(x); }
FM_DEVICE float bits_to_float(unsigned bits) { return sim::bits_to_float(bits); }
FM_DEVICE unsigned float_to_bits(float x) { return sim::float_to_bits(x); }
FM_DEVICE int count_bits(unsigned x) { return __builtin_popcount(x); }
}  // namespace fusedmerge

#endif

namespace fusedmerge {
constexpr int kWarpLanes = 32;

FM_DEVICE bool is_finite(float x) { return (float_to_bits(x) & 0x7f800000u) != 0x7f800000u; }

template <class T, class U>
constexpr bool kSame = false;
template <class T>
constexpr bool kSame<T, T> = true;
}  // namespace fusedmerge
