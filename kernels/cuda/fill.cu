// FillUniform: dummy weights that are a function of (key, index) alone; see kernels/uniform.h.
//
// Launch: a thread takes 8 neighbouring columns of a row, one mix for every 4 aligned indices; grid-stride over all.
// Bytes: what is written. Bound by integer arithmetic for rows that cannot be written in vectors, by memory otherwise.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/token_ops.h"
#include "kernels/cuda/token_vectors.cuh"
#include "kernels/uniform.h"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ void StoreVector(float* p, const Floats& in) { StoreFloats(p, in); }
__device__ __forceinline__ void StoreVector(__nv_bfloat16* p, const Floats& in) { Store16(p, NarrowBf16(in)); }
__device__ __forceinline__ void StoreOne(float* p, float in) { *p = in; }
__device__ __forceinline__ void StoreOne(__nv_bfloat16* p, float in) { *p = __float2bfloat16_rn(in); }

template <typename Element>
__global__ __launch_bounds__(kThreads) void FillUniformKernel(uint64_t key, float scale, int64_t first_row,
                                                              Element* out, int64_t stride, int64_t rows, int64_t cols,
                                                              bool vectors) {
  PdlTrigger();
  PdlWait();
  const int64_t per_row = (cols + kVector - 1) / kVector;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * per_row; i += step) {
    const int64_t row = i / per_row;
    const int64_t column = i % per_row * kVector;
    const int64_t index = (first_row + row) * cols + column;
    Floats values;
    uint64_t draw = MixBits(key + static_cast<uint64_t>(index) / 4);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j > 0 && ((index + j) & 3) == 0) draw = MixBits(key + static_cast<uint64_t>(index + j) / 4);
      values[j] = UniformOfDraw(draw, index + j, scale);
    }
    Element* to = out + row * stride + column;
    if (vectors) {
      StoreVector(to, values);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (column + j < cols) StoreOne(to + j, values[j]);
      }
    }
  }
}

}  // namespace

cudaError_t FillUniform(uint64_t key, float scale, int64_t first_row, const Tensor& out, cudaStream_t stream) {
  if (out.rows == 0 || out.cols == 0) return cudaSuccess;
  if (out.data == nullptr || (out.dtype != DType::kF32 && out.dtype != DType::kBF16)) return cudaErrorInvalidValue;
  const bool vectors = IsVectors(out, out.dtype, out.cols);
  const int64_t items = out.rows * ((out.cols + kVector - 1) / kVector);
  const int64_t resident = static_cast<int64_t>(MultiprocessorCount()) * (2048 / kThreads);
  const int64_t blocks = std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, std::max<int64_t>(1, resident));
  const dim3 grid(static_cast<unsigned>(blocks));
  if (out.dtype == DType::kF32) {
    return Launch(FillUniformKernel<float>, grid, dim3(kThreads), 0, stream, 1, key, scale, first_row,
                  static_cast<float*>(out.data), out.stride, out.rows, out.cols, vectors);
  }
  return Launch(FillUniformKernel<__nv_bfloat16>, grid, dim3(kThreads), 0, stream, 1, key, scale, first_row,
                static_cast<__nv_bfloat16*>(out.data), out.stride, out.rows, out.cols, vectors);
}

}  // namespace soloist::cuda
