// Copies within device memory as a kernel: unlike a copy node it takes part in programmatic dependent launch.
#ifndef SOLOIST_KERNELS_CUDA_COPY_BYTES_H_
#define SOLOIST_KERNELS_CUDA_COPY_BYTES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace soloist::cuda {

// dst[0, bytes) = src[0, bytes); no overlap. 16 bytes at a time where both are aligned so, the rest byte by byte.
cudaError_t CopyBytes(void* dst, const void* src, int64_t bytes, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_COPY_BYTES_H_
