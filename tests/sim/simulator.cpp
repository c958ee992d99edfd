// Fibers, barriers, warp exchanges and asynchronous copies. See simulator.h.
#include "simulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedmerge::sim {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Copy {
    void* to;
    const void* from;
    int size;
    int num_bytes;
};

struct Stack {
    void* bytes = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    Stack() = default;
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;
    ~Stack() { munmap(bytes, kStackBytes); }
};

struct Block;

struct Fiber {
    Block* block = nullptr;
    int thread = 0;
    State state = State::kReady;
    bool started = false;
    ucontext_t context;
    jmp_buf point;
    std::unique_ptr<Stack> stack;
    std::vector<Copy> open_copies;
    std::deque<std::vector<Copy>> groups;
    void* asan_stack = nullptr;
};

// A warp-wide instruction in progress: inputs of the lanes that have arrived; the last one computes every lane's output.
struct Warp {
    const char* instruction = nullptr;
    int arrived = 0;
    const void* rows[kWarp];
    unsigned words[kWarp][4];
    float c[kWarp][4];
    unsigned a[kWarp][4];
    unsigned b[kWarp][2];
};

struct Block {
    int index = 0;
    int num_done = 0;
    int num_at_barrier = 0;
    bool vote = false;
    bool vote_result = false;
    std::vector<unsigned char> shared_storage;
    unsigned char* shared = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::vector<int> order;
};

struct Machine {
    Entry entry = nullptr;
    const void* argument = nullptr;
    int num_blocks = 0;
    int num_threads = 0;
    Options options{};
    std::mt19937 random;
    std::string error;
    Fiber* current = nullptr;
    ucontext_t home;
    jmp_buf home_point;
    const void* home_stack = nullptr;
    size_t home_stack_bytes = 0;
};

thread_local Machine* machine = nullptr;
thread_local std::vector<std::unique_ptr<Stack>> spare_stacks;

Fiber& self() { return *machine->current; }

void fail(const std::string& message) {
    if (machine->error.empty())
        machine->error = "block " + std::to_string(self().block->index) + ", thread " + std::to_string(self().thread) + ": " + message;
}

// ---- switching between fibers: ucontext to start one; setjmp afterwards, which makes no system call (under ASan, ucontext throughout)

#if defined(__SANITIZE_ADDRESS__)
void resume(Fiber& fiber) {
    void* home_fake = nullptr;
    machine->current = &fiber;
    __sanitizer_start_switch_fiber(&home_fake, fiber.stack->bytes, kStackBytes);
    swapcontext(&machine->home, &fiber.context);
    __sanitizer_finish_switch_fiber(home_fake, nullptr, nullptr);
}
void suspend() {
    Fiber& fiber = self();
    bool done = fiber.state == State::kDone;
    __sanitizer_start_switch_fiber(done ? nullptr : &fiber.asan_stack, machine->home_stack, machine->home_stack_bytes);
    swapcontext(&fiber.context, &machine->home);
    __sanitizer_finish_switch_fiber(fiber.asan_stack, &machine->home_stack, &machine->home_stack_bytes);
}
#else
void resume(Fiber& fiber) {
    machine->current = &fiber;
    if (_setjmp(machine->home_point) != 0) return;
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}
void suspend() {
    if (_setjmp(self().point) == 0) _longjmp(machine->home_point, 1);
}
#endif

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine->home_stack, &machine->home_stack_bytes);
#endif
    machine->entry(machine->argument);
    Fiber& fiber = self();
    bool unfinished = !fiber.open_copies.empty();
    for (const auto& group : fiber.groups) unfinished |= !group.empty();
    if (unfinished) fail("ended with asynchronous copies that it never waited for");
    fiber.state = State::kDone;
    ++fiber.block->num_done;
    suspend();  // for ever
}

std::unique_ptr<Fiber> make_fiber(Block& block, int thread) {
    auto fiber = std::make_unique<Fiber>();
    fiber->block = &block;
    fiber->thread = thread;
    if (!spare_stacks.empty()) {
        fiber->stack = std::move(spare_stacks.back());
        spare_stacks.pop_back();
    } else {
        fiber->stack = std::make_unique<Stack>();
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber->stack->bytes, kStackBytes);  // frames that an earlier fiber never left
#endif
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack->bytes;
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    return fiber;
}

std::unique_ptr<Block> make_block(int index, int shared_bytes) {
    auto block = std::make_unique<Block>();
    block->index = index;
    block->shared_storage.assign(shared_bytes + 128, 0xff);  // NaN in every floating-point type, -1 as an integer
    auto address = reinterpret_cast<uintptr_t>(block->shared_storage.data());
    block->shared = block->shared_storage.data() + (128 - address % 128) % 128;
    block->shared_storage.resize(block->shared - block->shared_storage.data() + shared_bytes);  // so that ASan sees the end
    block->warps.resize((machine->num_threads + kWarp - 1) / kWarp);
    for (int thread = 0; thread < machine->num_threads; ++thread) {
        block->fibers.push_back(make_fiber(*block, thread));
        block->order.push_back(thread);
    }
    if (machine->options.thread_order == static_cast<int>(ThreadOrder::kReverse)) std::reverse(block->order.begin(), block->order.end());
    return block;
}

// Runs one thread if it can. False: it waits, or has ended.
bool step(Block& block, int thread) {
    Fiber& fiber = *block.fibers[thread];
    if (fiber.state != State::kReady || !machine->error.empty()) return false;
    resume(fiber);
    return true;
}

// One warp after the other, each as far as it can get: the largest distance between warps that barriers allow.
bool turn_in_order(Block& block) {
    bool progress = false;
    for (int first = 0; first < machine->num_threads; first += kWarp) {
        for (bool again = true; again;) {
            again = false;
            for (int i = first; i < std::min(first + kWarp, machine->num_threads); ++i) again |= step(block, block.order[i]);
            progress |= again;
        }
    }
    return progress;
}

// Every thread in random order, a quarter of the warps asleep.
bool turn_shuffled(Block& block) {
    std::shuffle(block.order.begin(), block.order.end(), machine->random);
    std::vector<bool> asleep(block.warps.size());
    for (size_t i = 0; i < asleep.size(); ++i) asleep[i] = machine->random() % 4 == 0;
    bool progress = false;
    for (int thread : block.order) {
        if (asleep[thread / kWarp]) {
            progress |= block.fibers[thread]->state == State::kReady;
        } else {
            progress |= step(block, thread);
        }
    }
    return progress;
}

// False: no thread of the block can run.
bool turn(Block& block) {
    bool shuffled = machine->options.thread_order == static_cast<int>(ThreadOrder::kShuffled);
    return shuffled ? turn_shuffled(block) : turn_in_order(block);
}

std::string describe_deadlock(const Block& block) {
    int at_barrier = 0, in_warp = 0, done = 0;
    const char* instruction = "";
    for (const auto& fiber : block.fibers) {
        at_barrier += fiber->state == State::kAtBarrier;
        in_warp += fiber->state == State::kInWarp;
        done += fiber->state == State::kDone;
        if (fiber->state == State::kInWarp) instruction = block.warps[fiber->thread / kWarp].instruction;
    }
    return "deadlock in block " + std::to_string(block.index) + ": " + std::to_string(at_barrier) + " threads wait at a block barrier, " +
           std::to_string(in_warp) + " in a warp-wide instruction (" + instruction + "), " + std::to_string(done) + " have ended";
}

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

void perform(const Copy& copy) {
    std::memcpy(copy.to, copy.from, copy.num_bytes);
    std::memset(static_cast<char*>(copy.to) + copy.num_bytes, 0, copy.size - copy.num_bytes);
}

}  // namespace

std::string launch(Entry entry, const void* argument, int num_blocks, int num_threads, int shared_bytes, const Options& options) {
    Machine state;
    machine = &state;
    state.entry = entry;
    state.argument = argument;
    state.num_blocks = num_blocks;
    state.num_threads = num_threads;
    state.options = options;
    state.random.seed(options.seed);
    std::vector<std::unique_ptr<Block>> resident;
    int next_block = 0;
    while (state.error.empty()) {
        while (next_block < num_blocks && static_cast<int>(resident.size()) < std::max(1, options.resident_blocks)) {
            resident.push_back(make_block(next_block++, shared_bytes));
        }
        if (resident.empty()) break;
        size_t pick = state.random() % resident.size();
        Block& block = *resident[pick];
        if (!turn(block) && state.error.empty()) state.error = describe_deadlock(block);
        if (state.error.empty() && block.num_done == num_threads) {
            for (auto& fiber : block.fibers) spare_stacks.push_back(std::move(fiber->stack));
            resident.erase(resident.begin() + static_cast<long>(pick));
        }
    }
    machine = nullptr;
    return state.error;
}

int thread_index() { return self().thread; }
int block_index() { return self().block->index; }
int grid_size() { return machine->num_blocks; }
unsigned char* shared_memory() { return self().block->shared; }

bool block_barrier(bool value) {
    Fiber& fiber = self();
    Block& block = *fiber.block;
    block.vote |= value;
    if (++block.num_at_barrier == machine->num_threads) {
        block.num_at_barrier = 0;
        block.vote_result = block.vote;
        block.vote = false;
        for (auto& other : block.fibers) other->state = State::kReady;
    } else {
        fiber.state = State::kAtBarrier;
        suspend();
    }
    return block.vote_result;
}

int atomic_add(int* where, int value) {
    int old = *where;
    *where += value;
    suspend();  // other threads and blocks may run right after it
    return old;
}

void atomic_or(int* where, int value) { *where |= value; }

void copy_async(void* shared, const void* global, int size, int num_bytes) {
    auto misaligned = (reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % size;
    if (misaligned != 0 || num_bytes < 0 || num_bytes > size) return fail("asynchronous copy is misaligned or has a wrong size");
    Copy copy{shared, global, size, num_bytes};
    int when = machine->options.async_copies;
    if (when == static_cast<int>(AsyncCopies::kEarly) || (when == static_cast<int>(AsyncCopies::kRandom) && machine->random() % 2 == 0)) {
        perform(copy);
    } else {
        self().open_copies.push_back(copy);
    }
}

void copy_async_commit() {
    Fiber& fiber = self();
    fiber.groups.push_back(std::move(fiber.open_copies));
    fiber.open_copies.clear();
}

void copy_async_wait(int num_pending) {
    auto& groups = self().groups;
    while (static_cast<int>(groups.size()) > num_pending) {
        for (const Copy& copy : groups.front()) perform(copy);
        groups.pop_front();
    }
}

void load_aligned(unsigned* words, const void* from, int num_bytes, unsigned long long) {
    if (reinterpret_cast<uintptr_t>(from) % num_bytes != 0) return fail("misaligned vector load");
    std::memcpy(words, from, num_bytes);
}

void store_aligned(void* to, const unsigned* words, int num_bytes, unsigned long long) {
    if (reinterpret_cast<uintptr_t>(to) % num_bytes != 0) return fail("misaligned vector store");
    std::memcpy(to, words, num_bytes);
}

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

void multiply_warp(Warp& w, bool bf16) {
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
            if (machine->options.tensor_core == static_cast<int>(TensorCore::kA100)) {
                c = dot_truncated(dot_truncated(c, row, column, 8, 1), row + 8, column + 8, 8, 1);
            } else {
                c = dot_truncated(c, row, column, 16, 2);
            }
        }
    }
}

}  // namespace

void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bf16) {
    int lane = self().thread % kWarp;
    Warp& warp = self().block->warps[self().thread / kWarp];
    std::memcpy(warp.c[lane], c, sizeof(c));
    std::memcpy(warp.a[lane], a, sizeof(a));
    std::memcpy(warp.b[lane], b, sizeof(b));
    meet_warp("mma", [bf16](Warp& w) { multiply_warp(w, bf16); });
    std::memcpy(c, warp.c[lane], sizeof(c));
}

}  // namespace fusedmerge::sim
