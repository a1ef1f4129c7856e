// RopeAppendKv: rotates q and k by position and appends k and v to the paged cache.
//
//   (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (d, d + head_dim / 2) of each head of q and k; v is copied
//
// Launch: a thread takes 8 pairs of one head (16 elements: two vectors); blocks of (head_dim / 16, heads), up to
// 256 threads; grid (row, heads / heads of a block). Bytes per row: 2 * (hq + 2 hkv) * head_dim read, 2 * hq * head_dim
// + 2 * hkv * head_dim * (2 or 1) written; the row's cosines and sines (4 * head_dim) come from the caches.
#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/token_ops.h"
#include "kernels/cuda/token_vectors.cuh"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxHeadDim = 512;

struct RopeParams {
  const BFloat16* qkv;
  int64_t qkv_stride;
  const int32_t* positions;
  const int32_t* slot_mapping;
  const float* cos_sin;
  int64_t cos_sin_stride;
  void* keys;
  void* values;
  BFloat16* q_out;
  int64_t q_out_stride;
  int q_heads;
  int kv_heads;
  int head_dim;
  int block_size;
};

__device__ __forceinline__ void Append(__nv_bfloat16* cache, int64_t at, const Floats& in) {
  Store16(cache + at, NarrowBf16(in));
}
__device__ __forceinline__ void Append(__nv_fp8_e4m3* cache, int64_t at, const Floats& in) {
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = __nv_cvt_float2_to_fp8x2({in[4 * i], in[4 * i + 1]}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({in[4 * i + 2], in[4 * i + 3]}, __NV_SATFINITE, __NV_E4M3);
    words[i] = low | high << 16;
  }
  *reinterpret_cast<uint2*>(cache + at) = {words[0], words[1]};
}

template <typename Cache>
__global__ __launch_bounds__(kThreads) void RopeAppendKvKernel(const RopeParams params) {
  PdlTrigger();
  const int half = params.head_dim / 2;
  const int head = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);  // of [q heads | k heads | v heads]
  const int d = static_cast<int>(threadIdx.x) * kVector;
  const int64_t row = blockIdx.x;
  PdlWait();
  if (head >= params.q_heads + 2 * params.kv_heads) return;

  const BFloat16* in = params.qkv + row * params.qkv_stride + head * params.head_dim + d;
  const int32_t position = LoadInt(params.positions + row);
  const int32_t cache_slot = LoadInt(params.slot_mapping + row);
  Floats a = WidenBf16(Load16(in));
  Floats b = WidenBf16(Load16(in + half));
  const bool is_value = head >= params.q_heads + params.kv_heads;
  if (!is_value) {
    const float* rotation = params.cos_sin + position * params.cos_sin_stride + d;
    const Floats cosine = LoadConstants(rotation);
    const Floats sine = LoadConstants(rotation + half);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float rotated = a[i] * cosine[i] - b[i] * sine[i];
      b[i] = b[i] * cosine[i] + a[i] * sine[i];
      a[i] = rotated;
    }
  }
  if (head < params.q_heads) {
    BFloat16* out = params.q_out + row * params.q_out_stride + head * params.head_dim + d;
    Store16(out, NarrowBf16(a));
    Store16(out + half, NarrowBf16(b));
    return;
  }
  if (cache_slot < 0) return;
  const int kv_head = (head - params.q_heads) % params.kv_heads;
  const int block = cache_slot / params.block_size;
  const int slot = cache_slot % params.block_size;
  const int64_t at =
      ((static_cast<int64_t>(block) * params.kv_heads + kv_head) * params.block_size + slot) * params.head_dim + d;
  Cache* cache = static_cast<Cache*>(is_value ? params.values : params.keys);
  Append(cache, at, a);
  Append(cache, at + half, b);
}

}  // namespace

cudaError_t RopeAppendKv(const Tensor& qkv, const int32_t* positions, const int32_t* slot_mapping,
                         const Tensor& cos_sin, const KvLayer& kv, const Tensor& q_out, cudaStream_t stream) {
  const int64_t n = qkv.rows;
  const int dim = kv.head_dim;
  if (n == 0) return cudaSuccess;
  if (dim < 16 || dim % 16 != 0 || dim > kMaxHeadDim || kv.num_kv_heads < 1 || kv.block_size < 1 ||
      q_out.cols % dim != 0 || !IsVectors(qkv, DType::kBF16, q_out.cols + 2 * kv.num_kv_heads * dim) ||
      !IsVectors(q_out, DType::kBF16, q_out.cols) || q_out.rows < n || !IsVectors(cos_sin, DType::kF32, dim) ||
      !Aligned16(kv.keys) || !Aligned16(kv.values) || (kv.dtype != DType::kBF16 && kv.dtype != DType::kF8E4M3)) {
    return cudaErrorInvalidValue;
  }
  const RopeParams params{static_cast<const BFloat16*>(qkv.data),
                          qkv.stride,
                          positions,
                          slot_mapping,
                          static_cast<const float*>(cos_sin.data),
                          cos_sin.stride,
                          kv.keys,
                          kv.values,
                          static_cast<BFloat16*>(q_out.data),
                          q_out.stride,
                          static_cast<int>(q_out.cols / dim),
                          kv.num_kv_heads,
                          dim,
                          kv.block_size};
  const int units = dim / (2 * kVector);
  const int heads = params.q_heads + 2 * kv.num_kv_heads;
  const int block_heads = std::min(kThreads / units, heads);
  const dim3 grid(static_cast<unsigned>(n), static_cast<unsigned>((heads + block_heads - 1) / block_heads));
  const auto kernel = kv.dtype == DType::kBF16 ? RopeAppendKvKernel<__nv_bfloat16> : RopeAppendKvKernel<__nv_fp8_e4m3>;
  return Launch(kernel, grid, dim3(static_cast<unsigned>(units), static_cast<unsigned>(block_heads)), 0, stream, 1,
                params);
}

}  // namespace soloist::cuda
