// M0 and M1: copies and reads with a given number of bytes in flight.
//
//   | kernel                  | does                       | bytes moved | in flight per SM, at most                           |
//   | copy_plain_U            | to = from                  | 2 n         | blocks x 256 threads x U x 16: registers            |
//   | read_plain_U            | sums[thread] = sum of from | n           | the same                                            |
//   | copy_ring_A, read_ring_A| the same by cp.async       |             | blocks x A stages of 8 KB: shared memory            |
//   | copy_bulk, read_bulk    | the same by bulk copies    |             | blocks x `ahead` stages of 8 KB: shared memory      |
//   | tiled_copy_S            | to = from, in units        | 2 n + side  | blocks x 32 KB: registers, one step ahead           |
//   | tiled_copy_lanes        | the same                   |             | the same                                            |
//
// Grid: persistent, (blocks per SM) x SMs; dynamic shared memory keeps more from becoming resident. 256 threads. n is a multiple of 32 KB.
// A step of a tiled copy is 32 KB read and 32 KB written: `S` bytes of each of 32 KB / S rows, a warp on whole segments (S = 128: 4 rows);
// tiled_copy_lanes is the 512-byte segment as the switch kernel reads it, a warp on 64 bytes of each of 8 rows. Beside it a side stream
// brings `side_pieces` x 4 KB a step through L2 into shared memory by cp.async, as the switch brings B.
#include "ptx.cuh"

namespace micro {

constexpr int kPieceBytes = kThreads * 16;  // one 16-byte access of every thread
constexpr int kStageBytes = 2 * kPieceBytes;

__device__ __forceinline__ unsigned sum_words(const unsigned (&words)[4]) { return words[0] + words[1] + words[2] + words[3]; }

// ---- plain loads ----------------------------------------------------------------------------------------------------

template <int kUnroll, bool kStore>
__device__ __forceinline__ void run_plain(const char* from, char* to, long long num_bytes, unsigned* sums) {
    constexpr int kRun = kUnroll * kPieceBytes;
    const long long stride = static_cast<long long>(gridDim.x) * kRun;
    const long long first = static_cast<long long>(blockIdx.x) * kRun;
    unsigned words[kUnroll][4];
    unsigned sum = 0;
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
        if (first < num_bytes) fetch_16(words[j], from + first + threadIdx.x * 16 + j * kPieceBytes);
    }
#pragma unroll 1
    for (long long at = first; at < num_bytes; at += stride) {
        const long long mine = at + threadIdx.x * 16;
        const bool more = at + stride < num_bytes;
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) {  // a load is in flight from here to the same place of the next run
            if constexpr (kStore) {
                store_16(to + mine + j * kPieceBytes, words[j]);
            } else {
                sum += sum_words(words[j]);
            }
            if (more) fetch_16(words[j], from + mine + stride + j * kPieceBytes);
        }
    }
    if constexpr (!kStore) sums[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// ---- cp.async: each thread waits for its own pieces, so no barrier is needed ----------------------------------------

template <int kAhead, bool kStore>
__device__ __forceinline__ void run_async(const char* from, char* to, long long num_bytes, unsigned* sums) {
    constexpr int kRing = kAhead + 1;  // the stage that is filled is never the one being read
    char* const mine = reinterpret_cast<char*>(shared_memory()) + threadIdx.x * 16;
    const long long stride = static_cast<long long>(gridDim.x) * kStageBytes;
    long long load_at = static_cast<long long>(blockIdx.x) * kStageBytes;
    int load_stage = 0;
    auto load_next = [&]() {
        if (load_at < num_bytes) {
            for (int j = 0; j < 2; ++j) {
                const int offset = j * kPieceBytes;
                copy_async_16(mine + load_stage * kStageBytes + offset, from + load_at + threadIdx.x * 16 + offset, 16);
            }
        }
        copy_async_commit();
        load_at += stride;
        load_stage = load_stage == kRing - 1 ? 0 : load_stage + 1;
    };
    for (int i = 0; i < kAhead; ++i) load_next();
    unsigned sum = 0;
    int stage = 0;
    for (long long at = static_cast<long long>(blockIdx.x) * kStageBytes; at < num_bytes; at += stride) {
        copy_async_wait<kAhead - 1>();
        for (int j = 0; j < 2; ++j) {
            const Words4 piece = *reinterpret_cast<const Words4*>(mine + stage * kStageBytes + j * kPieceBytes);
            if constexpr (kStore) {
                store_16(to + at + threadIdx.x * 16 + j * kPieceBytes, piece.words);
            } else {
                sum += sum_words(piece.words);
            }
        }
        load_next();
        stage = stage == kRing - 1 ? 0 : stage + 1;
    }
    if constexpr (!kStore) sums[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// ---- bulk copies: one thread issues; a copy never touches a register ------------------------------------------------

[[maybe_unused]] constexpr int kBarrierBytes = 256;  // of 8 each: ahead <= 31

template <bool kStore>
__device__ __forceinline__ void run_bulk(const char* from, char* to, long long num_bytes, int ahead, unsigned* sums) {
#ifdef MICRO_SM_90
    auto* full = reinterpret_cast<unsigned long long*>(shared_memory());
    char* const ring = reinterpret_cast<char*>(shared_memory()) + kBarrierBytes;
    const int ring_size = ahead + 1;
    const bool issuer = threadIdx.x == 0;
    if (issuer) {
        for (int s = 0; s < ring_size; ++s) barrier_init(full + s, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (kStore && !issuer) return;
    const long long stride = static_cast<long long>(gridDim.x) * kStageBytes;
    long long load_at = static_cast<long long>(blockIdx.x) * kStageBytes;
    int load_stage = 0;
    auto load_next = [&]() {
        if (issuer && load_at < num_bytes) {
            barrier_expect(full + load_stage, kStageBytes);
            bulk_load(ring + load_stage * kStageBytes, from + load_at, kStageBytes, full + load_stage);
        }
        load_at += stride;
        load_stage = load_stage == ring_size - 1 ? 0 : load_stage + 1;
    };
    for (int i = 0; i < ahead; ++i) load_next();
    unsigned sum = 0;
    int stage = 0;
    int parity = 0;
    for (long long at = static_cast<long long>(blockIdx.x) * kStageBytes; at < num_bytes; at += stride) {
        barrier_wait(full + stage, parity);
        if constexpr (kStore) {
            bulk_store(to + at, ring + stage * kStageBytes, kStageBytes);
            bulk_wait_read<1>();  // the stage before this one, which load_next fills, has been read
            load_next();
        } else {
            load_next();  // into the stage before this one: all have passed the barrier since they read it
            for (int j = 0; j < 2; ++j) {
                sum += sum_words(reinterpret_cast<const Words4*>(ring + stage * kStageBytes + j * kPieceBytes)[threadIdx.x].words);
            }
            __syncthreads();
        }
        stage = stage == ring_size - 1 ? 0 : stage + 1;
        parity ^= stage == 0;
    }
    if constexpr (kStore) {
        bulk_wait_all();
    } else {
        sums[blockIdx.x * kThreads + threadIdx.x] = sum;
    }
#endif
}

#define MICRO_PLAIN(unroll)                                                                                                                \
    MICRO_KERNEL(kThreads) copy_plain_##unroll(const char* from, char* to, long long n) { run_plain<unroll, true>(from, to, n, nullptr); } \
    MICRO_KERNEL(kThreads) read_plain_##unroll(const char* from, unsigned* sums, long long n) {                                            \
        run_plain<unroll, false>(from, nullptr, n, sums);                                                                                  \
    }
MICRO_PLAIN(4)
MICRO_PLAIN(8)

#define MICRO_ASYNC(ahead)                                                                                                              \
    MICRO_KERNEL(kThreads) copy_ring_##ahead(const char* from, char* to, long long n) { run_async<ahead, true>(from, to, n, nullptr); } \
    MICRO_KERNEL(kThreads) read_ring_##ahead(const char* from, unsigned* sums, long long n) {                                           \
        run_async<ahead, false>(from, nullptr, n, sums);                                                                                \
    }
MICRO_ASYNC(2)
MICRO_ASYNC(4)
MICRO_ASYNC(8)
MICRO_ASYNC(16)

MICRO_KERNEL(kThreads) copy_bulk(const char* from, char* to, long long n, int ahead) { run_bulk<true>(from, to, n, ahead, nullptr); }
MICRO_KERNEL(kThreads) read_bulk(const char* from, unsigned* sums, long long n, int ahead) {
    run_bulk<false>(from, nullptr, n, ahead, sums);
}

// ---- tiled copies ---------------------------------------------------------------------------------------------------

struct TiledCopy {
    const char* source;  // [rows, row_bytes]
    char* target;        // [rows, row_bytes]
    const char* side;    // [side_bytes], a power of two
    long long side_bytes;
    int rows;         // a multiple of unit_rows
    int row_bytes;    // a multiple of the segment
    int unit_rows;    // a multiple of a step's rows
    int order;        // 0: strips first (the switch's); 1: row panels first; 2: strips first, each block its own run of units
    int side_pieces;  // a step; shared memory: 3 x side_pieces x 4 KB
    int evict_first;  // policy of from and to
};

constexpr int kSideStages = 3;
constexpr int kOctetsOfStep = 8;

template <int kSegment, bool kLanes>
__device__ __forceinline__ void run_tiled(const TiledCopy& p) {
    constexpr int kStepRowsHere = kOctetsOfStep * kPieceBytes / kSegment;
    constexpr int kPassRows = kPieceBytes / kSegment;  // rows that one access of every thread covers
    const int lane = threadIdx.x % 32;
    const int row = kLanes ? lane / 4 : threadIdx.x / (kSegment / 16);
    const int col = kLanes ? threadIdx.x / 32 * 64 + lane % 4 * 16 : threadIdx.x % (kSegment / 16) * 16;  // bytes
    const unsigned long long policy = p.evict_first ? evict_first_policy() : evict_normal_policy();
    const int num_strips = p.row_bytes / kSegment;
    const int num_panels = p.rows / p.unit_rows;
    const int num_units = num_strips * num_panels;
    const int run = (num_units + gridDim.x - 1) / gridDim.x;
    const long long octet_step = static_cast<long long>(kPassRows) * p.row_bytes;
    char* const side_to = reinterpret_cast<char*>(shared_memory()) + threadIdx.x * 16;
    long long side_at = blockIdx.x * 36864LL;  // blocks walk the side stream from places of their own
    int side_stage = 0;
    int unit = p.order == 2 ? blockIdx.x * run : blockIdx.x;
    const int end = p.order == 2 ? min(unit + run, num_units) : num_units;
    for (; unit < end; unit += p.order == 2 ? 1 : gridDim.x) {
        const int strip = p.order == 1 ? unit / num_panels : unit % num_strips;
        const int panel = p.order == 1 ? unit % num_panels : unit / num_strips;
        long long at = (static_cast<long long>(panel) * p.unit_rows + row) * p.row_bytes + static_cast<long long>(strip) * kSegment + col;
        unsigned words[kOctetsOfStep][4];
#pragma unroll
        for (int i = 0; i < kOctetsOfStep; ++i) stream_load_16(words[i], p.source + at + i * octet_step, policy);
#pragma unroll 1
        for (int step = 0; step < p.unit_rows; step += kStepRowsHere) {
            for (int i = 0; i < p.side_pieces; ++i) {
                copy_async_16(side_to + (side_stage * p.side_pieces + i) * kPieceBytes,
                              p.side + ((side_at & (p.side_bytes - 1)) + threadIdx.x * 16), 16);
                side_at += kPieceBytes;
            }
            copy_async_commit();
            copy_async_wait<kSideStages - 1>();
            side_stage = side_stage == kSideStages - 1 ? 0 : side_stage + 1;
            const bool more = step + kStepRowsHere < p.unit_rows;
#pragma unroll
            for (int i = 0; i < kOctetsOfStep; ++i) {
                stream_store_16(p.target + at + i * octet_step, words[i], policy);
                if (more) stream_load_16(words[i], p.source + at + (i + kOctetsOfStep) * octet_step, policy);
            }
            at += kOctetsOfStep * octet_step;
        }
    }
    copy_async_wait<0>();
}

MICRO_KERNEL(kThreads) tiled_copy_128(const TiledCopy params) { run_tiled<128, false>(params); }
MICRO_KERNEL(kThreads) tiled_copy_256(const TiledCopy params) { run_tiled<256, false>(params); }
MICRO_KERNEL(kThreads) tiled_copy_512(const TiledCopy params) { run_tiled<512, false>(params); }
MICRO_KERNEL(kThreads) tiled_copy_1024(const TiledCopy params) { run_tiled<1024, false>(params); }
MICRO_KERNEL(kThreads) tiled_copy_lanes(const TiledCopy params) { run_tiled<512, true>(params); }

}  // namespace micro
