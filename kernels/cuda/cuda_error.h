// CUDA errors as absl::Status: which call, with what, on which device.
#ifndef SOLOIST_KERNELS_CUDA_CUDA_ERROR_H_
#define SOLOIST_KERNELS_CUDA_CUDA_ERROR_H_

#include <cuda_runtime_api.h>

#include <string_view>

#include "absl/status/status.h"
#include "base/status.h"

namespace soloist::cuda {

// OK, or "cuda:DEVICE CALL: cudaErrorName (text)". Out of memory is RESOURCE_EXHAUSTED, the rest INTERNAL.
inline absl::Status CudaStatus(cudaError_t error, int device, std::string_view call) {
  if (error == cudaSuccess) return absl::OkStatus();
  const auto code =
      error == cudaErrorMemoryAllocation ? absl::StatusCode::kResourceExhausted : absl::StatusCode::kInternal;
  return {code, fmt::format("cuda:{} {}: {} ({})", device, call, cudaGetErrorName(error), cudaGetErrorString(error))};
}

}  // namespace soloist::cuda

// Returns from the enclosing function unless `expr` (a CUDA runtime call) succeeds.
#define RETURN_IF_CUDA_ERROR(device, expr) RETURN_IF_ERROR(::soloist::cuda::CudaStatus((expr), (device), #expr))

#endif  // SOLOIST_KERNELS_CUDA_CUDA_ERROR_H_
