// The expand of a GEMV's tile: sum over a token's slots and ranks of gate * scaling * B[id, row] z[t].
//
// A token's ranks are taken by octets: slot by slot, eight ranks at a time. What every row needs of an octet (where its B is, its
// coefficient, z summed over splits) waits in shared memory, for as many tiles as have the same target; where there is no place for all
// octets, a part of them for a tile at a time. Sixteen lanes share a row. With P tokens (a power of two, or more than there are) each token
// has 16 / P of them, which take its octets in turn. An octet's products are added in a tree, octets in their order, whoever has them: so a
// token's bits do not depend on P.
#pragma once

#include "products.cuh"

namespace fusedmerge {

constexpr int kBatchOctets = 4;  // octets of B that a lane loads before it uses the first

// An octet of a token, but for the row.
struct alignas(16) Place {
    long long offset;   // of B, in elements; -1: adds nothing
    float coefficient;  // gate * scaling
    int num_ranks;      // from here on
};

// Token t's places are t * kPlaces / P and up: the sixteen lanes of a row then read different banks.
template <int kTokenTiles>
struct Staged {
    static constexpr int kPlaces = kTokenTiles == 1 ? 144 : 272;

    Place places[kPlaces];
    Floats4 z[2][kPlaces];  // ranks 0..3 and 4..7
};

template <class T, int kTokenTiles>
struct Expand {
    const LinearParams& params;
    const Routing<kTokenTiles>& routing;
    Staged<kTokenTiles>& staged;
    const bool active;
    int lanes;                               // of a token
    int pitch;                               // places of a token
    int token;                               // this lane's
    bool finishes;                           // it stores this token's y
    const LinearTarget* complete = nullptr;  // all of its octets are staged

    FM_DEVICE Expand(const LinearParams& p, const Routing<kTokenTiles>& r, Staged<kTokenTiles>& s, bool some)
        : params(p), routing(r), staged(s), active(some), lanes(kMaxTokens) {
        for (int tokens = 1; tokens < p.tokens; tokens *= 2) lanes /= 2;
        pitch = Staged<kTokenTiles>::kPlaces * lanes / kMaxTokens;
        token = thread_index() % kMaxTokens / lanes;
        finishes = thread_index() % lanes == 0 && token < p.tokens;
    }

    // Block-wide: the sums of this thread's row and of the one sixteen below, in each of a token's lanes.
    FM_DEVICE void run(float (&sums)[2], const LinearTarget& target, int row) {
        sums[0] = sums[1] = 0.0f;
        if (!active) return;
        const int count = params.num_slots * (target.z_pitch / 8);
        FM_NO_UNROLL
        for (int first = 0; first < count; first += pitch) {
            if (complete != &target) {
                stage(target, first, count);
                complete = count <= pitch ? &target : nullptr;
            }
            int staged_count = count - first < pitch ? count - first : pitch;
            FM_NO_UNROLL
            for (int half = 0; half < 2; ++half) {
                float sum = add_places(sums[0], target, row, staged_count);
                sums[0] = sums[1];  // the halves take turns
                sums[1] = sum;
                row += half == 0 ? kMmaRows : -kMmaRows;
            }
        }
    }

    FM_DEVICE void stage(const LinearTarget& target, int first, int count) {
        const int num_octets = target.z_pitch / 8;
        const int first_slot = target.routing * params.num_slots;
        block_barrier();  // the last places have been used, and the routing is visible
        for (int i = thread_index(); i < params.tokens * pitch; i += kThreads) {
            const int octet = first + i % pitch;
            if (octet >= count) continue;
            const int of = i / pitch;
            const int slot = octet / num_octets;
            const int rank = octet % num_octets * 8;
            const int id = routing.ids[of][first_slot + slot];
            float coefficient = routing.gates[of][first_slot + slot];
            if (id >= 0 && target.scaling != nullptr) coefficient = multiply(coefficient, target.scaling[id]);
            const bool adds = id >= 0 && coefficient != 0.0f;  // else nothing is read, whatever the factors hold
            staged.places[i] = {adds ? id * target.b_adapter_stride + rank : -1, coefficient, target.rank - rank};
            if (adds) load_z(i, target, of, params.logits != nullptr ? id : slot, rank);
        }
        block_barrier();  // the places are visible
    }

    // Eight ranks of z, its splits added in order.
    FM_DEVICE void load_z(int place, const LinearTarget& target, int of, int slot, int rank) {
        long long num_slots = params.logits != nullptr ? params.num_adapters : params.num_slots;
        const float* from = target.z + (of * num_slots + slot) * target.z_pitch + rank;
        float z[8] = {};
        for (int split = 0; split < params.num_splits; ++split) {
            unsigned words[8];
            load_16(words, from);
            load_16(words + 4, from + 4);
            FM_UNROLL
            for (int i = 0; i < 8; ++i) z[i] = add(z[i], bits_to_float(words[i]));
            from += params.tokens * num_slots * target.z_pitch;
        }
        staged.z[0][place] = {z[0], z[1], z[2], z[3]};
        staged.z[1][place] = {z[4], z[5], z[6], z[7]};
    }

    // `total` and what the first `count` places of the lane's token add to this row. For all lanes of a warp.
    FM_DEVICE float add_places(float total, const LinearTarget& target, int row, int count) const {
        const int own = thread_index() % lanes;
        const bool has = token < params.tokens && row < target.rows;
        const T* b = static_cast<const T*>(target.b) + (has ? row * target.b_row_stride : 0);
        FM_NO_UNROLL
        for (int first = 0; first < count; first += kBatchOctets * lanes) {
            Octet<T> octets[kBatchOctets];
            float coefficients[kBatchOctets];
            FM_UNROLL
            for (int v = 0; v < kBatchOctets; ++v) {
                coefficients[v] = 0.0f;
                if (!has || first + v * lanes + own >= count) continue;
                const Place place = staged.places[token * pitch + first + v * lanes + own];
                if (place.offset < 0) continue;
                coefficients[v] = place.coefficient;
                load_octet(octets[v], b + place.offset, place.num_ranks, (target.flags & kTargetBAligned) != 0);
            }
            FM_UNROLL
            for (int v = 0; v < kBatchOctets; ++v) {
                const int place = first + v * lanes;
                if (place >= count) break;
                float sum = coefficients[v] != 0.0f ? product(octets[v], token * pitch + place + own, coefficients[v]) : 0.0f;
                total = add_in_order(total, sum, count - place);
            }
        }
        return total;
    }

    // coefficient * (octet of B) z
    FM_DEVICE float product(const Octet<T>& octet, int place, float coefficient) const {
        float values[8];
        widen_octet(values, octet, 1.0f);
        FM_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = multiply(values[i], staged.z[i / 4][place].values[i % 4]);
        return multiply(coefficient, sum_eight(values));
    }

    // The sums of the token's lanes, of which `count` have one.
    FM_DEVICE float add_in_order(float total, float sum, int count) const {
        if (lanes == 1) return add(total, sum);
        const int first = thread_index() % kWarpLanes / lanes * lanes;
        FM_NO_UNROLL
        for (int i = 0; i < lanes && i < count; ++i) total = add(total, bits_to_float(shuffle(float_to_bits(sum), first + i)));
        return total;
    }
};

}  // namespace fusedmerge
