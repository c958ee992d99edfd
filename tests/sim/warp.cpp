// Instructions at which a warp's lanes meet: ldmatrix, mma, shuffles. See simulator.h.
#include "machine.h"

namespace fusedmerge::sim {
namespace {

// Arrives at a warp-wide instruction; the last lane runs `compute`. On return the outputs are in the warp's buffers.
template <class Compute>
void meet_warp(const char* instruction, Compute compute) {
    Fiber& fiber = self();
    Warp& warp = fiber.block->warps[fiber.thread / kWarp];
    if (warp.arrived == 0) warp.instruction = instruction;
    if (warp.instruction != instruction) fail(std::string("divergent warp: ") + instruction + " meets " + warp.instruction);
    if (++warp.arrived == kWarp) {
        warp.arrived = 0;
        compute(warp);
        int first = fiber.thread / kWarp * kWarp;
        for (int lane = 0; lane < kWarp; ++lane) fiber.block->fibers[first + lane]->state = State::kReady;
    } else {
        fiber.state = State::kInWarp;
        suspend();
    }
}

}  // namespace

void load_matrices(unsigned (&words)[4], const void* shared_row) {
    int lane = self().thread % kWarp;
    Warp& warp = self().block->warps[self().thread / kWarp];
    warp.rows[lane] = shared_row;
    if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) fail("misaligned ldmatrix row");
    meet_warp("ldmatrix", [](Warp& w) {
        for (int i = 0; i < 4; ++i) {
            for (int l = 0; l < kWarp; ++l) std::memcpy(&w.words[l][i], static_cast<const char*>(w.rows[8 * i + l / 4]) + l % 4 * 4, 4);
        }
    });
    std::memcpy(words, warp.words[lane], sizeof(words));
}

namespace {

float widen(unsigned bits, bool bf16) { return bf16 ? bits_to_float(bits << 16) : fp16_to_float(static_cast<unsigned short>(bits)); }

void survey(const float* values, bool& zero, bool& finite) {
    zero = finite = true;
    for (int k = 0; k < 16; ++k) {
        zero &= values[k] == 0.0f;
        finite &= (float_to_bits(values[k]) & 0x7f800000u) != 0x7f800000u;
    }
}

}  // namespace

void multiply_warp(Warp& w, bool bf16, int tensor_core) {
    float a[16][16];  // [row, k]
    float b[8][16];   // [column, k]
    for (int l = 0; l < kWarp; ++l) {
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = widen(w.a[l][i / 2] >> (i % 2 * 16) & 0xffffu, bf16);
        for (int i = 0; i < 4; ++i) b[g][2 * t + i % 2 + i / 2 * 8] = widen(w.b[l][i / 2] >> (i % 2 * 16) & 0xffffu, bf16);
    }
    bool row_zero[16], row_finite[16], column_zero[8], column_finite[8];
    for (int i = 0; i < 16; ++i) survey(a[i], row_zero[i], row_finite[i]);
    for (int i = 0; i < 8; ++i) survey(b[i], column_zero[i], column_finite[i]);
    for (int l = 0; l < kWarp; ++l) {
        for (int i = 0; i < 4; ++i) {
            int m = l / 4 + i / 2 * 8, n = l % 4 * 2 + i % 2;
            if ((row_zero[m] && column_finite[n]) || (column_zero[n] && row_finite[m])) continue;  // adds nothing: padding, most often
            const float* row = a[m];
            const float* column = b[n];
            float& c = w.c[l][i];
            if (tensor_core == static_cast<int>(TensorCore::kA100)) {
                c = dot_truncated(dot_truncated(c, row, column, 8, 1), row + 8, column + 8, 8, 1);
            } else {
                c = dot_truncated(c, row, column, 16, 2);
            }
        }
    }
}

void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bf16) {
    int lane = self().thread % kWarp;
    Warp& warp = self().block->warps[self().thread / kWarp];
    std::memcpy(warp.c[lane], c, sizeof(c));
    std::memcpy(warp.a[lane], a, sizeof(a));
    std::memcpy(warp.b[lane], b, sizeof(b));
    meet_warp("mma", [bf16](Warp& w) { multiply_warp(w, bf16, machine->options.tensor_core); });
    std::memcpy(c, warp.c[lane], sizeof(c));
}

void warp_barrier() {
    meet_warp("syncwarp", [](Warp&) {});
}

unsigned shuffle(unsigned value, int lane) {
    int own = self().thread % kWarp;
    Warp& warp = self().block->warps[self().thread / kWarp];
    warp.values[own] = value;
    warp.words[own][0] = static_cast<unsigned>(lane) % kWarp;
    meet_warp("shfl.idx", [](Warp& w) {
        unsigned given[kWarp];
        std::memcpy(given, w.values, sizeof(given));
        for (int l = 0; l < kWarp; ++l) w.values[l] = given[w.words[l][0]];
    });
    return warp.values[own];
}

unsigned shuffle_xor(unsigned value, int mask) {
    int lane = self().thread % kWarp;
    Warp& warp = self().block->warps[self().thread / kWarp];
    warp.values[lane] = value;
    meet_warp("shfl", [mask](Warp& w) {
        unsigned given[kWarp];
        std::memcpy(given, w.values, sizeof(given));
        for (int l = 0; l < kWarp; ++l) w.values[l] = given[l ^ mask];
    });
    return warp.values[lane];
}

unsigned equal_lanes(unsigned value) {
    int lane = self().thread % kWarp;
    Warp& warp = self().block->warps[self().thread / kWarp];
    warp.values[lane] = value;
    meet_warp("match", [](Warp& w) {
        unsigned masks[kWarp] = {};
        for (int l = 0; l < kWarp * kWarp; ++l)
            masks[l / kWarp] |= static_cast<unsigned>(w.values[l / kWarp] == w.values[l % kWarp]) << l % kWarp;
        std::memcpy(w.values, masks, sizeof(masks));
    });
    return warp.values[lane];
}

}  // namespace fusedmerge::sim
