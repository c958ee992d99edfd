// M2 and M3: tensor cores beside a copy, their peak, and their arithmetic.
//
//   | kernel               | does                                          | bytes or FLOP                                       |
//   | multiply_copy        | target = source + coefficient * (B A), K deep | 4 rows cols; 2 rows cols K FLOP; B comes from L2    |
//   | mma_peak             | registers only                                | 2 x 64 x 32 x 16 FLOP a warp and iteration          |
//   | wgmma_peak           | operands in shared memory                     | 2 x 64 x 256 x 16 FLOP a warpgroup and iteration    |
//   | products_bf16, _fp16 | d = c + 16 products, by mma and by wgmma      | 512 sums a block                                    |
//
// multiply_copy is the switch kernel's main loop alone (fusedmerge/kernel/switch_mma.cuh): no selection, no ragged edges, A's strip any
// registers. A unit is 256 columns by unit_rows rows, a step 64 rows; a warp owns 64 x 32; B's rows stream through five stages by cp.async,
// 64 x 128 of them for each 128 ranks. Grid: persistent, 256 threads, one block per SM.
#include "ptx.cuh"

namespace micro {

constexpr int kStagePitch = 2 * kChunkDepth + 16;  // bytes; eight rows of an ldmatrix fall on all banks
constexpr int kStageBytes = kStepRows * kStagePitch;
constexpr int kStages = 5;
constexpr int kChunkSlices = kChunkDepth / kRankStep;

struct MultiplyCopy {
    const Bf16* source;     // [rows, cols]
    Bf16* target;           // [rows, cols]
    const Bf16* b;          // [b_rows, 128]: a power of two of rows
    const unsigned* strip;  // [256 threads, 64]: A's fragments
    int rows;               // a multiple of unit_rows
    int cols;               // a multiple of 256
    int unit_rows;          // a multiple of 64
    int b_rows;
    int num_slices;  // K / 16
    float coefficient;
};

MICRO_KERNEL(kThreads) multiply_copy(const MultiplyCopy p) {
    unsigned char* const ring = shared_memory();
    const int thread = threadIdx.x;
    const int lane = thread % 32;
    unsigned strip[kChunkSlices][4][2];
#pragma unroll
    for (int i = 0; i < 8 * kChunkSlices; ++i) strip[i / 8][i / 2 % 4][i % 2] = p.strip[thread * 8 * kChunkSlices + i];
    const unsigned long long policy = evict_first_policy();
    const int num_strips = p.cols / kStripCols;
    const int num_units = num_strips * (p.rows / p.unit_rows);
    const int num_chunks = (p.num_slices + kChunkSlices - 1) / kChunkSlices;
    const int row_step = 8 * p.cols;  // elements between a lane's octets
    int b_row = blockIdx.x * 2048;
    int stage = 0;
    auto fetch = [&](int to_stage) {  // 64 rows of B; a group is committed even where there is none
        if (thread % 16 / 2 < p.num_slices) {
#pragma unroll
            for (int i = 0; i < kStepRows; i += 16) {
                const int row = i + thread / 16;
                copy_async_16(ring + to_stage * kStageBytes + row * kStagePitch + thread % 16 * 16,
                              p.b + static_cast<long long>((b_row + row) & (p.b_rows - 1)) * kChunkDepth + thread % 16 * 8, 16);
            }
        }
        copy_async_commit();
        b_row += kStepRows;
    };
    for (int s = 0; s < kStages - 1; ++s) fetch(s);
#pragma unroll 1
    for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
        const int row = unit / num_strips * p.unit_rows + lane / 4;
        const int col = unit % num_strips * kStripCols + thread / 32 * 32 + lane % 4 * 8;
        const Bf16* from = p.source + static_cast<long long>(row) * p.cols + col;
        Bf16* to = p.target + static_cast<long long>(row) * p.cols + col;
        Octet<Bf16> source[kStepRows / 8];
#pragma unroll
        for (int i = 0; i < kStepRows / 8; ++i) load_vector(source[i], from + static_cast<long long>(i) * row_step, policy);
#pragma unroll 1
        for (int step = 0; step < p.unit_rows; step += kStepRows) {
            from += static_cast<long long>(kStepRows / 8) * row_step;
            float acc[4][4][4] = {};
#pragma unroll 1
            for (int chunk = 0; chunk < num_chunks; ++chunk) {
                copy_async_wait<kStages - 2>();
                __syncthreads();  // this chunk's rows are visible, and the stage read before them is free
                fetch(stage == 0 ? kStages - 1 : stage - 1);
                const int count = p.num_slices - chunk * kChunkSlices;
                const unsigned char* rows = ring + stage * kStageBytes + lane % 16 * kStagePitch + lane / 16 * 16;
#pragma unroll
                for (int s = 0; s < kChunkSlices; ++s) {
                    if (s >= count) break;
                    unsigned fragments[4][4];
#pragma unroll
                    for (int m = 0; m < 4; ++m) load_matrices(fragments[m], rows + m * 16 * kStagePitch + s * 2 * kRankStep);
#pragma unroll
                    for (int i = 0; i < 16; ++i) multiply_accumulate(acc[i / 4][i % 4], fragments[i / 4], strip[s][i % 4], Bf16{});
                }
                stage = stage == kStages - 1 ? 0 : stage + 1;
            }
            const bool more = step + kStepRows < p.unit_rows;
#pragma unroll
            for (int i = 0; i < kStepRows / 8; ++i) {
                float values[8];
                widen_octet(values, source[i], 1.0f);
#pragma unroll
                for (int c = 0; c < 8; ++c) values[c] = fused_multiply_add(p.coefficient, acc[i / 2][c / 2][i % 2 * 2 + c % 2], values[c]);
                Octet<Bf16> octet;
                narrow_octet(octet, values);
                stream_store_16(to, octet.words, policy);
                to += row_step;
                if (more) load_vector(source[i], from + static_cast<long long>(i) * row_step, policy);
            }
        }
    }
    copy_async_wait<0>();
}

// 64 x 32 a warp, as in the switch; `words` are operands, so that power is that of real data.
MICRO_KERNEL(kThreads) mma_peak(const unsigned* words /* [256, 24] */, float* sums /* [blocks, 256] */, int iterations) {
    unsigned a[4][4], b[4][2];
#pragma unroll
    for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = words[threadIdx.x * 24 + i];
#pragma unroll
    for (int i = 0; i < 8; ++i) b[i / 2][i % 2] = words[threadIdx.x * 24 + 16 + i];
    float acc[4][4][4] = {};
#pragma unroll 1
    for (int n = 0; n < iterations; n += 4) {
#pragma unroll
        for (int i = 0; i < 64; ++i) multiply_accumulate(acc[i / 4 % 4][i % 4], a[i / 4 % 4], b[(i + i / 16) % 4], Bf16{});
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 64; ++i) sum += acc[i / 16][i / 4 % 4][i % 4];
    sums[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// Two warpgroups; each multiplies four slices [64, 16] by [16, 256], over and over. Core matrices lie in the order (K, rows).
MICRO_KERNEL(kThreads) wgmma_peak(const unsigned* words /* [10240] */, float* sums /* [blocks, 256] */, int iterations) {
#ifdef MICRO_WGMMA
    constexpr int kA = 64 * 16 * 2, kB = 256 * 16 * 2;  // bytes of a slice
    unsigned* const shared = reinterpret_cast<unsigned*>(shared_memory());
    for (int i = threadIdx.x; i < 4 * (kA + kB) / 4; i += kThreads) shared[i] = words[i];
    wgmma_operands_fence();
    __syncthreads();
    const unsigned char* const a = shared_memory();
    const unsigned char* const b = a + 4 * kA;
    float acc[128] = {};
#pragma unroll 1
    for (int n = 0; n < iterations; n += 16) {  // one warpgroup's last product hides behind the other's
        wgmma_hold(acc);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 16; ++s) {
            wgmma_n256(acc, wgmma_operand(a + s % 4 * kA, kA / 2, 128), wgmma_operand(b + s % 4 * kB, kB / 2, 128));
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(acc);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 128; ++i) sum += acc[i];
    sums[blockIdx.x * kThreads + threadIdx.x] = sum;
#endif
}

// One block of a warpgroup: d[64, 8] = c + a[64, 16] b[8, 16]^T, all matrices row by row.
template <class Factor>
__device__ __forceinline__ void run_products(const unsigned short* a, const unsigned short* b, const float* c, float* by_mma,
                                             float* by_wgmma) {
    const long long tile = blockIdx.x;
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x / 32 * 16 + lane / 4;
    const int pair = lane % 4 * 2;
    a += tile * 64 * 16;
    b += tile * 8 * 16;
    c += tile * 64 * 8;
    auto word = [](const unsigned short* from) { return *reinterpret_cast<const unsigned*>(from); };
    const unsigned fa[4] = {word(a + row * 16 + pair), word(a + (row + 8) * 16 + pair), word(a + row * 16 + pair + 8),
                            word(a + (row + 8) * 16 + pair + 8)};
    const unsigned fb[2] = {word(b + lane / 4 * 16 + pair), word(b + lane / 4 * 16 + pair + 8)};
    float start[4];
    for (int i = 0; i < 4; ++i) start[i] = c[(row + i / 2 * 8) * 8 + pair + i % 2];
    auto store = [&](float* to, const float (&values)[4]) {
        for (int i = 0; i < 4; ++i) to[tile * 64 * 8 + (row + i / 2 * 8) * 8 + pair + i % 2] = values[i];
    };
    float acc[4] = {start[0], start[1], start[2], start[3]};
    multiply_accumulate(acc, fa, fb, Factor{});
    store(by_mma, acc);
#ifdef MICRO_WGMMA
    __shared__ __align__(128) unsigned short tiles[(64 + 8) * 16];  // core matrices: K half, then rows in eights
    for (int i = threadIdx.x; i < 64 * 16; i += 128) tiles[i % 16 / 8 * 512 + i / 16 * 8 + i % 8] = a[i];
    if (threadIdx.x < 8 * 16) {
        const int i = threadIdx.x;
        tiles[1024 + i % 16 / 8 * 64 + i / 16 * 8 + i % 8] = b[i];
    }
    wgmma_operands_fence();
    __syncthreads();
    float sums[4] = {start[0], start[1], start[2], start[3]};
    wgmma_hold(sums);
    wgmma_fence();
    wgmma_n8(sums, wgmma_operand(tiles, 1024, 128), wgmma_operand(tiles + 1024, 128, 128), Factor{});
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(sums);
    store(by_wgmma, sums);
#endif
}

MICRO_KERNEL(128) products_bf16(const unsigned short* a, const unsigned short* b, const float* c, float* by_mma, float* by_wgmma) {
    run_products<Bf16>(a, b, c, by_mma, by_wgmma);
}
MICRO_KERNEL(128) products_fp16(const unsigned short* a, const unsigned short* b, const float* c, float* by_mma, float* by_wgmma) {
    run_products<Fp16>(a, b, c, by_mma, by_wgmma);
}

}  // namespace micro
