#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fusedmerge {
namespace {

// Sleeping and waking take tens of microseconds, as long as many a call: who waits looks on for a while first.
template <class F>
bool spin_until(const F& holds) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::microseconds(100);
    do {
        for (int i = 0; i < 64; ++i) {
            if (holds()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    } while (Clock::now() < end);
    return false;
}

class Pool {
  public:
    // False: another call has the threads.
    bool run(int threads, const std::function<void(int)>& work) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) return false;
        start(threads - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            wanted_ = threads - 1;
            ++call_;
        }
        wake_.notify_all();
        work(0);
        const auto is_done = [this] { return running_ == 0; };
        std::unique_lock<std::mutex> lock(mutex_);
        work_ = nullptr;  // who has not begun finds nothing to do
        if (is_done()) return true;
        lock.unlock();
        spin_until(is_done);
        lock.lock();
        done_.wait(lock, is_done);
        return true;
    }

  private:
    void start(int count) {
        try {
            for (; started_ < count; ++started_) std::thread(&Pool::serve, this, started_ + 1).detach();
        } catch (const std::system_error&) {  // no more threads to be had: those that run do all the work
        }
    }

    void serve(int worker) {
        unsigned seen = 0;
        const auto is_called = [&] { return call_ != seen; };
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            lock.unlock();
            spin_until(is_called);
            lock.lock();
            wake_.wait(lock, is_called);
            seen = call_;
            if (work_ == nullptr || worker > wanted_) continue;
            const std::function<void(int)>& work = *work_;
            ++running_;
            lock.unlock();
            work(worker);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_;
    std::mutex mutex_;  // of what follows but started_, which busy_ guards; the atomic ones are read without it, too
    std::condition_variable wake_, done_;
    const std::function<void(int)>* work_ = nullptr;
    int wanted_ = 0;
    std::atomic<unsigned> call_{0};
    std::atomic<int> running_{0};
    int started_ = 0;
};

// Never destroyed, since its threads never end; a forked child has none of them, and begins with a new one.
Pool* pool = nullptr;

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    });
    return *pool;
}

}  // namespace

void run_on_threads(int threads, const std::function<void(int)>& work) {
    if (threads < 2 || !the_pool().run(threads, work)) work(0);
}

}  // namespace fusedmerge
