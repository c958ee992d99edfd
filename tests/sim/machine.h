// The simulator's insides: fibers, warps, blocks and the launch that they belong to. simulator.cpp runs them; warp.cpp has the
// instructions at which a warp's lanes meet.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "simulator.h"

namespace fusedmerge::sim {

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
    bool waited = false;  // for earlier kernels
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
    unsigned values[kWarp];
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

// Bytes that a launch does not see before grid_wait.
struct Hidden {
    unsigned char* at;
    std::vector<unsigned char> bytes;
};

struct Machine {
    Entry entry = nullptr;
    const void* argument = nullptr;
    int num_blocks = 0;
    int num_threads = 0;
    bool waits = false;  // something is hidden
    Options options{};
    std::mt19937 random;
    std::string error;
    Fiber* current = nullptr;
    ucontext_t home;
    jmp_buf home_point;
    const void* home_stack = nullptr;
    size_t home_stack_bytes = 0;
};

extern thread_local Machine* machine;

inline Fiber& self() { return *machine->current; }

// The launch ends with this message, if it is the first.
void fail(const std::string& message);

// Lets others run until the thread is ready again.
void suspend();

void perform(const Copy& copy);

// Every lane's c += a b of a warp.
void multiply_warp(Warp& warp, bool bf16, int tensor_core);

// What `hide` named becomes NaN (false: nothing did); and comes back, once.
bool conceal();
void reveal();

constexpr const char* kNeverWaited = "ended without having waited for the kernel before";

}  // namespace fusedmerge::sim
