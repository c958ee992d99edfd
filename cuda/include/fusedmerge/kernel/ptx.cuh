// Every PTX instruction the kernels use, each beside its host twin.
//
// Shared-memory operands are passed as generic pointers. Fragments follow the PTX manual's m16n8k16 layout. With g = lane / 4 and
// t = lane % 4:
//   a[0..3]  (row g, k 2t..2t+1), (row g+8, same k), (row g, k 2t+8..2t+9), (row g+8, same k)      two 16-bit values in each word
//   b[0..1]  (k 2t..2t+1, column g), (k 2t+8..2t+9, column g)
//   c[0..3]  (row g, columns 2t, 2t+1), (row g+8, same columns)
#pragma once

#include "platform.cuh"

namespace fusedmerge {

struct Bf16 {
    unsigned short bits;
};
struct Fp16 {
    unsigned short bits;
};
struct Fp8E4M3 {
    unsigned char bits;
};

// clang-format off: an instruction, its outputs, its inputs, each on a line

// ---- asynchronous copies into shared memory -------------------------------------------------------------------------------------------

// 16 bytes; the last 16 - num_bytes of them are written as zeros, and not read.
FM_DEVICE void copy_async_16(void* shared, const void* global, int num_bytes) {
    FM_PTX(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                        "l"(global), "r"(num_bytes)
                        : "memory"),
           sim::copy_async(shared, global, 16, num_bytes));
}

// The same by way of L1, for what other blocks and later tiles of this multiprocessor read too.
FM_DEVICE void cached_async_16(void* shared, const void* global, int num_bytes) {
    FM_PTX(asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                        "l"(global), "r"(num_bytes)
                        : "memory"),
           sim::copy_async(shared, global, 16, num_bytes));
}

// The same for bytes that are touched once (evict_first_policy).
FM_DEVICE void stream_async_16(void* shared, const void* global, int num_bytes, unsigned long long policy) {
    FM_PTX(asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                            static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                        "l"(global), "r"(num_bytes), "l"(policy)
                        : "memory"),
           ((void)policy, sim::copy_async(shared, global, 16, num_bytes)));
}

FM_DEVICE void copy_async_commit() { FM_PTX(asm volatile("cp.async.commit_group;" ::: "memory"), sim::copy_async_commit()); }

// Waits until at most `kPending` of this thread's newest groups are unfinished. Other threads see the data after a block barrier.
template <int kPending>
FM_DEVICE void copy_async_wait() {
    FM_PTX(asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"), sim::copy_async_wait(kPending));
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit values; lanes 8i..8i+7 give the 16-byte rows of matrix i, which lands in words[i].
FM_DEVICE void load_matrices(unsigned (&words)[4], const void* shared_row) {
    FM_PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                        : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared_row)))
                        : "memory"),
           sim::load_matrices(words, shared_row));
}

// c += a b, accumulated in float32 as tensor cores do: products exact, aligned to the largest term, truncated.
FM_DEVICE void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], Bf16) {
    FM_PTX(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
           sim::multiply_accumulate(c, a, b, true));
}
FM_DEVICE void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], Fp16) {
    FM_PTX(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
           sim::multiply_accumulate(c, a, b, false));
}

// ---- lanes and launches ---------------------------------------------------------------------------------------------------------------

// Warp-wide: the value of the lane whose number differs by the mask's bits.
FM_DEVICE unsigned shuffle_xor(unsigned value, int mask) {
    unsigned other = 0;
    FM_PTX(asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(other) : "r"(value), "r"(mask)),
           other = sim::shuffle_xor(value, mask));
    return other;
}

// Warp-wide: the value of a lane, which each lane names for itself.
FM_DEVICE unsigned shuffle(unsigned value, int lane) {
    unsigned other = 0;
    FM_PTX(asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(other) : "r"(value), "r"(lane)),
           other = sim::shuffle(value, lane));
    return other;
}

// Warp-wide: which lanes brought the same value.
FM_DEVICE unsigned equal_lanes(unsigned value) {
    unsigned lanes = 0;
    FM_PTX(asm volatile("match.any.sync.b32 %0, %1, 0xffffffff;" : "=r"(lanes) : "r"(value)), lanes = sim::equal_lanes(value));
    return lanes;
}

// Programmatic launches. What the stream's earlier kernels wrote may be read, and anything be written, only after grid_wait; the next
// kernel may start once every block of this one has called launch_dependents or ended. Without a programmatic launch both do nothing.
FM_DEVICE void grid_wait() { FM_PTX_90(asm volatile("griddepcontrol.wait;" ::: "memory"), sim::grid_wait()); }
FM_DEVICE void launch_dependents() { FM_PTX_90(asm volatile("griddepcontrol.launch_dependents;" ::: "memory"), (void)0); }

// ---- global memory, read by many: it stays in L1 and L2 -------------------------------------------------------------------------------

FM_DEVICE void load_16(unsigned* words, const void* global) {
    FM_PTX(asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                        : "l"(global)
                        : "memory"),
           sim::load_aligned(words, global, 16, 0));
}

FM_DEVICE void load_8(unsigned* words, const void* global) {
    FM_PTX(asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(global) : "memory"),
           sim::load_aligned(words, global, 8, 0));
}

FM_DEVICE void store_16(void* global, const unsigned* words) {
    FM_PTX(asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                        : "memory"),
           sim::store_aligned(global, words, 16, 0));
}

// The 32 bytes that hold this address come into L2. A hint: nothing is returned, nothing waits.
FM_DEVICE void prefetch_32(const void* global) {
    FM_PTX(asm volatile("prefetch.global.L2 [%0];" ::"l"(global)), sim::touch(global));
}

// ---- global memory, streamed: these bytes are touched once, so they leave L2 first and let the adapters stay ---------------------------

FM_DEVICE unsigned long long evict_first_policy() {
    unsigned long long policy = 0;
    FM_PTX(asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)), (void)policy);
    return policy;
}

// For what is read again soon: it stays in L2, and is kept out of L1 alone.
FM_DEVICE unsigned long long evict_normal_policy() {
    unsigned long long policy = 0;
    FM_PTX(asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy)), (void)policy);
    return policy;
}

FM_DEVICE void stream_load_16(unsigned* words, const void* global, unsigned long long policy) {
    FM_PTX(asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                        : "l"(global), "l"(policy)
                        : "memory"),
           sim::load_aligned(words, global, 16, policy));
}

FM_DEVICE void stream_load_8(unsigned* words, const void* global, unsigned long long policy) {
    FM_PTX(asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                        : "=r"(words[0]), "=r"(words[1])
                        : "l"(global), "l"(policy)
                        : "memory"),
           sim::load_aligned(words, global, 8, policy));
}

FM_DEVICE void stream_store_16(void* global, const unsigned* words, unsigned long long policy) {
    FM_PTX(asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(global), "r"(words[0]),
                        "r"(words[1]), "r"(words[2]), "r"(words[3]), "l"(policy)
                        : "memory"),
           sim::store_aligned(global, words, 16, policy));
}

// The thread's index, computed anew: what derives from it is not hoisted out of a persistent kernel's loop, where it would cost registers.
FM_DEVICE int fresh_thread_index() {
    int index = 0;
    FM_PTX(asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index)), index = thread_index());
    return index;
}

// ---- registers ------------------------------------------------------------------------------------------------------------------------

// One word from the low (or high) halves of two: {low: x, high: y}.
FM_DEVICE unsigned pair_halves(unsigned x, unsigned y, bool high) {
    unsigned word = 0;
    FM_PTX(asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(x), "r"(y), "r"(high ? 0x7632u : 0x5410u)),
           word = high ? (x >> 16 | (y & 0xffff0000u)) : ((x & 0xffffu) | y << 16));
    return word;
}

// Round to nearest even, two at a time.
FM_DEVICE unsigned narrow_pair(float low, float high, Bf16) {
    unsigned word = 0;
    FM_PTX(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)),
           word = sim::float_to_bf16(low) | static_cast<unsigned>(sim::float_to_bf16(high)) << 16);
    return word;
}
FM_DEVICE unsigned narrow_pair(float low, float high, Fp16) {
    unsigned word = 0;
    FM_PTX(asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)),
           word = sim::float_to_fp16(low) | static_cast<unsigned>(sim::float_to_fp16(high)) << 16);
    return word;
}

// mark += 0 * word, in both halves: a half that was ever infinite or NaN leaves NaN there.
FM_DEVICE void mark_non_finite(unsigned& mark, unsigned word, Bf16) {
    FM_PTX(asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(mark) : "r"(word), "r"(0u)), mark |= sim::non_finite_halves(word, 0x7f80u));
}
FM_DEVICE void mark_non_finite(unsigned& mark, unsigned word, Fp16) {
    FM_PTX(asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(mark) : "r"(word), "r"(0u)), mark |= sim::non_finite_halves(word, 0x7c00u));
}

FM_DEVICE void widen_pair(float& low, float& high, unsigned word, Bf16) {
    low = bits_to_float(word << 16);
    high = bits_to_float(word & 0xffff0000u);
}
FM_DEVICE void widen_pair(float& low, float& high, unsigned word, Fp16) {
    FM_PTX(asm("{.reg .f16 x, y; mov.b32 {x, y}, %2; cvt.f32.f16 %0, x; cvt.f32.f16 %1, y;}" : "=f"(low), "=f"(high) : "r"(word)),
           (low = sim::fp16_to_float(static_cast<unsigned short>(word)), high = sim::fp16_to_float(static_cast<unsigned short>(word >> 16))));
}

// e4m3 without sm_89's instruction: its exponent and fraction, read as float32's, are too small by 2^120 (exact, subnormals included).
FM_DEVICE float widen_fp8(unsigned bits) {
    unsigned rest = bits & 0x7fu;
    float value = multiply(bits_to_float(rest << 20), bits_to_float((127u + 120u) << 23));
    unsigned pattern = rest == 0x7fu ? 0x7fffffffu : float_to_bits(value);
    return bits_to_float(pattern | (bits & 0x80u) << 24);
}

// The low two of four.
FM_DEVICE void widen_pair(float& low, float& high, unsigned word, Fp8E4M3) {
    FM_PTX_89(asm("{.reg .b32 both; .reg .b16 x, y; cvt.rn.f16x2.e4m3x2 both, %2; mov.b32 {x, y}, both; cvt.f32.f16 %0, x; cvt.f32.f16 %1, y;}"
                  : "=f"(low), "=f"(high)
                  : "h"(static_cast<unsigned short>(word))),
              (low = widen_fp8(word & 0xffu), high = widen_fp8(word >> 8 & 0xffu)));
}

// clang-format on

}  // namespace fusedmerge
