// Grouping: sort (token, expert) pairs by expert, and tokens into tiles, on the device; once for all layers that share ids and gates.
//
//   | ids, gates  | [T, k]               | read twice (histogram, scatter); 8 bytes a slot         |
//   | counts      | [chunks, indices]    | 8 bytes each: written, scanned, read                    |
//   | by position | [T k]                | token, gate ... of each pair, ascending (expert, token) |
//   | by tile     | [tiles, tile_rows k] | the pairs of tile_rows tokens, ascending (expert, row)  |
//
// Four launches of kThreads threads, none of which waits for the host; no atomics: a chunk's indices are counted by one warp, in token
// order.
//
//   group_histogram  a block for each chunk of kGroupTokens tokens: pairs of each expert, tokens of each key
//   group_scan       one block: exclusive sums over chunks, then over experts and keys
//   group_scatter    a block for each chunk: every pair and token to its place
//   group_tiles      a block for each tile: its pairs by expert (rank by counting)
//
// All but the first are launched programmatically: a scatter has its chunk's places before it waits for the starts. One chunk of few pairs
// takes one launch of one block, group_small: the same steps, between barriers.
//
// Shared memory of a block: 8 kGroupTokens (k + 1) + 8 indices bytes (histogram, scatter), 16 kThreads (scan), 4 tile_rows k (tiles);
// small: as the first, and at least 16 kThreads in place of 8 indices, for up to 4 kThreads slots.
//
// A pair's gate is the sum of the token's gates for that expert, in slot order, at the expert's first slot; a sum of 0 is no pair. Tokens
// are ordered by their two lowest experts' buckets, so that a tile meets few experts; tokens without one are in no tile.
#pragma once

#include "ptx.cuh"
#include "sgmv_params.cuh"

namespace fusedmerge {

constexpr int kNoExpert = 0x7fffffff;

// What a block keeps of its chunk, in shared memory: slots and places [kGroupTokens, k], token_keys and token_places [kGroupTokens], counts
// [indices].
struct Chunk {
    const GroupParams& params;
    const int num_slots;
    const int num_tokens;
    const int token;    // this thread's
    int* slots;         // expert; -1 = none
    int* places;        // of the pair, among the expert's in this chunk
    int* token_keys;    // -1 = no expert
    int* token_places;  // among the key's in this chunk
    GroupCount* counts;

    FM_DEVICE explicit Chunk(const GroupParams& p)
        : params(p),
          num_slots(p.groups.num_slots),
          num_tokens(p.num_tokens - block_index() * kGroupTokens < kGroupTokens ? p.num_tokens - block_index() * kGroupTokens
                                                                                : kGroupTokens),
          token(block_index() * kGroupTokens + thread_index()),
          slots(reinterpret_cast<int*>(shared_memory())),
          places(slots + kGroupTokens * num_slots),
          token_keys(places + kGroupTokens * num_slots),
          token_places(token_keys + kGroupTokens),
          counts(reinterpret_cast<GroupCount*>(token_places + kGroupTokens)) {}

    // 0: slot j of this thread's token is no pair.
    FM_DEVICE float gate(int j) const {
        const int* ids = params.ids + static_cast<long long>(token) * num_slots;
        const float* gates = params.gates + static_cast<long long>(token) * num_slots;
        const int id = ids[j];
        if (id < 0 || id >= params.num_adapters) return 0.0f;
        for (int i = 0; i < j; ++i) {
            if (ids[i] == id) return 0.0f;
        }
        float sum = 0.0f;
        for (int i = j; i < num_slots; ++i) {
            if (ids[i] == id) sum = add(sum, gates[i]);
        }
        return sum;
    }

    FM_DEVICE int bucket(int expert, int num_buckets) const {
        return static_cast<int>(static_cast<long long>(expert) * num_buckets / params.num_adapters);
    }

    FM_DEVICE void load_slots() {
        int lowest = kNoExpert;
        int second = kNoExpert;
        for (int j = 0; j < num_slots; ++j) {
            const bool used = token < params.num_tokens && gate(j) != 0.0f;
            const int id = used ? params.ids[static_cast<long long>(token) * num_slots + j] : -1;
            slots[thread_index() * num_slots + j] = id;
            if (!used) continue;
            if (id < second) second = id;
            if (id < lowest) {
                second = lowest;
                lowest = id;
            }
        }
        if (second == kNoExpert) second = lowest;
        const int key = lowest == kNoExpert ? -1 : bucket(lowest, params.lowest_buckets) * params.second_buckets;
        token_keys[thread_index()] = key < 0 ? key : key + bucket(second, params.second_buckets);
    }

    // One warp counts pairs, another one tokens.
    FM_DEVICE void count() {
        load_slots();
        for (int e = thread_index(); e < params.num_indices; e += kThreads) counts[e] = {0, 0};
        block_barrier();  // every thread's slots are there
        if (thread_index() / kWarpLanes == 0) {
            walk(slots, places, num_tokens * num_slots, &counts->pairs);
        } else if (thread_index() / kWarpLanes == 1) {
            walk(token_keys, token_places, num_tokens, &counts->tokens);
        }
        block_barrier();  // every pair and token has its place, every index its count
    }

    // By one warp, in order, 32 at once: a place is where the count of its index stood, and then how many lower lanes have the same index.
    // counts_of: pairs or tokens of the first GroupCount, which is two ints.
    FM_DEVICE void walk(const int* indices, int* places_of, int num, int* counts_of) {
        const int lane = thread_index() % kWarpLanes;
        FM_NO_UNROLL
        for (int first = 0; first < num; first += kWarpLanes) {
            const int index = first + lane < num ? indices[first + lane] : -1;
            const int before = index < 0 ? 0 : counts_of[2 * index];
            const unsigned equal = equal_lanes(static_cast<unsigned>(index));
            const int lower = count_bits(equal & ((1u << lane) - 1));
            if (index >= 0) places_of[first + lane] = before + lower;
            if (index >= 0 && lower == 0) counts_of[2 * index] = before + count_bits(equal);
            warp_barrier();  // the counts are there for the next 32
        }
    }

    FM_DEVICE void store_counts() {
        for (int e = thread_index(); e < params.num_indices; e += kThreads) chunk_counts()[e] = counts[e];
    }

    // Where the index's first pair and token of this chunk go, once all are scanned.
    FM_DEVICE GroupCount start_of(int e) const {
        const GroupStart start = params.starts[e];
        const GroupCount before = chunk_counts()[e];
        return {start.pair + before.pairs, start.token + before.tokens};
    }

    FM_DEVICE void scatter() {
        if (thread_index() >= num_tokens) return;
        const Groups& groups = params.groups;
        for (int j = 0; j < num_slots; ++j) {
            const int slot = slots[thread_index() * num_slots + j];
            const int position = slot < 0 ? -1 : start_of(slot).pairs + places[thread_index() * num_slots + j];
            params.positions[static_cast<long long>(token) * num_slots + j] = position;
            if (slot < 0) continue;
            Pair& pair = groups.pairs[position];
            pair.token = token;
            pair.gate = gate(j);
            pair.expert = slot;
            const GroupStart start = params.starts[slot];
            const int local = position - start.pair;
            const int left = start.count - local;
            if (local % kShrinkPairs == 0) {
                groups.shrink_groups[start.group + local / kShrinkPairs] = {slot, position, left < kShrinkPairs ? left : kShrinkPairs, 0};
            }
        }
        const int key = token_keys[thread_index()];
        if (key >= 0) groups.tile_tokens[start_of(key).tokens + token_places[thread_index()]] = token;
    }

    FM_DEVICE GroupCount* chunk_counts() const { return params.counts + static_cast<long long>(block_index()) * params.num_indices; }
};

// counts[chunk][e] := pairs and tokens of index e in all chunks before; returns those of all chunks.
FM_DEVICE GroupCount scan_chunks(const GroupParams& params, int e) {
    const int num_chunks = (params.num_tokens + kGroupTokens - 1) / kGroupTokens;
    GroupCount sum = {0, 0};
    constexpr int kAhead = 8;  // loads in flight
    for (int first = 0; first < num_chunks; first += kAhead) {
        GroupCount ahead[kAhead];
        FM_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            if (first + i < num_chunks) ahead[i] = params.counts[static_cast<long long>(first + i) * params.num_indices + e];
        }
        FM_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            if (first + i >= num_chunks) break;
            params.counts[static_cast<long long>(first + i) * params.num_indices + e] = sum;
            sum.pairs += ahead[i].pairs;
            sum.tokens += ahead[i].tokens;
        }
    }
    return sum;
}

// sums: [kThreads] of each thread's index.
FM_DEVICE void scan(const GroupParams& params, GroupStart* sums) {
    GroupStart base = {0, 0, 0, 0};
    for (int first = 0; first < params.num_indices; first += kThreads) {
        const int e = first + thread_index();
        const bool exists = e < params.num_indices;
        const GroupCount count = exists ? scan_chunks(params, e) : GroupCount{0, 0};
        block_barrier();  // what lay there, the last strip's sums too, has been read
        sums[thread_index()] = {count.pairs, count.tokens, (count.pairs + kShrinkPairs - 1) / kShrinkPairs, 0};
        block_barrier();  // this strip's are there
        GroupStart start = base;
        for (int i = 0; i < kThreads && first + i < params.num_indices; ++i) {
            const GroupStart sum = sums[i];
            base = {base.pair + sum.pair, base.token + sum.token, base.group + sum.group, 0};
            if (i < thread_index()) start = base;
        }
        if (exists) params.starts[e] = {start.pair, start.token, start.group, count.pairs};
    }
    if (thread_index() == 0) *params.groups.totals = {base.pair, base.token, base.group, 0};
}

// The pairs of some tiles, each tile's by expert. experts: [num_tiles tile_rows, k].
FM_DEVICE void order_tiles(const GroupParams& params, int first_tile, int num_tiles, int* experts) {
    const Groups& groups = params.groups;
    const int num_slots = groups.num_slots;
    const int tile_slots = groups.tile_rows * num_slots;
    const int first = first_tile * groups.tile_rows;
    const int left = groups.totals->tokens - first;
    const int count = left * num_slots < num_tiles * tile_slots ? left * num_slots : num_tiles * tile_slots;
    for (int i = thread_index(); i < count; i += kThreads) {
        const long long slot = static_cast<long long>(groups.tile_tokens[first + i / num_slots]) * num_slots + i % num_slots;
        experts[i] = params.positions[slot] < 0 ? kNoExpert : params.ids[slot];
    }
    block_barrier();  // every slot's expert is there
    for (int i = thread_index(); i < count; i += kThreads) {
        const int expert = experts[i];
        if (expert == kNoExpert) continue;
        const int begin = i / tile_slots * tile_slots;
        const int end = begin + tile_slots < count ? begin + tile_slots : count;
        const int row = i / num_slots;
        bool is_first = true;
        for (int j = 0; j < num_slots; ++j) is_first &= experts[row * num_slots + j] >= expert;
        int place = first * num_slots + begin;
        int run = 0;
        FM_UNROLL_4
        for (int other = begin; other < end; ++other) {
            const bool same = experts[other] == expert;
            place += experts[other] < expert || (same && other < i);
            run += same && other >= i;
        }
        const int tile_row = row % groups.tile_rows;
        groups.tile_pairs[place] = {expert, run, is_first ? ~tile_row : tile_row, 0};
        const long long slot = static_cast<long long>(groups.tile_tokens[first + row]) * num_slots + i % num_slots;
        groups.pairs[params.positions[slot]].place = place;
    }
    for (int tile = thread_index(); tile < num_tiles; tile += kThreads) {
        int pairs = 0;
        for (int i = tile * tile_slots; i < (tile + 1) * tile_slots && i < count; ++i) pairs += experts[i] != kNoExpert;
        groups.tile_counts[first_tile + tile] = pairs;
    }
}

FM_DEVICE void run_group_histogram(const GroupParams& params) {
    launch_dependents();
    Chunk chunk(params);
    chunk.count();
    chunk.store_counts();
}

FM_DEVICE void run_group_scan(const GroupParams& params) {
    launch_dependents();
    grid_wait();
    scan(params, reinterpret_cast<GroupStart*>(shared_memory()));
}

FM_DEVICE void run_group_scatter(const GroupParams& params) {
    launch_dependents();
    Chunk chunk(params);
    chunk.count();
    grid_wait();
    chunk.scatter();
}

FM_DEVICE void run_group_tiles(const GroupParams& params) {
    grid_wait();
    order_tiles(params, block_index(), 1, reinterpret_cast<int*>(shared_memory()));
}

// All of it, for one chunk. What the scan and the tiles need lies where the counts were.
FM_DEVICE void run_group_small(const GroupParams& params) {
    Chunk chunk(params);
    chunk.count();
    chunk.store_counts();
    scan(params, reinterpret_cast<GroupStart*>(chunk.counts));
    block_barrier();  // every index has its start
    chunk.scatter();
    block_barrier();  // every token has its place, every pair its position
    const int num_tiles = (params.num_tokens + params.groups.tile_rows - 1) / params.groups.tile_rows;
    order_tiles(params, 0, num_tiles, reinterpret_cast<int*>(chunk.counts));
}

}  // namespace fusedmerge
