// PTX that the micro-benchmarks try and the kernels do not use (yet): bulk copies with mbarrier, wgmma, the programmatic edge.
// Instructions that the kernels use come from fusedmerge/kernel/ptx.cuh.
#pragma once

#include "fusedmerge/kernel/tile.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MICRO_SM_90 1  // bulk copies, mbarrier, griddepcontrol
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MICRO_WGMMA 1  // compute capability 9.0 alone
#endif
#define MICRO_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

namespace micro {

using namespace fusedmerge;

__device__ __forceinline__ unsigned shared_address(const void* pointer) { return static_cast<unsigned>(__cvta_generic_to_shared(pointer)); }

// clang-format off: an instruction, its outputs, its inputs, each on a line

// 16 bytes, without hints. Volatile: none is dropped, and loads stay in front of the stores that follow them.
__device__ __forceinline__ void fetch_16(unsigned (&words)[4], const void* global) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(global)
                 : "memory");
}

__device__ __forceinline__ void store_16(void* global, const unsigned (&words)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

__device__ __forceinline__ unsigned long long evict_normal_policy() {
    unsigned long long policy = 0;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// ---- the programmatic edge: nothing below sm_90, where launches do not overlap --------------------------------------

// The next launch may begin: its blocks take whatever room there is.
__device__ __forceinline__ void allow_next_launch() {
#ifdef MICRO_SM_90
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Everything that the launch before this one wrote is visible from here on. Every block of every launch in a chain calls this.
__device__ __forceinline__ void wait_previous_launch() {
#ifdef MICRO_SM_90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifdef MICRO_SM_90
// ---- mbarrier and bulk copies ---------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(unsigned long long* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// After the inits, before other threads or the copy engine use them.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned long long* barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned long long* barrier, int parity) {
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;}" ::"r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

// num_bytes: a multiple of 16, all addresses 16-byte aligned.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int num_bytes, unsigned long long* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
                 "l"(global), "r"(num_bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void bulk_store(void* global, const void* shared, int num_bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(num_bytes)
                 : "memory");
}

// All but the newest kPending stores of this thread have read their shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
#endif

#ifdef MICRO_WGMMA
// ---- wgmma: operands in shared memory, K-major, not swizzled --------------------------------------------------------

// Core matrices are 8 rows of 16 bytes, 128 bytes in one piece. `leading`: bytes from one to its neighbour along K; `stride`: along rows.
__device__ __forceinline__ unsigned long long wgmma_operand(const void* shared, int leading, int stride) {
    return static_cast<unsigned long long>((shared_address(shared) & 0x3ffff) >> 4) | static_cast<unsigned long long>(leading >> 4) << 16 |
           static_cast<unsigned long long>(stride >> 4) << 32;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No accumulator is read or moved across this: before the first wgmma, and after the wait.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&c)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// Makes shared memory that ordinary stores wrote visible to wgmma; each writing thread, before the block's barrier.
__device__ __forceinline__ void wgmma_operands_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// c[64, 8] += a[64, 16] b[16, 8]; lane l of warp w holds rows 16 w + l / 4 (+ 8), columns 2 (l % 4) (+ 1): mma's layout, four times.
__device__ __forceinline__ void wgmma_n8(float (&c)[4], unsigned long long a, unsigned long long b, Bf16) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_n8(float (&c)[4], unsigned long long a, unsigned long long b, Fp16) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "l"(a), "l"(b));
}

#define MICRO_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define MICRO_32(i) MICRO_4(i), MICRO_4(i + 4), MICRO_4(i + 8), MICRO_4(i + 12), MICRO_4(i + 16), MICRO_4(i + 20), MICRO_4(i + 24), MICRO_4(i + 28)

// c[64, 256] += a[64, 16] b[16, 256], bf16.
__device__ __forceinline__ void wgmma_n256(float (&c)[128], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
                 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
                 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"
                 "%122,%123,%124,%125,%126,%127}, %128, %129, 1, 1, 1, 0, 0;"
                 : MICRO_32(0), MICRO_32(32), MICRO_32(64), MICRO_32(96)
                 : "l"(a), "l"(b));
}
#endif

// A barrier of 256 threads of a larger block: the consumer warps, without the producer.
__device__ __forceinline__ void named_barrier_256() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// clang-format on

}  // namespace micro
