// Grouping: sort (token, expert) pairs by expert, and tokens into tiles, on the device; once for all layers that share ids and gates.
//
//   | ids, gates  | [T, k]               | read twice (histogram, scatter); 8 bytes a slot         |
//   | counts      | [chunks, indices]    | 8 bytes each: written, scanned, read                    |
//   | by position | [T k]                | token, gate ... of each pair, ascending (expert, token) |
//   | by tile     | [tiles, tile_rows k] | the pairs of tile_rows tokens, ascending (expert, row)  |
//
// Four launches of kThreads threads, none of which waits for the host; no atomics: an index is counted by one thread, in token order.
//
//   group_histogram  a block for each chunk of kGroupTokens tokens: pairs of each expert, tokens of each key
//   group_scan       one block: exclusive sums over chunks, then over experts and keys
//   group_scatter    a block for each chunk: every pair and token to its place
//   group_tiles      a block for each tile: its pairs by expert (rank by counting)
//
// Shared memory of a block: 8 kGroupTokens (k + 1) + 8 indices bytes (histogram, scatter), 16 kThreads (scan), 4 tile_rows k (tiles).
//
// A pair's gate is the sum of the token's gates for that expert, in slot order, at the expert's first slot; a sum of 0 is no pair. Tokens
// are ordered by their two lowest experts' buckets, so that a tile meets few experts; tokens without one are in no tile.
#pragma once

#include "platform.cuh"
#include "sgmv_params.cuh"

namespace fusedmerge {

constexpr int kNoExpert = 0x7fffffff;

// What a block keeps of its chunk, in shared memory: slots and places [kGroupTokens, k], token_keys and token_places [kGroupTokens], counts
// [indices].
struct Chunk {
    const GroupParams& params;
    const int num_slots;
    const int token;    // this thread's
    int* slots;         // expert; -1 = none
    int* places;        // position of the pair; -1 = none
    int* token_keys;    // -1 = no expert
    int* token_places;  // in tile_tokens
    GroupCount* counts;

    FM_DEVICE explicit Chunk(const GroupParams& p)
        : params(p),
          num_slots(p.groups.num_slots),
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

    // This thread's indices are those that equal its own modulo kThreads. Counts their pairs and tokens in order; places are where the
    // counts stood before.
    FM_DEVICE void walk() {
        FM_UNROLL_4
        for (int i = 0; i < kGroupTokens * num_slots; ++i) {
            if (slots[i] >= 0 && slots[i] % kThreads == thread_index()) places[i] = counts[slots[i]].pairs++;
        }
        FM_UNROLL_4
        for (int i = 0; i < kGroupTokens; ++i) {
            if (token_keys[i] >= 0 && token_keys[i] % kThreads == thread_index()) token_places[i] = counts[token_keys[i]].tokens++;
        }
    }
};

FM_DEVICE void run_group_histogram(const GroupParams& params) {
    Chunk chunk(params);
    chunk.load_slots();
    for (int e = thread_index(); e < params.num_indices; e += kThreads) chunk.counts[e] = {0, 0};
    block_barrier();  // every thread's slots are there
    chunk.walk();
    GroupCount* counts = params.counts + static_cast<long long>(block_index()) * params.num_indices;
    for (int e = thread_index(); e < params.num_indices; e += kThreads) counts[e] = chunk.counts[e];
}

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

FM_DEVICE void run_group_scan(const GroupParams& params) {
    GroupStart* sums = reinterpret_cast<GroupStart*>(shared_memory());  // [kThreads] of each thread's index
    GroupStart base = {0, 0, 0, 0};
    for (int first = 0; first < params.num_indices; first += kThreads) {
        const int e = first + thread_index();
        const bool exists = e < params.num_indices;
        const GroupCount count = exists ? scan_chunks(params, e) : GroupCount{0, 0};
        block_barrier();  // the last strip's sums have been read
        sums[thread_index()] = {count.pairs, count.tokens, (count.pairs + kShrinkPairs - 1) / kShrinkPairs, 0};
        block_barrier();  // this strip's are there
        GroupStart start = base;
        for (int i = 0; i < kThreads; ++i) {
            const GroupStart sum = sums[i];
            base = {base.pair + sum.pair, base.token + sum.token, base.group + sum.group, 0};
            if (i < thread_index()) start = base;
        }
        if (exists) params.starts[e] = {start.pair, start.token, start.group, count.pairs};
    }
    if (thread_index() == 0) *params.groups.totals = {base.pair, base.token, base.group, 0};
}

FM_DEVICE void run_group_scatter(const GroupParams& params) {
    Chunk chunk(params);
    const Groups& groups = params.groups;
    chunk.load_slots();
    const GroupCount* before = params.counts + static_cast<long long>(block_index()) * params.num_indices;
    for (int e = thread_index(); e < params.num_indices; e += kThreads) {
        const GroupStart start = params.starts[e];
        chunk.counts[e] = {start.pair + before[e].pairs, start.token + before[e].tokens};
    }
    block_barrier();  // every thread's slots are there
    chunk.walk();
    block_barrier();  // every pair and token has its place
    if (chunk.token >= params.num_tokens) return;
    for (int j = 0; j < chunk.num_slots; ++j) {
        const int slot = chunk.slots[thread_index() * chunk.num_slots + j];
        const int position = slot < 0 ? -1 : chunk.places[thread_index() * chunk.num_slots + j];
        params.positions[static_cast<long long>(chunk.token) * chunk.num_slots + j] = position;
        if (slot < 0) continue;
        Pair& pair = groups.pairs[position];
        pair.token = chunk.token;
        pair.gate = chunk.gate(j);
        pair.expert = slot;
        const GroupStart start = params.starts[slot];
        const int local = position - start.pair;
        const int left = start.count - local;
        if (local % kShrinkPairs == 0) {
            groups.shrink_groups[start.group + local / kShrinkPairs] = {slot, position, left < kShrinkPairs ? left : kShrinkPairs, 0};
        }
    }
    if (chunk.token_keys[thread_index()] >= 0) groups.tile_tokens[chunk.token_places[thread_index()]] = chunk.token;
}

FM_DEVICE void run_group_tiles(const GroupParams& params) {
    const Groups& groups = params.groups;
    const int num_slots = groups.num_slots;
    const int first = block_index() * groups.tile_rows;
    const int left = groups.totals->tokens - first;
    const int count = (left < groups.tile_rows ? left : groups.tile_rows) * num_slots;
    int* experts = reinterpret_cast<int*>(shared_memory());  // [tile_rows, k]
    for (int i = thread_index(); i < count; i += kThreads) {
        const long long slot = static_cast<long long>(groups.tile_tokens[first + i / num_slots]) * num_slots + i % num_slots;
        experts[i] = params.positions[slot] < 0 ? kNoExpert : params.ids[slot];
    }
    block_barrier();  // every slot's expert is there
    for (int i = thread_index(); i < count; i += kThreads) {
        const int expert = experts[i];
        if (expert == kNoExpert) continue;
        const int row = i / num_slots;
        bool is_first = true;
        for (int j = 0; j < num_slots; ++j) is_first &= experts[row * num_slots + j] >= expert;
        int place = 0;
        int run = 0;
        FM_UNROLL_4
        for (int other = 0; other < count; ++other) {
            const bool same = experts[other] == expert;
            place += experts[other] < expert || (same && other < i);
            run += same && other >= i;
        }
        place += first * num_slots;
        groups.tile_pairs[place] = {expert, run, is_first ? ~row : row, 0};
        const long long slot = static_cast<long long>(groups.tile_tokens[first + row]) * num_slots + i % num_slots;
        groups.pairs[params.positions[slot]].place = place;
    }
    if (thread_index() == 0) {
        int pairs = 0;
        for (int i = 0; i < count; ++i) pairs += experts[i] != kNoExpert;
        groups.tile_counts[block_index()] = pairs;
    }
}

}  // namespace fusedmerge
