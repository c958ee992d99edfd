// Which adapters to add, decided on the device.
//
// A selection is k slots (id, gate). Its canonical form, the *mixture*, has ascending ids, duplicates added in slot order in float32, and
// no zero gates. Exact mode adds the mixture to the base; in place, [new slots, -last] is merged by the same rule, so that an adapter
// present in both moves by the difference of its gates and one that did not change is not touched at all.
//
// Protocol (one switcher, one stream): every block reads the last and the next selection before it stores anything; after its units it
// takes a ticket, and the block with the last ticket writes last := applied. So no block can see the update of the launch it belongs to.
#pragma once

#include "params.cuh"
#include "platform.cuh"

namespace fusedmerge {

constexpr int kMaxExperts = 2 * kMaxSlots;  // in place: new and last

struct Mixture {
    int count;
    int ids[kMaxExperts];
    float gates[kMaxExperts];
};

// One expert of the current segment, in the order in which it is added.
struct ResolvedExpert {
    const void* a;      // [r, cols]
    const void* b;      // [rows, r]
    float coefficient;  // gate * scaling
    int first_slice;    // slices of 16 ranks before this expert
};

struct SelectionMemory {  // shared memory
    Mixture next;         // what `state` will remember
    Mixture change;       // what is added to the source
    int slot_ids[kMaxExperts];
    float slot_gates[kMaxExperts];
    float sums[kMaxExperts];  // per slot: the gate sum where it is its id's first slot, else 0
    float coefficients[kMaxExperts];
    int num_slices[kMaxExperts];
    SwitchSegment segment;  // the current unit's; read from here, its fields take no registers
    ResolvedExpert experts[kMaxExperts];
    int num_experts;
    int total_slices;
};

// mixture := canonical form of `count` slots in shared memory. True where a sum is not finite.
FM_DEVICE bool merge_slots(Mixture& mixture, SelectionMemory& memory, int count) {
    int slot = thread_index();
    if (slot < count) {
        int id = memory.slot_ids[slot];
        bool first = id >= 0;
        for (int i = 0; i < slot; ++i) first &= memory.slot_ids[i] != id;
        float sum = 0.0f;
        for (int i = slot; first && i < count; ++i) {
            if (memory.slot_ids[i] == id) sum = add(sum, memory.slot_gates[i]);
        }
        memory.sums[slot] = sum;
    }
    if (slot == 0) mixture.count = 0;
    bool overflow = block_any(slot < count && !is_finite(memory.sums[slot]));
    if (slot < count && memory.sums[slot] != 0.0f) {
        int position = 0;
        int total = 0;
        for (int i = 0; i < count; ++i) {
            position += memory.sums[i] != 0.0f && memory.slot_ids[i] < memory.slot_ids[slot];
            total += memory.sums[i] != 0.0f;
        }
        mixture.ids[position] = memory.slot_ids[slot];
        mixture.gates[position] = memory.sums[slot];
        if (position == 0) mixture.count = total;
    }
    block_barrier();
    return overflow;
}

// Reads the selection and decides what to do; every thread gets the same answer. False: nothing is to be done (unchanged, or invalid).
FM_DEVICE bool read_selection(SelectionMemory& memory, const SwitchParams& params) {
    int thread = thread_index();
    const SwitchState& state = *params.state;
    int id = thread < params.num_slots ? params.ids[thread] : -1;
    float gate = thread < params.num_slots ? params.gates[thread] : 0.0f;
    int num_last = state.num_last;
    bool has_last = thread < num_last;
    int last_id = has_last ? state.last_ids[thread] : -1;
    float last_gate = has_last ? state.last_gates[thread] : 0.0f;
    bool forced = state.valid == 0;
    if (thread < params.num_slots) {
        memory.slot_ids[thread] = id;
        memory.slot_gates[thread] = gate;
    }
    bool bad_id = block_any(id < -1 || id >= params.num_adapters);
    bool bad_gate = block_any(!is_finite(gate));
    bad_gate |= merge_slots(memory.next, memory, params.num_slots);
    if (bad_id || bad_gate) {
        if (thread == 0) atomic_or(&params.state->status, (bad_id ? kStatusBadId : 0) | (bad_gate ? kStatusBadGate : 0));
        return false;
    }
    bool differs = has_last && thread < memory.next.count && (memory.next.ids[thread] != last_id || memory.next.gates[thread] != last_gate);
    differs |= num_last != memory.next.count || forced;
    if (!block_any(differs)) return false;
    if (params.inplace && has_last) {
        memory.slot_ids[params.num_slots + thread] = last_id;
        memory.slot_gates[params.num_slots + thread] = -last_gate;
    }
    block_barrier();
    merge_slots(memory.change, memory, params.num_slots + (params.inplace ? num_last : 0));
    return true;
}

// After this block's units: the last block to come here remembers what all of them applied.
FM_DEVICE void finish_selection(const SelectionMemory& memory, const SwitchParams& params) {
    if (thread_index() != 0) return;
    SwitchState& state = *params.state;
    device_fence();  // this block's reads of the state come before its ticket (read_selection's barriers put all threads' before this one)
    if (atomic_add(&state.ticket, 1) != grid_size() - 1) return;
    device_fence();
    for (int i = 0; i < memory.next.count; ++i) {
        state.last_ids[i] = memory.next.ids[i];
        state.last_gates[i] = memory.next.gates[i];
    }
    state.num_last = memory.next.count;
    state.valid = 1;
    state.ticket = 0;
}

// Fetches a segment and its experts, ascending |gate * scaling| (ties: ascending id); zero coefficients and absent adapters are left out.
template <class Factor>
FM_DEVICE void resolve_experts(SelectionMemory& memory, const SwitchSegment& segment) {
    constexpr int kWords = sizeof(SwitchSegment) / 8;
    int thread = thread_index();
    block_barrier();  // the previous unit is done
    if (thread < kWords) reinterpret_cast<long long*>(&memory.segment)[thread] = reinterpret_cast<const long long*>(&segment)[thread];
    int count = memory.change.count;
    int id = 0;
    float coefficient = 0.0f;
    if (thread < count) {
        id = memory.change.ids[thread];
        coefficient = multiply(memory.change.gates[thread], segment.scaling[id]);
        int rank = segment.ranks != nullptr ? segment.ranks[id] : segment.rank;
        memory.coefficients[thread] = coefficient;
        memory.num_slices[thread] = coefficient != 0.0f ? (rank + kRankStep - 1) / kRankStep : 0;
    }
    block_barrier();
    int num_experts = 0;
    int total_slices = 0;
    int position = 0;
    int first_slice = 0;
    for (int i = 0; i < count; ++i) {
        bool used = memory.num_slices[i] > 0;
        float other = magnitude(memory.coefficients[i]);
        bool before = used && (other < magnitude(coefficient) || (other == magnitude(coefficient) && i < thread));
        num_experts += used;
        total_slices += memory.num_slices[i];
        position += before;
        first_slice += before ? memory.num_slices[i] : 0;
    }
    if (thread < count && memory.num_slices[thread] > 0) {
        ResolvedExpert& expert = memory.experts[position];
        expert.a = static_cast<const Factor*>(segment.a) + id * segment.a_adapter_stride;
        expert.b = static_cast<const Factor*>(segment.b) + id * segment.b_adapter_stride;
        expert.coefficient = coefficient;
        expert.first_slice = first_slice;
    }
    if (thread == 0) {
        memory.num_experts = num_experts;
        memory.total_slices = total_slices;
    }
    block_barrier();
}

// One slice of 16 ranks: where its factors are, and what the accumulator is multiplied by before it (|ratio| <= 1).
struct Slice {
    const void* a;  // [16, cols]
    const void* b;  // [rows, 16] with b's row stride
    float ratio;
};

template <class Factor>
FM_DEVICE Slice find_slice(const SelectionMemory& memory, const SwitchSegment& segment, int slice_idx) {
    int e = memory.num_experts - 1;
    while (memory.experts[e].first_slice > slice_idx) --e;
    const ResolvedExpert& expert = memory.experts[e];
    int k = (slice_idx - expert.first_slice) * kRankStep;
    Slice slice;
    slice.a = static_cast<const Factor*>(expert.a) + k * segment.a_row_stride;
    slice.b = static_cast<const Factor*>(expert.b) + k;
    slice.ratio = k == 0 && e > 0 ? divide(memory.experts[e - 1].coefficient, expert.coefficient) : 1.0f;
    return slice;
}

}  // namespace fusedmerge
