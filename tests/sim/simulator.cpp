// Fibers, barriers and asynchronous copies. See simulator.h.
#include <algorithm>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedmerge::sim {

thread_local Machine* machine = nullptr;

void fail(const std::string& message) {
    if (machine->error.empty())
        machine->error = "block " + std::to_string(self().block->index) + ", thread " + std::to_string(self().thread) + ": " + message;
}

namespace {

thread_local std::vector<std::unique_ptr<Stack>> spare_stacks;
thread_local std::vector<Hidden> hidden;  // by the next launch

// ---- switching between fibers: ucontext to start one; setjmp afterwards, which makes no system call (under ASan, ucontext throughout)

#if defined(__SANITIZE_ADDRESS__)
void resume(Fiber& fiber) {
    void* home_fake = nullptr;
    machine->current = &fiber;
    __sanitizer_start_switch_fiber(&home_fake, fiber.stack->bytes, kStackBytes);
    swapcontext(&machine->home, &fiber.context);
    __sanitizer_finish_switch_fiber(home_fake, nullptr, nullptr);
}
}  // namespace

void suspend() {
    Fiber& fiber = self();
    bool done = fiber.state == State::kDone;
    __sanitizer_start_switch_fiber(done ? nullptr : &fiber.asan_stack, machine->home_stack, machine->home_stack_bytes);
    swapcontext(&fiber.context, &machine->home);
    __sanitizer_finish_switch_fiber(fiber.asan_stack, &machine->home_stack, &machine->home_stack_bytes);
}

namespace {
#else
void resume(Fiber& fiber) {
    machine->current = &fiber;
    if (_setjmp(machine->home_point) != 0) return;
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

}  // namespace

void suspend() {
    if (_setjmp(self().point) == 0) _longjmp(machine->home_point, 1);
}

namespace {
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
    if (machine->waits && !fiber.waited) fail(kNeverWaited);
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

}  // namespace

void perform(const Copy& copy) {
    std::memcpy(copy.to, copy.from, copy.num_bytes);
    std::memset(static_cast<char*>(copy.to) + copy.num_bytes, 0, copy.size - copy.num_bytes);
}

std::string launch(Entry entry, const void* argument, int num_blocks, int num_threads, int shared_bytes, const Options& options) {
    Machine state;
    machine = &state;
    state.entry = entry;
    state.argument = argument;
    state.num_blocks = num_blocks;
    state.num_threads = num_threads;
    state.options = options;
    state.random.seed(options.seed);
    state.waits = conceal();
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
    reveal();  // for a launch that failed before it waited
    machine = nullptr;
    return state.error;
}

void hide(void* from, long long num_bytes) {
    auto* at = static_cast<unsigned char*>(from);
    hidden.push_back({at, std::vector<unsigned char>(at, at + num_bytes)});
}

bool conceal() {
    for (Hidden& region : hidden) std::memset(region.at, 0xff, region.bytes.size());
    return !hidden.empty();
}

void reveal() {
    for (const Hidden& region : hidden) std::memcpy(region.at, region.bytes.data(), region.bytes.size());
    hidden.clear();
}

void grid_wait() {
    self().waited = true;
    reveal();
}

void touch(const void* from) { (void)*static_cast<const volatile char*>(from); }

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

}  // namespace fusedmerge::sim
