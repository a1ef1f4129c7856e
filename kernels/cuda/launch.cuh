// How this backend launches kernels: with programmatic dependent launch, so that a kernel starts while the one before
// it drains. Included by .cu files only.
//
// The rule that makes this safe: every kernel calls PdlWait() in every thread block before it reads what an earlier
// kernel of the stream wrote (or writes what one may still read), also where it would not need to. The kernel before it
// has then ended, and, since that one waited in turn, so have all before. What may come before PdlWait: reads of
// weights and tables that no kernel of a step writes, and prefetches of them. PdlTrigger() lets the next kernel start
// early; call it as soon as the block's own share of the device's resources allows.
#ifndef SOLOIST_KERNELS_CUDA_LAUNCH_CUH_
#define SOLOIST_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace soloist::cuda {

__device__ __forceinline__ void PdlWait() { cudaGridDependencySynchronize(); }
__device__ __forceinline__ void PdlTrigger() { cudaTriggerProgrammaticLaunchCompletion(); }

// Launches kernel<<<grid, block, shared_bytes, stream>>>(args...) with programmatic dependent launch; `cluster` > 1:
// blocks of a cluster along x. More than 48 KB of shared memory must have been allowed before (cudaFuncSetAttribute).
template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   unsigned cluster, Args&&... args) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_LAUNCH_CUH_
