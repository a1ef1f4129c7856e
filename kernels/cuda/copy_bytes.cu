#include <algorithm>

#include "kernels/cuda/copy_bytes.h"
#include "kernels/cuda/launch.cuh"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// Launch: blocks of kThreads, kUnroll vectors of 16 bytes in flight per thread. Moves 2 * bytes.
__global__ __launch_bounds__(kThreads) void CopyKernel(uint4* dst, const uint4* src, int64_t vectors, char* tail_dst,
                                                       const char* tail_src, int tail) {
  PdlTrigger();
  PdlWait();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < tail) tail_dst[i] = tail_src[i];
  for (; i < vectors; i += kUnroll * stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * stride < vectors) v[u] = src[i + u * stride];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * stride < vectors) dst[i + u * stride] = v[u];
    }
  }
}

}  // namespace

cudaError_t CopyBytes(void* dst, const void* src, int64_t bytes, cudaStream_t stream) {
  if (bytes <= 0) return cudaSuccess;
  const bool aligned = (reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src)) % 16 == 0;
  const int64_t vectors = aligned ? bytes / 16 : 0;
  const int64_t tail = bytes - 16 * vectors;
  if (tail > 1 << 20) return cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream);
  constexpr int64_t kMaxBlocks = 132 * 8;
  const int64_t threads = std::max((vectors + kUnroll - 1) / kUnroll, tail);
  int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (tail <= kMaxBlocks * kThreads) blocks = std::min(blocks, kMaxBlocks);
  return Launch(CopyKernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, 1, static_cast<uint4*>(dst),
                static_cast<const uint4*>(src), vectors, static_cast<char*>(dst) + 16 * vectors,
                static_cast<const char*>(src) + 16 * vectors, static_cast<int>(tail));
}

}  // namespace soloist::cuda
