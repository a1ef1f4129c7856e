// The sum of what all ranks brought, in rank order: for a communicator whose every rank must get the same bits.
#ifndef SOLOIST_KERNELS_CUDA_SUM_RANKS_H_
#define SOLOIST_KERNELS_CUDA_SUM_RANKS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace soloist::cuda {

// out[i] = ((gathered[0][i] + gathered[1][i]) + gathered[2][i]) + ..; gathered F32 [ranks, count], out F32 [count],
// apart from each other. count <= 0: nothing.
cudaError_t SumRanks(float* out, const float* gathered, int ranks, int64_t count, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_SUM_RANKS_H_
