// Errors of the CUDA runtime as results.
#pragma once

#include <cuda_runtime_api.h>

#include "error.h"

namespace fusedmerge {

// The runtime's own record of the error is cleared, so that the caller's next check does not meet it.
inline fusedmerge_result check(cudaError_t error, const char* operation) noexcept {
    if (error == cudaSuccess) return FUSEDMERGE_OK;
    cudaGetLastError();
    return fail(FUSEDMERGE_CUDA_ERROR, "%s: CUDA: expected success, got %s (%s)", operation, cudaGetErrorName(error),
                cudaGetErrorString(error));
}

}  // namespace fusedmerge
