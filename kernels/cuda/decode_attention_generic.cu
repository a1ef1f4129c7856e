#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/cuda/decode_attention_finish.cuh"
#include "kernels/cuda/decode_attention_generic.cuh"
#include "kernels/cuda/launch.cuh"

namespace soloist::cuda::decode {
namespace {

constexpr int kBlock = 128;
constexpr int kWidth = 8;  // dimensions per thread

__device__ __forceinline__ void LoadWidth(float (&x)[kWidth], const __nv_bfloat16* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
  }
}
struct E4m3 {
  uint8_t bits;
};
__device__ __forceinline__ void LoadWidth(float (&x)[kWidth], const E4m3* from) {
  const uint2 bits = *reinterpret_cast<const uint2*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = Widen((i < 2 ? bits.x : bits.y) >> (i % 2 * 16));
    const float2 y = __half22float2(reinterpret_cast<const __half2&>(two));
    x[2 * i] = y.x;
    x[2 * i + 1] = y.y;
  }
}

// Block (h, row): head h of a row. `lanes` threads (a power of two) take one key together, 8 dimensions each, so that a
// warp has 32 / lanes streams of keys; each stream keeps its own sums, and they are added in order at the end.
// Launch: [num_heads, num_rows] x 128 threads. Moves keys and values once per head.
template <typename T>
__global__ __launch_bounds__(kBlock) void GenericKernel(const DecodeAttentionArgs args, int lanes) {
  extern __shared__ float shared[];  // [kBlock][kWidth + 2]
  PdlTrigger();
  PdlWait();
  const int head = blockIdx.x;
  const int row = blockIdx.y;
  const int dim = args.kv.head_dim;
  const int thread = threadIdx.x;
  const int lane = thread % lanes;
  const int stream = thread / lanes;
  const int streams = kBlock / lanes;
  const int d = lane * kWidth;
  const bool active = d < dim;
  const int kv_head = head / (args.num_heads / args.kv.num_kv_heads);
  const int64_t bound = args.max_len;
  const int len = static_cast<int>(args.kv_lens[row] < bound ? args.kv_lens[row] : bound);
  const int begin = args.sliding_window > 0 ? max(0, len - args.sliding_window) : 0;
  const int32_t* table = args.block_tables + static_cast<int64_t>(row) * args.max_blocks;
  float q[kWidth] = {};
  if (active) {
    LoadWidth(
        q, reinterpret_cast<const __nv_bfloat16*>(args.q) + row * args.q_stride + static_cast<int64_t>(head) * dim + d);
  }
  const float scale_log2 = args.scale * static_cast<float>(M_LOG2E);

  Sums<kWidth> sums;
  constexpr int kBatch = 4;  // keys on their way at a time
  for (int base = begin; base < len; base += streams * kBatch) {
    float ms[kBatch], ls[kBatch], os[kBatch][kWidth] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int key = base + i * streams + stream;
      float k[kWidth] = {};
      if (key < len && active) {
        const int64_t block = table[key / args.kv.block_size];
        const int64_t at =
            ((block * args.kv.num_kv_heads + kv_head) * args.kv.block_size + key % args.kv.block_size) * dim + d;
        LoadWidth(k, static_cast<const T*>(args.kv.keys) + at);
        LoadWidth(os[i], static_cast<const T*>(args.kv.values) + at);
      }
      float dot = 0;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) dot = fmaf(q[w], k[w], dot);
      for (int x = lanes / 2; x > 0; x /= 2) dot += __shfl_xor_sync(0xffffffff, dot, x);
      ms[i] = key < len ? dot * scale_log2 : -INFINITY;
      ls[i] = key < len ? 1 : 0;
    }
    if (base + stream < len) sums.Add(ms, ls, os);
  }

  float* mine = shared + thread * (kWidth + 2);
  mine[kWidth] = sums.m;
  mine[kWidth + 1] = sums.l;
#pragma unroll
  for (int w = 0; w < kWidth; ++w) mine[w] = sums.o[w];
  __syncthreads();
  if (stream > 0 || !active) return;
  for (int other = 1; other < streams && begin + other < len; ++other) {
    const float* theirs = shared + (other * lanes + lane) * (kWidth + 2);
    const float ms[1] = {theirs[kWidth]};
    const float ls[1] = {theirs[kWidth + 1]};
    float os[1][kWidth];
#pragma unroll
    for (int w = 0; w < kWidth; ++w) os[0][w] = theirs[w];
    sums.Add(ms, ls, os);
  }
  const float factor = len > 0 ? 1 / sums.l : 0;
  StoreOut(reinterpret_cast<__nv_bfloat16*>(args.out) + row * args.out_stride + static_cast<int64_t>(head) * dim + d,
           sums.o, factor);
}

}  // namespace

cudaError_t LaunchGeneric(const DecodeAttentionArgs& args, cudaStream_t stream) {
  const int lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(args.kv.head_dim / kWidth)));
  const auto kernel = args.kv.dtype == DType::kF8E4M3 ? GenericKernel<E4m3> : GenericKernel<__nv_bfloat16>;
  return Launch(kernel, dim3(args.num_heads, args.num_rows), dim3(kBlock), kBlock * (kWidth + 2) * sizeof(float),
                stream, 1, args, lanes);
}

}  // namespace soloist::cuda::decode
