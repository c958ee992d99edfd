// Executes compiled kernels without a GPU: a machine for the PTX that nvcc and NVRTC make of the kernels.
//
// The simulator (simulator.h) runs the kernels' C++ with the host twin of every instruction in ptx.cuh; this machine runs what the CUDA
// compiler made of the same C++, inline PTX included, so it shows what twins and compiler hide from the simulator: operands, layouts, the
// device branch of platform.cuh. Pointers are host pointers. One register file per warp; lanes that diverged run lowest address first and
// meet again there; a `.sync` instruction waits for all lanes. Unknown instructions, misaligned accesses, accesses beyond shared memory,
// and barriers that cannot be met end a launch with a message. Not modelled: the convergence that `.aligned` asks for, fences, overlapping
// launches, caches, timing. ex2.approx is the host's exp2f.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "simulator.h"

namespace fusedmerge::ptx {

constexpr int kLanes = 32;

struct Row {  // one register of a warp; narrower values in the low bits
    uint64_t lane[kLanes];
};

struct Step;
using Action = std::function<void(Step&)>;

enum class Kind { kPlain, kBranch, kExit, kBarrier, kTogether };

struct Instruction {
    Kind kind = Kind::kPlain;
    Action action;
    std::vector<int> registers;  // operands in their order, vectors flattened, constants too; of an address: its base
    int64_t offset = 0;          // what an address adds to its base
    int guard = -1;              // a predicate; none: -1
    bool guard_negated = false;
    int target = -1;  // of a branch: an index into the code; of a barrier: 1 if threads bring a vote
    std::string text;
};

struct Constant {
    int index;
    uint64_t value;
};

enum Special { kThread, kBlock, kBlockThreads, kBlocks, kParam, kNumSpecials };  // registers that every program begins with

struct Program {
    std::vector<Instruction> code;
    std::vector<Constant> constants;
    int num_registers = 0;
};

// The entry of that name without namespace, template arguments included; in a text with a single entry, that one. Throws
// std::runtime_error for PTX that it does not know.
Program parse(const std::string& text, const std::string& name);

// The action of an instruction such as "add.s32"; sets instruction.kind. Throws std::runtime_error for an unknown one.
void decode(const std::string& opcode, Instruction& instruction);

// Bytes that a launch asked of memory, and the transactions that this takes.
struct Traffic {
    int64_t instructions;         // of warps
    int64_t global_read;          // bytes that lanes asked for
    int64_t global_read_sectors;  // of 32 bytes, each counted once for each warp instruction
    int64_t global_written;
    int64_t global_written_sectors;
    int64_t touched_read_sectors;  // different ones of the whole launch: what memory must give at least
    int64_t touched_written_sectors;
    int64_t shared_accesses;   // wavefronts if no two lanes met in a bank
    int64_t shared_conflicts;  // wavefronts beyond these
};

// Runs a program on every thread of the grid. Empty = success, else what went wrong.
std::string launch(const Program& program, const void* params, int params_bytes, int num_blocks, int num_threads, int shared_bytes,
                   const sim::Options& options, Traffic* traffic);

// What the simulator's interface runs in place of the kernels' C++, once it was given their PTX. A name is what `parse` takes.
void use(const char* text, bool counts);  // null: nothing any more
bool in_use();
std::string run(const std::string& name, const void* params, int params_bytes, int num_blocks, int num_threads, int shared_bytes,
                const sim::Options& options);
Traffic take_traffic();  // of the launches since it was last asked for

}  // namespace fusedmerge::ptx
