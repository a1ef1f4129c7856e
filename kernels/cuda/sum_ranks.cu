#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/sum_ranks.h"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 256;

// Launch: blocks of kThreads, one element a thread and pass, without programmatic dependent launch: what comes before
// is a collective. Moves (ranks + 1) * count * 4 bytes.
__global__ __launch_bounds__(kThreads) void SumRanksKernel(float* out, const float* gathered, int ranks,
                                                           int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    float sum = gathered[i];
    for (int rank = 1; rank < ranks; ++rank) sum += gathered[rank * count + i];
    out[i] = sum;
  }
}

}  // namespace

cudaError_t SumRanks(float* out, const float* gathered, int ranks, int64_t count, cudaStream_t stream) {
  if (count <= 0) return cudaSuccess;
  constexpr int64_t kMaxBlocks = 132 * 8;
  const auto blocks = static_cast<unsigned>(std::min(kMaxBlocks, (count + kThreads - 1) / kThreads));
  SumRanksKernel<<<blocks, kThreads, 0, stream>>>(out, gathered, ranks, count);
  return cudaGetLastError();
}

}  // namespace soloist::cuda
