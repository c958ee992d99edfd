// Runs warps of a PTX program. See ptx.h.
#include "ptx_machine.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace fusedmerge::ptx {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kTurn = 400;  // instructions at most before another warp may run

unsigned lanes_in(const Warp& warp, Lane state) {
    unsigned mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<unsigned>(warp.state[lane] == state) << lane;
    return mask;
}

unsigned lanes_where(const Row& row, bool negated) {
    unsigned mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<unsigned>((row.lane[lane] & 1u) != 0) << lane;
    return negated ? ~mask : mask;
}

void place(Warp& warp, unsigned mask, int at) {
    for_lanes(mask, [&](int lane) { warp.at[lane] = at; });
}

void mark(Warp& warp, unsigned mask, Lane state) {
    for_lanes(mask, [&](int lane) { warp.state[lane] = state; });
}

// The ready lanes that are furthest behind, and how far they may run before others join them.
struct Group {
    unsigned mask = 0;
    int at = 0;
    int next = 0;
};

Group furthest_behind(const Warp& warp) {
    Group group{0, 1 << 30, 1 << 30};
    unsigned ready = lanes_in(warp, Lane::kReady);
    for_lanes(ready, [&](int lane) { group.at = std::min(group.at, warp.at[lane]); });
    for_lanes(ready, [&](int lane) {
        if (warp.at[lane] == group.at) {
            group.mask |= 1u << lane;
        } else {
            group.next = std::min(group.next, warp.at[lane]);
        }
    });
    return group;
}

// All lanes have come to one instruction that they execute together.
void meet(Machine& machine, Warp& warp, unsigned arrived, int at) {
    place(warp, arrived, at);
    mark(warp, arrived, Lane::kTogether);
    unsigned waiting = lanes_in(warp, Lane::kTogether);
    if (waiting != kAll) return;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (warp.at[lane] != at) throw std::runtime_error("a warp's lanes wait at different instructions");
    }
    Step step{machine.program.code[at], machine, warp, kAll};
    step.instruction.action(step);
    place(warp, kAll, at + 1);
    mark(warp, kAll, Lane::kReady);
}

void finish(Warp& warp, unsigned mask, bool waits) {
    mark(warp, mask, Lane::kDone);
    for_lanes(mask, [&](int lane) {
        for (const auto& group : warp.copies[lane].groups) {
            if (!group.empty()) throw std::runtime_error("a thread ends before its asynchronous copies");
        }
        if (!warp.copies[lane].open.empty()) throw std::runtime_error("a thread ends with copies that belong to no group");
        if (waits && (warp.waited >> lane & 1u) == 0) throw std::runtime_error(std::string("a thread ") + sim::kNeverWaited);
    });
}

// Runs ready lanes until none is, or their turn is over.
void run(Machine& machine, Warp& warp) {
    int left = machine.options.thread_order == static_cast<int>(sim::ThreadOrder::kShuffled)
                   ? 1 + static_cast<int>(machine.random() % kTurn)
                   : kTurn;
    machine.paused = false;
    while (left > 0 && !machine.paused) {
        Group group = furthest_behind(warp);
        if (group.mask == 0) return;
        bool together = true;
        while (together && left-- > 0 && !machine.paused) {
            const Instruction& instruction = machine.program.code.at(group.at);
            unsigned active = group.mask;
            if (instruction.guard >= 0) active &= lanes_where(warp.registers[instruction.guard], instruction.guard_negated);
            unsigned rest = group.mask & ~active;
            if (machine.traffic != nullptr) ++machine.traffic->instructions;
            int at = group.at++;
            if (active == 0) {
                // all pass by
            } else if (instruction.kind == Kind::kPlain) {
                Step step{instruction, machine, warp, active};
                instruction.action(step);
            } else if (instruction.kind == Kind::kBranch && rest == 0) {
                group.at = instruction.target;
            } else {
                place(warp, rest, at + 1);
                if (instruction.kind == Kind::kBranch) {
                    place(warp, active, instruction.target);
                } else if (instruction.kind == Kind::kExit) {
                    finish(warp, active, machine.waits);
                } else if (instruction.kind == Kind::kBarrier) {
                    Step step{instruction, machine, warp, active};
                    if (instruction.target == 1) instruction.action(step);
                    place(warp, active, at);
                    mark(warp, active, Lane::kAtBarrier);
                } else {
                    meet(machine, warp, active, at);
                }
                group.mask = 0;
                together = false;
            }
            together &= group.at < group.next;
        }
        place(warp, group.mask, group.at);
    }
}

// Lets the threads go on that wait at the block's barrier, if all have come.
void open_barrier(Machine& machine, Block& block) {
    int at = -1;
    for (const auto& warp : block.warps) {
        for (int lane = 0; lane < kLanes; ++lane) {
            if (warp->state[lane] == Lane::kDone) continue;
            if (warp->state[lane] != Lane::kAtBarrier) return;
            bool voting = machine.program.code[warp->at[lane]].target == 1;
            if (at >= 0 && (machine.program.code[at].target == 1) != voting) throw std::runtime_error("two kinds of barriers meet");
            at = warp->at[lane];
        }
    }
    if (at < 0) return;
    for (const auto& warp : block.warps) {
        for (int lane = 0; lane < kLanes; ++lane) {
            if (warp->state[lane] != Lane::kAtBarrier) continue;
            const Instruction& instruction = machine.program.code[warp->at[lane]];
            if (instruction.target == 1) warp->registers[instruction.registers[0]].lane[lane] = block.vote;
            warp->state[lane] = Lane::kReady;
            ++warp->at[lane];
        }
    }
    block.vote = false;
}

std::unique_ptr<Block> make_block(Machine& machine, int index, int shared_bytes, const void* params) {
    auto block = std::make_unique<Block>();
    block->index = index;
    block->storage.assign(shared_bytes + 128, 0xff);  // NaN in every floating-point type
    block->shared = block->storage.data() + (-reinterpret_cast<uintptr_t>(block->storage.data()) & 127u);
    block->shared_bytes = shared_bytes;
    for (int first = 0; first < machine.num_threads; first += kLanes) {
        auto warp = std::make_unique<Warp>();
        warp->block = block.get();
        warp->registers.resize(machine.program.num_registers);
        for (Row& row : warp->registers) std::fill_n(row.lane, kLanes, 0xdeadbeefdeadbeefu);  // of a register that was never written
        for (int lane = 0; lane < kLanes; ++lane) {
            set(warp->registers[kThread], lane, first + lane);
            set(warp->registers[kBlock], lane, index);
            set(warp->registers[kBlockThreads], lane, machine.num_threads);
            set(warp->registers[kBlocks], lane, machine.num_blocks);
            set(warp->registers[kParam], lane, params);
            for (const Constant& constant : machine.program.constants) warp->registers[constant.index].lane[lane] = constant.value;
        }
        block->warps.push_back(std::move(warp));
    }
    return block;
}

bool is_done(const Block& block) {
    return std::all_of(block.warps.begin(), block.warps.end(), [](const auto& warp) { return lanes_in(*warp, Lane::kDone) == kAll; });
}

std::string describe_deadlock(const Machine& machine, const Block& block) {
    std::string text = "deadlock in block " + std::to_string(block.index) + ":";
    for (size_t w = 0; w < block.warps.size(); ++w) {
        const Warp& warp = *block.warps[w];
        for (Lane state : {Lane::kAtBarrier, Lane::kTogether}) {
            unsigned mask = lanes_in(warp, state);
            if (mask == 0) continue;
            text += " warp " + std::to_string(w) + ", " + std::to_string(__builtin_popcount(mask)) + " lanes at `" +
                    machine.program.code[warp.at[__builtin_ctz(mask)]].text + "`;";
        }
    }
    return text;
}

void run_blocks(Machine& machine, int shared_bytes, const void* params) {
    std::vector<std::unique_ptr<Block>> resident;
    int next_block = 0;
    while (true) {
        while (next_block < machine.num_blocks && static_cast<int>(resident.size()) < std::max(1, machine.options.resident_blocks)) {
            resident.push_back(make_block(machine, next_block++, shared_bytes, params));
        }
        if (resident.empty()) return;
        size_t pick = machine.random() % resident.size();
        Block& block = *resident[pick];
        std::vector<Warp*> ready;
        for (const auto& warp : block.warps) {
            if (lanes_in(*warp, Lane::kReady) != 0) ready.push_back(warp.get());
        }
        if (ready.empty()) throw std::runtime_error(describe_deadlock(machine, block));
        if (machine.options.thread_order == static_cast<int>(sim::ThreadOrder::kReverse)) std::reverse(ready.begin(), ready.end());
        bool shuffled = machine.options.thread_order == static_cast<int>(sim::ThreadOrder::kShuffled);
        run(machine, *ready[shuffled ? machine.random() % ready.size() : 0]);
        open_barrier(machine, block);
        if (is_done(block)) resident.erase(resident.begin() + static_cast<long>(pick));
    }
}

}  // namespace

std::string launch(const Program& program, const void* params, int params_bytes, int num_blocks, int num_threads, int shared_bytes,
                   const sim::Options& options, Traffic* traffic) {
    if (num_threads % kLanes != 0) return "blocks of " + std::to_string(num_threads) + " threads";
    std::vector<uint64_t> argument(params_bytes / 8 + 1);  // aligned as a struct of pointers is
    std::memcpy(argument.data(), params, params_bytes);
    Machine machine{program, options, num_blocks, num_threads, traffic, std::mt19937(options.seed), {}, {}, false};
    std::string error;
    machine.waits = sim::conceal();
    try {
        run_blocks(machine, shared_bytes, argument.data());
    } catch (const std::exception& failure) {
        error = failure.what();
    }
    sim::reveal();
    if (traffic != nullptr) {
        traffic->touched_read_sectors += static_cast<int64_t>(machine.read.size());
        traffic->touched_written_sectors += static_cast<int64_t>(machine.written.size());
    }
    return error;
}

namespace {

std::string known_text;
std::map<std::string, Program> known_programs;
bool is_in_use = false, counts_traffic = false;
Traffic counted{};

}  // namespace

void use(const char* text, bool counts) {
    is_in_use = text != nullptr;
    counts_traffic = counts;
    if (!is_in_use || known_text == text) return;
    known_text = text;
    known_programs.clear();
}

bool in_use() { return is_in_use; }

std::string run(const std::string& name, const void* params, int params_bytes, int num_blocks, int num_threads, int shared_bytes,
                const sim::Options& options) {
    try {
        if (known_programs.count(name) == 0) known_programs[name] = parse(known_text, name);
    } catch (const std::exception& failure) {
        return failure.what();
    }
    Traffic* traffic = counts_traffic ? &counted : nullptr;
    return launch(known_programs[name], params, params_bytes, num_blocks, num_threads, shared_bytes, options, traffic);
}

Traffic take_traffic() { return std::exchange(counted, Traffic{}); }

}  // namespace fusedmerge::ptx
