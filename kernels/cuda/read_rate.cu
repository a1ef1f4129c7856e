#include "kernels/cuda/rates.h"

namespace soloist::cuda {
namespace {

// Launch: kReadBlocks x 512 threads; 8 independent 16-byte loads in flight per thread. Moves `count` * 16 bytes.
__global__ void __launch_bounds__(512) ReadKernel(const uint4* __restrict__ data, int64_t count, uint32_t* sink) {
  constexpr int kUnroll = 8;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  uint32_t sum = 0;
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = __ldcs(data + i + u * stride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  for (; i < count; i += stride) {
    const uint4 v = __ldcs(data + i);
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  sum = __reduce_xor_sync(0xffffffff, sum);
  if (threadIdx.x == 0) sink[blockIdx.x] = sum;
}

}  // namespace

cudaError_t LaunchRead(const void* data, int64_t bytes, uint32_t* sink, cudaStream_t stream) {
  ReadKernel<<<kReadBlocks, 512, 0, stream>>>(static_cast<const uint4*>(data), bytes / 16, sink);
  return cudaGetLastError();
}

}  // namespace soloist::cuda
