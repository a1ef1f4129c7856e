// Vectors of 8 activations (16 bytes of bf16, 32 bytes of float32), the unit of all token ops, and sums over a block.
// Included by .cu files only.
#ifndef SOLOIST_KERNELS_CUDA_TOKEN_VECTORS_CUH_
#define SOLOIST_KERNELS_CUDA_TOKEN_VECTORS_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/tensor.h"

namespace soloist::cuda {

constexpr int kVector = 8;             // activations of one vector
constexpr int64_t kMaxHidden = 16384;  // of the ops that keep a row in registers
constexpr unsigned kFullWarp = 0xffffffffu;

// Loads of what earlier kernels wrote. Volatile and clobbering, so that the compiler keeps them behind PdlWait() and
// never turns them into reads through the non-coherent path. They bypass L1: every element is read once.
__device__ __forceinline__ uint4 Load16(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ int32_t LoadInt(const int32_t* p) {
  int32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float LoadFloat(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void Store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// 8 float32 in registers.
struct Floats {
  float v[kVector];
  __device__ __forceinline__ float& operator[](int i) { return v[i]; }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

__device__ __forceinline__ Floats WidenBf16(uint4 packed) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  Floats out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return out;
}
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint4 NarrowBf16(const Floats& in) {
  return {PackBf16(in[0], in[1]), PackBf16(in[2], in[3]), PackBf16(in[4], in[5]), PackBf16(in[6], in[7])};
}
__device__ __forceinline__ Floats FromWords(uint4 low, uint4 high) {
  return {{__uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(low.z), __uint_as_float(low.w),
           __uint_as_float(high.x), __uint_as_float(high.y), __uint_as_float(high.z), __uint_as_float(high.w)}};
}
__device__ __forceinline__ Floats LoadFloats(const float* p) { return FromWords(Load16(p), Load16(p + 4)); }
// Of constants (weights, tables): through the read-only path. Volatile, so that the compiler does not move it behind
// PdlWait(). Zeros unless `exists`.
__device__ __forceinline__ uint4 LoadConstant16(const void* p, bool exists) {
  uint4 v = {};
  asm volatile("{.reg .pred exists;\nsetp.ne.u32 exists, %5, 0;\n@exists ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(p), "r"(static_cast<uint32_t>(exists)));
  return v;
}
__device__ __forceinline__ Floats LoadConstants(const float* p, bool exists = true) {
  return FromWords(LoadConstant16(p, exists), LoadConstant16(p + 4, exists));
}
__device__ __forceinline__ void StoreFloats(float* p, const Floats& in) {
  Store16(p, {__float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]), __float_as_uint(in[3])});
  Store16(p + 4, {__float_as_uint(in[4]), __float_as_uint(in[5]), __float_as_uint(in[6]), __float_as_uint(in[7])});
}

// Sums over a block of up to 16 warps, in a fixed order; all threads get them.
struct BlockSums {
  // Two sets in turn, so that one barrier a sum is enough. The places of warps that do not exist stay zero.
  float4 partials[2][4];

  // By all threads, before the first Sum; needs no barrier.
  __device__ __forceinline__ void Init() {
    if (threadIdx.x < 32 && threadIdx.x % 16 >= blockDim.x / 32) reinterpret_cast<float*>(partials)[threadIdx.x] = 0;
  }
  // `set`: 0 and 1 in turn.
  __device__ __forceinline__ float Sum(float value, int set) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
    if (threadIdx.x % 32 == 0) reinterpret_cast<float*>(partials[set])[threadIdx.x / 32] = value;
    __syncthreads();
    const float4 a = partials[set][0], b = partials[set][1], c = partials[set][2], d = partials[set][3];
    return (((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w))) +
           (((c.x + c.y) + (c.z + c.w)) + ((d.x + d.y) + (d.z + d.w)));
  }
};

// Host side.

inline bool Aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether rows of `t` can be accessed in vectors: type, width, alignment and stride.
inline bool IsVectors(const Tensor& t, DType dtype, int64_t cols) {
  return t.data != nullptr && t.dtype == dtype && t.cols == cols && cols > 0 && cols % kVector == 0 &&
         Aligned16(t.data) && t.stride * DTypeBytes(dtype) % 16 == 0;
}
inline bool IsPlain(const Tensor& t, DType dtype, int64_t rows, int64_t cols) {
  return t.data != nullptr && t.dtype == dtype && t.rows == rows && t.cols == cols;
}

// Streaming multiprocessors of the current device; 0 on an error.
inline int MultiprocessorCount() {
  int device = 0;
  int count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 0;
  }
  return count;
}

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_TOKEN_VECTORS_CUH_
