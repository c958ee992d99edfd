// Threads of the CPU kernels: a pool that lives as long as the process, and the floating-point modes that kernels compute in.
#pragma once

#include <cfenv>
#include <functional>

namespace fusedmerge {

// Calls `work(worker)` on up to `threads` threads at once, the caller's among them as worker 0, and returns when all have returned. How
// many take part is left open (none may be had, or another call has them), so `work` takes pieces from a counter until none is left.
// `work` does not throw.
void run_on_threads(int threads, const std::function<void(int worker)>& work);

// Whatever rounding and flushing modes the process has set, this thread computes with the default ones until the end of the scope.
class DefaultFloatEnvironment {
  public:
    DefaultFloatEnvironment() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
    DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
    DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

  private:
    std::fenv_t saved_;
};

}  // namespace fusedmerge
