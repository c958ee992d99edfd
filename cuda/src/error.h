// How the C API reports what went wrong: a code to the caller, a message to this thread.
#pragma once

#include "fusedmerge/fusedmerge.h"

namespace fusedmerge {

// Keeps the formatted message for fusedmerge_last_error() and returns `result`.
[[gnu::format(printf, 2, 3)]] fusedmerge_result fail(fusedmerge_result result, const char* format, ...) noexcept;

}  // namespace fusedmerge
