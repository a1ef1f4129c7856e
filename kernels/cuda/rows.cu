// Embed and GatherRows: copies of whole rows by index.
//
// Launch: a block of 128 threads per output row, four vectors of a thread in flight at a time. Bytes per row: read
// 2 * cols, written 4 * cols (Embed) or 2 * cols (GatherRows).
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/token_ops.h"
#include "kernels/cuda/token_vectors.cuh"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kUnroll = 4;

__device__ __forceinline__ void StorePacked(float* to, uint4 packed) { StoreFloats(to, WidenBf16(packed)); }
__device__ __forceinline__ void StorePacked(BFloat16* to, uint4 packed) { Store16(to, packed); }

// to[0, cols) = from[0, cols), by the block.
template <typename To>
__device__ __forceinline__ void CopyRow(const BFloat16* from, To* to, int64_t cols) {
  for (int64_t begin = threadIdx.x * kVector; begin < cols; begin += kUnroll * kThreads * kVector) {
    uint4 packed[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t column = begin + i * kThreads * kVector;
      if (column < cols) packed[i] = Load16(from + column);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t column = begin + i * kThreads * kVector;
      if (column < cols) StorePacked(to + column, packed[i]);
    }
  }
}

__global__ __launch_bounds__(kThreads) void EmbedKernel(const int32_t* token_ids, const int32_t* previous_tokens,
                                                        const BFloat16* table, int64_t table_stride, float* out,
                                                        int64_t out_stride, int64_t cols) {
  PdlTrigger();
  PdlWait();
  const int64_t row = blockIdx.x;
  int32_t id = LoadInt(token_ids + row);
  if (id < 0) id = LoadInt(previous_tokens + (-1 - id));
  CopyRow(table + id * table_stride, out + row * out_stride, cols);
}

__global__ __launch_bounds__(kThreads) void GatherRowsKernel(const BFloat16* x, int64_t x_stride, const int32_t* rows,
                                                             BFloat16* out, int64_t out_stride, int64_t cols) {
  PdlTrigger();
  PdlWait();
  const int64_t row = blockIdx.x;
  CopyRow(x + LoadInt(rows + row) * x_stride, out + row * out_stride, cols);
}

}  // namespace

cudaError_t Embed(const int32_t* token_ids, const int32_t* previous_tokens, const Tensor& table, const Tensor& out,
                  cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  if (!IsVectors(out, DType::kF32, out.cols) || !IsVectors(table, DType::kBF16, out.cols)) return cudaErrorInvalidValue;
  return Launch(EmbedKernel, dim3(static_cast<unsigned>(out.rows)), dim3(kThreads), 0, stream, 1, token_ids,
                previous_tokens, static_cast<const BFloat16*>(table.data), table.stride, static_cast<float*>(out.data),
                out.stride, out.cols);
}

cudaError_t GatherRows(const Tensor& x, const int32_t* rows, const Tensor& out, cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  if (!IsVectors(out, DType::kBF16, out.cols) || !IsVectors(x, DType::kBF16, out.cols)) return cudaErrorInvalidValue;
  return Launch(GatherRowsKernel, dim3(static_cast<unsigned>(out.rows)), dim3(kThreads), 0, stream, 1,
                static_cast<const BFloat16*>(x.data), x.stride, rows, static_cast<BFloat16*>(out.data), out.stride,
                out.cols);
}

}  // namespace soloist::cuda
