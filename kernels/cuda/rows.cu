// Embed and GatherRows: copies of whole rows by index.
//
// Launch: a block of 128 threads per output row, four loads of a thread in flight at a time. Bytes per row: read
// 2 * cols, written 4 * cols (Embed) or 2 * cols (GatherRows).
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/token_ops.h"
#include "kernels/cuda/token_vectors.cuh"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kUnroll = 4;

// What a thread moves at a time: 16 bytes of output.
struct Widen {  // 4 elements
  using To = float;
  using Packed = uint2;
  static constexpr int kElements = 4;
  __device__ __forceinline__ static Packed Load(const BFloat16* p) {
    Packed v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
  }
  __device__ __forceinline__ static void Store(float* p, Packed v) {
    Store16(p, {v.x << 16, v.x & 0xffff0000u, v.y << 16, v.y & 0xffff0000u});
  }
};
struct Copy {  // 8 elements
  using To = BFloat16;
  using Packed = uint4;
  static constexpr int kElements = kVector;
  __device__ __forceinline__ static Packed Load(const BFloat16* p) { return Load16(p); }
  __device__ __forceinline__ static void Store(BFloat16* p, Packed v) { Store16(p, v); }
};

// to[0, cols) = from[0, cols), by the block.
template <typename Move>
__device__ __forceinline__ void MoveRow(const BFloat16* from, typename Move::To* to, int cols) {
  constexpr int kStep = kThreads * Move::kElements;
  for (int begin = static_cast<int>(threadIdx.x) * Move::kElements; begin < cols; begin += kUnroll * kStep) {
    typename Move::Packed packed[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (begin + i * kStep < cols) packed[i] = Move::Load(from + begin + i * kStep);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (begin + i * kStep < cols) Move::Store(to + begin + i * kStep, packed[i]);
    }
  }
}

__global__ __launch_bounds__(kThreads) void EmbedKernel(const int32_t* token_ids, const int32_t* previous_tokens,
                                                        const BFloat16* table, int64_t table_stride, float* out,
                                                        int64_t out_stride, int cols) {
  PdlTrigger();
  PdlWait();
  const int64_t row = blockIdx.x;
  int32_t id = LoadInt(token_ids + row);
  if (id < 0) id = LoadInt(previous_tokens + (-1 - id));
  MoveRow<Widen>(table + id * table_stride, out + row * out_stride, cols);
}

__global__ __launch_bounds__(kThreads) void GatherRowsKernel(const BFloat16* x, int64_t x_stride, const int32_t* rows,
                                                             BFloat16* out, int64_t out_stride, int cols) {
  PdlTrigger();
  PdlWait();
  const int64_t row = blockIdx.x;
  MoveRow<Copy>(x + LoadInt(rows + row) * x_stride, out + row * out_stride, cols);
}

}  // namespace

cudaError_t Embed(const int32_t* token_ids, const int32_t* previous_tokens, const Tensor& table, const Tensor& out,
                  cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  if (!IsVectors(out, DType::kF32, out.cols) || !IsVectors(table, DType::kBF16, out.cols)) return cudaErrorInvalidValue;
  return Launch(EmbedKernel, dim3(static_cast<unsigned>(out.rows)), dim3(kThreads), 0, stream, 1, token_ids,
                previous_tokens, static_cast<const BFloat16*>(table.data), table.stride, static_cast<float*>(out.data),
                out.stride, static_cast<int>(out.cols));
}

cudaError_t GatherRows(const Tensor& x, const int32_t* rows, const Tensor& out, cudaStream_t stream) {
  if (out.rows == 0) return cudaSuccess;
  if (!IsVectors(out, DType::kBF16, out.cols) || !IsVectors(x, DType::kBF16, out.cols)) return cudaErrorInvalidValue;
  return Launch(GatherRowsKernel, dim3(static_cast<unsigned>(out.rows)), dim3(kThreads), 0, stream, 1,
                static_cast<const BFloat16*>(x.data), x.stride, rows, static_cast<BFloat16*>(out.data), out.stride,
                static_cast<int>(out.cols));
}

}  // namespace soloist::cuda
