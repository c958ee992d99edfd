// The PTX machine's insides: warps, blocks and the launch that they belong to. ptx_machine.cpp runs them, ptx_decode.cpp has what
// instructions do, ptx_memory.cpp those that touch memory.
#pragma once

#include <deque>
#include <memory>
#include <random>
#include <unordered_set>

#include "machine.h"
#include "ptx.h"

namespace fusedmerge::ptx {

constexpr uint64_t kSharedWindow = 1024;  // the address of a block's first byte: not 0, as on a GPU

enum class Lane : unsigned char { kReady, kAtBarrier, kTogether, kDone };

struct LaneCopies {
    std::vector<sim::Copy> open;
    std::deque<std::vector<sim::Copy>> groups;
};

struct Block;

struct Warp {
    Block* block = nullptr;
    std::vector<Row> registers;
    int at[kLanes] = {};  // where each lane is in the code
    Lane state[kLanes] = {};
    LaneCopies copies[kLanes];
    unsigned waited = 0;  // lanes, for earlier kernels
};

struct Block {
    int index = 0;
    bool vote = false;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<unsigned char> storage;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
};

struct Machine {
    const Program& program;
    const sim::Options& options;
    int num_blocks;
    int num_threads;
    Traffic* traffic;  // null: not counted
    std::mt19937 random;
    std::unordered_set<uint64_t> read, written;  // sectors
    bool paused = false;                         // after an atomic others may run
    bool waits = false;                          // something is hidden
};

// One instruction of a warp, for the lanes of `mask`.
struct Step {
    const Instruction& instruction;
    Machine& machine;
    Warp& warp;
    unsigned mask;

    Row& row(size_t operand) { return warp.registers[instruction.registers.at(operand)]; }
    size_t num_operands() const { return instruction.registers.size(); }
};

template <class T>
T get(const Row& row, int lane) {
    T value;
    std::memcpy(&value, &row.lane[lane], sizeof(T));
    return value;
}

// Signed integers are extended: a load may fill a register that is wider than what it loads.
template <class T>
void set(Row& row, int lane, T value) {
    uint64_t wide = 0;
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
        wide = static_cast<uint64_t>(static_cast<int64_t>(value));
    } else {
        std::memcpy(&wide, &value, sizeof(T));
    }
    row.lane[lane] = wide;
}

template <class Each>
void for_lanes(unsigned mask, Each each) {
    for (int lane = 0; lane < kLanes; ++lane) {
        if (mask >> lane & 1u) each(lane);
    }
}

// True where the opcode is one of this file's; fills in what the instruction does.
bool decode_memory(const std::vector<std::string>& parts, Instruction& instruction);

}  // namespace fusedmerge::ptx
