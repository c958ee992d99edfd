// M4 and M5: y = W x (+ B z) for one token, as plain loads and as a ring of bulk copies; shrink; an empty kernel.
//
//   | kernel     | does            | bytes: the weights'                                   |
//   | gemv_plain | y = W x + B z   | 2 rows cols + 2 rows rank num_experts                 |
//   | gemv_bulk  | the same bits   | the same                                              |
//   | shrink     | z = A x         | 2 rows cols; rows = num_experts rank                  |
//   | nothing    |                 | 0                                                     |
//
// A tile is 16 rows: mma's M; the token is one of its eight columns (the others are zeros, and cost nothing that is scarce). K is permuted
// so that a lane's 16 bytes of a row feed two mma: in a chunk of 32 columns lane l holds columns 8 (l % 4) .. + 7 of rows l / 4 and
// l / 4 + 8. Warp w takes chunks w, w + 8, ...; the warps' sums are added in warp order, then the sum over the experts' ranks.
//
//   gemv_plain  grid: rows / 16 blocks of 256 threads; 16 loads of 16 bytes in flight a lane
//   gemv_bulk   grid: persistent, one block of 288 threads per SM; 11 stages of 16 rows x 512 columns, 8 consumer warps, one producer
//   shrink      grid: a block of 256 threads for each row
//
// With `programmatic` launches W is fetched before griddepcontrol.wait; x, z and all stores come after it.
#include "ptx.cuh"

namespace micro {

constexpr int kTileRows = 16;
constexpr int kWarps = 8;
constexpr int kChunkCols = 32;

struct Gemv {
    const Bf16* w;    // [rows, cols]
    const Bf16* x;    // [cols]
    Bf16* y;          // [rows]
    const Bf16* b;    // [num_experts, rows, rank]; null: no adapters
    const float* z;   // [num_experts, rank]
    int rows;         // a multiple of 16
    int cols;         // a multiple of 256
    int rank;         // a multiple of 8
    int num_experts;  // num_experts x rank <= 128
};

struct Sums {
    float partial[2][kWarps][kTileRows];
};

__device__ __forceinline__ void bf16_pair(float& low, float& high, unsigned word) { widen_pair(low, high, word, Bf16{}); }

// Two mma on a chunk; only column 0 of x's operand is not zero.
__device__ __forceinline__ void multiply_chunk(float (&acc)[4], const unsigned (&top)[4], const unsigned (&bottom)[4],
                                               const unsigned (&x)[4]) {
    const unsigned a0[4] = {top[0], bottom[0], top[1], bottom[1]};
    const unsigned a1[4] = {top[2], bottom[2], top[3], bottom[3]};
    const unsigned b0[2] = {x[0], x[1]};
    const unsigned b1[2] = {x[2], x[3]};
    multiply_accumulate(acc, a0, b0, Bf16{});
    multiply_accumulate(acc, a1, b1, Bf16{});
}

// The lane's eight columns of x in a chunk: of the token in lanes 0-3, zeros in the others.
__device__ __forceinline__ void read_x(unsigned (&words)[4], const Bf16* x, int chunk, int lane) {
    const Words4 piece = *reinterpret_cast<const Words4*>(x + chunk * kChunkCols + lane % 4 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = lane < 4 ? piece.words[i] : 0;
}

__device__ __forceinline__ void keep_partial(Sums& sums, int which, const float (&acc)[4], int warp, int lane) {
    if (lane % 4 != 0) return;
    sums.partial[which][warp][lane / 4] = acc[0];
    sums.partial[which][warp][lane / 4 + 8] = acc[2];
}

// 16 lanes a row. A lane's eight ranks of B are fetched long before z is there.
struct Expand {
    unsigned words[4];
    int place;  // in z; -1: nothing for this lane

    __device__ __forceinline__ void fetch(const Gemv& p, int first_row) {
        const int pieces = p.rank / 8;
        const int piece = threadIdx.x % 16;
        place = p.b != nullptr && piece < p.num_experts * pieces ? piece * 8 : -1;
        if (place < 0) return;
        const long long row = static_cast<long long>(piece / pieces) * p.rows + first_row + threadIdx.x / 16;
        fetch_16(words, p.b + row * p.rank + piece % pieces * 8);
    }

    __device__ __forceinline__ float apply(const float* z) const {
        float sum = 0.0f;
        if (place >= 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float low, high;
                bf16_pair(low, high, words[i]);
                sum = fused_multiply_add(low, z[place + 2 * i], sum);
                sum = fused_multiply_add(high, z[place + 2 * i + 1], sum);
            }
        }
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) sum = add(sum, __shfl_xor_sync(0xffffffffu, sum, offset));
        return sum;
    }
};

// The tile's 16 results, by 256 threads.
__device__ __forceinline__ void finish_rows(const Gemv& p, const Sums& sums, int which, int first_row, const Expand& expand) {
    const int row = threadIdx.x / 16;
    float total = p.b != nullptr ? expand.apply(p.z) : 0.0f;
    if (threadIdx.x % 16 != 0) return;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum = add(sum, sums.partial[which][w][row]);
    p.y[first_row + row].bits = static_cast<unsigned short>(narrow_pair(add(sum, total), 0.0f, Bf16{}));
}

// x into shared memory, by 256 threads: one trip to L2 instead of one for each chunk.
__device__ __forceinline__ void stage_x(Bf16* to, const Gemv& p) {
    for (int i = threadIdx.x; i < p.cols / 8; i += kThreads) reinterpret_cast<Words4*>(to)[i] = reinterpret_cast<const Words4*>(p.x)[i];
}

// ---- plain loads ----------------------------------------------------------------------------------------------------

MICRO_KERNEL(kThreads) gemv_plain(const Gemv p) {
    constexpr int kDepth = 8;  // chunks in flight, two loads each
    __shared__ Sums sums;
    Bf16* const x_shared = reinterpret_cast<Bf16*>(shared_memory());  // [cols]
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int first_row = blockIdx.x * kTileRows;
    const int num_chunks = p.cols / kChunkCols;
    const Bf16* const top_row = p.w + static_cast<long long>(first_row + lane / 4) * p.cols + lane % 4 * 8;
    const Bf16* const bottom_row = top_row + 8LL * p.cols;
    const unsigned long long policy = evict_first_policy();
    unsigned top[kDepth][4], bottom[kDepth][4];
    auto load = [&](int slot, int chunk) {
        if (chunk >= num_chunks) return;
        stream_load_16(top[slot], top_row + chunk * kChunkCols, policy);
        stream_load_16(bottom[slot], bottom_row + chunk * kChunkCols, policy);
    };
    allow_next_launch();
#pragma unroll
    for (int i = 0; i < kDepth; ++i) load(i, warp + i * kWarps);
    Expand expand;
    expand.fetch(p, first_row);
    wait_previous_launch();
    stage_x(x_shared, p);
    __syncthreads();
    float acc[4] = {};
#pragma unroll 1
    for (int chunk = warp; chunk < num_chunks; chunk += kDepth * kWarps) {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int here = chunk + i * kWarps;
            if (here < num_chunks) {
                unsigned x[4];
                read_x(x, x_shared, here, lane);
                multiply_chunk(acc, top[i], bottom[i], x);
            }
            load(i, here + kDepth * kWarps);
        }
    }
    keep_partial(sums, 0, acc, warp, lane);
    __syncthreads();
    finish_rows(p, sums, 0, first_row, expand);
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

constexpr int kBulkThreads = (kWarps + 1) * 32;

#ifdef MICRO_SM_90
constexpr int kStageCols = 512;
constexpr int kRowPitch = 2 * kStageCols + 64;  // bytes; two rows' 64 bytes fall on different halves of the banks
constexpr int kBulkStages = 11;

struct BulkMemory {
    unsigned long long full[kBulkStages];
    unsigned long long empty[kBulkStages];
    Sums sums;
    alignas(128) unsigned char stages[kBulkStages][kTileRows * kRowPitch];
    Bf16 x[];  // [cols]
};

static_assert(sizeof(BulkMemory) == 192768, "m4_gemv.py states another size");

// Where a walk through the block's tiles and their stages is.
struct Place {
    int tile, col, stage, parity;
    __device__ __forceinline__ void next(int cols) {
        col += kStageCols;
        if (col >= cols) {
            col = 0;
            tile += gridDim.x;
        }
        if (++stage == kBulkStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ void produce(BulkMemory& memory, const Gemv& p, int num_tiles, int lane) {
    for (Place at{static_cast<int>(blockIdx.x), 0, 0, 0}; at.tile < num_tiles; at.next(p.cols)) {
        const int num_bytes = 2 * min(kStageCols, p.cols - at.col);
        barrier_wait(&memory.empty[at.stage], at.parity ^ 1);  // true at once in the first round
        if (lane == 0) barrier_expect(&memory.full[at.stage], kTileRows * num_bytes);
        __syncwarp();
        if (lane < kTileRows) {
            bulk_load(memory.stages[at.stage] + lane * kRowPitch,
                      p.w + static_cast<long long>(at.tile * kTileRows + lane) * p.cols + at.col, num_bytes, &memory.full[at.stage]);
        }
    }
}

__device__ __forceinline__ void consume(BulkMemory& memory, const Gemv& p, int num_tiles, int warp, int lane) {
    Expand expand;
    if (blockIdx.x < num_tiles) expand.fetch(p, blockIdx.x * kTileRows);
    wait_previous_launch();
    stage_x(memory.x, p);
    named_barrier_256();
    int which = 0;
    float acc[4] = {};
    for (Place at{static_cast<int>(blockIdx.x), 0, 0, 0}; at.tile < num_tiles; at.next(p.cols)) {
        barrier_wait(&memory.full[at.stage], at.parity);
        const int num_chunks = min(kStageCols, p.cols - at.col) / kChunkCols;
        const unsigned char* const rows = memory.stages[at.stage] + lane / 4 * kRowPitch + lane % 4 * 16;
        for (int chunk = warp; chunk < num_chunks; chunk += kWarps) {
            const Words4 top = *reinterpret_cast<const Words4*>(rows + chunk * 2 * kChunkCols);
            const Words4 bottom = *reinterpret_cast<const Words4*>(rows + 8 * kRowPitch + chunk * 2 * kChunkCols);
            unsigned x[4];
            read_x(x, memory.x + at.col, chunk, lane);
            multiply_chunk(acc, top.words, bottom.words, x);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&memory.empty[at.stage]);
        if (at.col + kStageCols < p.cols) continue;
        keep_partial(memory.sums, which, acc, warp, lane);
        named_barrier_256();  // the other copy of the sums has been read by now: its readers came here too
        finish_rows(p, memory.sums, which, at.tile * kTileRows, expand);
        if (at.tile + gridDim.x < num_tiles) expand.fetch(p, (at.tile + gridDim.x) * kTileRows);
        which ^= 1;
        for (float& value : acc) value = 0.0f;
    }
}
#endif

MICRO_KERNEL(kBulkThreads) gemv_bulk(const Gemv p) {
#ifdef MICRO_SM_90
    BulkMemory& memory = *reinterpret_cast<BulkMemory*>(shared_memory());
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kBulkStages; ++s) {
            barrier_init(&memory.full[s], 1);
            barrier_init(&memory.empty[s], kWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    allow_next_launch();
    const int num_tiles = p.rows / kTileRows;
    if (warp == kWarps) {
        produce(memory, p, num_tiles, lane);
        wait_previous_launch();
    } else {
        consume(memory, p, num_tiles, warp, lane);
    }
#endif
}

// ---- what comes before a gemv ---------------------------------------------------------------------------------------

struct Shrink {
    const Bf16* a;  // [rows, cols]: the chosen experts' A, one above the other
    const Bf16* x;  // [cols]
    float* z;       // [rows]
    int cols;       // a multiple of 8
};

MICRO_KERNEL(kThreads) shrink(const Shrink p) {
    constexpr int kDepth = 6;  // 6 x 2048 columns
    __shared__ float sums[kWarps];
    const Bf16* const row = p.a + static_cast<long long>(blockIdx.x) * p.cols;
    unsigned words[kDepth][4];
    allow_next_launch();
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
        const int col = (i * kThreads + threadIdx.x) * 8;
        if (col < p.cols) fetch_16(words[i], row + col);
    }
    wait_previous_launch();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
        const int col = (i * kThreads + threadIdx.x) * 8;
        if (col >= p.cols) continue;
        unsigned x[4];
        fetch_16(x, p.x + col);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float low, high, x_low, x_high;
            bf16_pair(low, high, words[i][j]);
            bf16_pair(x_low, x_high, x[j]);
            sum = fused_multiply_add(low, x_low, sum);
            sum = fused_multiply_add(high, x_high, sum);
        }
    }
    for (int offset = 16; offset > 0; offset /= 2) sum = add(sum, __shfl_xor_sync(0xffffffffu, sum, offset));
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float total = 0.0f;
    for (float value : sums) total = add(total, value);
    p.z[blockIdx.x] = total;
}

MICRO_KERNEL(32) nothing() {
    allow_next_launch();
    wait_previous_launch();
}

}  // namespace micro
