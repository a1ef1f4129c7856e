// The tensor core kernel of decode attention.
//
// One block: a warp that feeds tiles of 64 or 128 keys and their values into a ring of stages (Producer), four warps
// that take a quarter of every tile each (Consumer), and two that turn their sums into results (Finisher). With the
// keys as the left operand, S^T [16 keys, 8 queries] = K Q^T and O^T [head_dim, 8 queries] += V^T P^T; the queries are
// the heads that share the kv head, padded to 8 (kQueryTiles = 1) or 16 (2) columns that cost nothing here, where
// memory is the limit. A consumer keeps its own maxima and sums until the end of the item.
//
// Launch: one dimension, kThreads threads, one or two blocks per multiprocessor.
//
// Bytes moved: keys and values once, q and out once, and for rows of several chunks 4 * head_dim bytes per head and
// chunk, written and read.
#ifndef SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_KERNEL_CUH_
#define SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_KERNEL_CUH_

#include <type_traits>

#include "kernels/cuda/decode_attention_finish.cuh"
#include "kernels/cuda/decode_attention_items.cuh"
#include "kernels/cuda/decode_attention_producer.cuh"
#include "kernels/cuda/decode_attention_ptx.cuh"
#include "kernels/cuda/launch.cuh"

namespace soloist::cuda::decode {

// One consumer warp. Fragments as in the PTX manual: lane = 4 * i + j holds rows i and i + 8 and columns 2j, 2j + 1 of
// an accumulator. FP8 keys and values become halves (exactly), q becomes half after a scaling by a power of two.
template <bool kFp8, int kHeadDim, int kQueryTiles>
struct Consumer {
  using Operand = std::conditional_t<kFp8, __half, __nv_bfloat16>;
  static constexpr int kElementBytes = kFp8 ? 1 : 2;
  static constexpr int kTileKeys = TileKeys(kHeadDim, kElementBytes);
  static constexpr int kWarpKeys = kTileKeys / kConsumerWarps;
  static constexpr int kUnits = kWarpKeys / 16;  // what a matrix product takes
  static constexpr int kRowBytes = kHeadDim * kElementBytes < 128 ? kHeadDim * kElementBytes : 128;
  static constexpr int kLoads = kHeadDim * kElementBytes / 32;  // ldmatrix per 16 keys
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kMaxExponent = 253;  // whose reciprocal is a normal float

  int lane;
  int warp;
  uint32_t q[kQueryTiles][kSteps][2];
  float factor[kQueryTiles][2];  // of S, per column
  float m[kQueryTiles][2];
  float l[kQueryTiles][2];  // of this lane's keys
  float o[kQueryTiles][kSteps][4];

  // Byte offset in a tile of the 16 bytes that this lane names to the n-th matrix load: key `row`, 16-byte piece
  // 2n + odd, swizzled by the copy engine.
  __device__ __forceinline__ uint32_t Offset(int row, int odd, int n) const {
    const int piece = 2 * n + odd;
    const int part = piece / (kRowBytes / 16);
    const int swizzle = kRowBytes == 128 ? lane & 7 : (lane >> 1) & 3;
    return part * kTileKeys * kRowBytes + row * kRowBytes + (((piece % (kRowBytes / 16)) ^ swizzle) << 4);
  }

  // q_rows: [group, kHeadDim] in shared memory.
  __device__ __forceinline__ void Start(const uint32_t* q_rows, int group, float scale_log2) {
    const int j = lane % 4;
#pragma unroll
    for (int t = 0; t < kQueryTiles; ++t) {
      const int head = t * 8 + lane / 4;
      float max = 0;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pair = s * 8 + (kFp8 ? 2 * j + half : j + 4 * half);
          q[t][s][half] = head < group ? q_rows[head * (kHeadDim / 2) + pair] : 0;
          if constexpr (kFp8) {
            const float2 x = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(q[t][s][half]));
            max = fmaxf(max, fmaxf(fabsf(x.x), fabsf(x.y)));
          }
        }
      }
      factor[t][0] = factor[t][1] = scale_log2;
      if constexpr (kFp8) {
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
        // 2^e <= max < 2^(e + 1); the scaled row is below 2.
        const int exponent = max > 0 ? min(kMaxExponent, (__float_as_int(max) >> 23)) : 127;
        const float down = __int_as_float((254 - exponent) << 23);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 x = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(q[t][s][half]));
            q[t][s][half] = Pack(x.x * down, x.y * down, __half());
          }
        }
        const float up = scale_log2 * __int_as_float(exponent << 23);
        factor[t][0] = __shfl_sync(kAllLanes, up, 8 * j);
        factor[t][1] = __shfl_sync(kAllLanes, up, 8 * j + 4);
      }
      m[t][0] = m[t][1] = -INFINITY;
      l[t][0] = l[t][1] = 0;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int k = 0; k < 4; ++k) o[t][s][k] = 0;
      }
    }
  }

  // P^T of this warp's keys, of which [begin, end) count; not called with none.
  __device__ __forceinline__ void Keys(uint32_t tile, int begin, int end, uint32_t (&p)[kUnits][kQueryTiles][2]) {
    float s[kUnits][kQueryTiles][4];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float sum[kQueryTiles][2][4] = {};  // two of them, for shorter chains
      const int row = (warp * kUnits + u) * 16 + lane % 16;
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        uint32_t a[4];
        LoadMatrix(a, tile + Offset(row, lane / 16, n));
#pragma unroll
        for (int t = 0; t < kQueryTiles; ++t) {
          if constexpr (kFp8) {
            MultiplyAdd(sum[t][0], Widen(a[0]), Widen(a[1]), Widen(a[0] >> 16), Widen(a[1] >> 16), q[t][2 * n],
                        Operand());
            MultiplyAdd(sum[t][1], Widen(a[2]), Widen(a[3]), Widen(a[2] >> 16), Widen(a[3] >> 16), q[t][2 * n + 1],
                        Operand());
          } else {
            MultiplyAdd(sum[t][n % 2], a[0], a[1], a[2], a[3], q[t][n], Operand());
          }
        }
      }
      const int key = u * 16 + lane / 4;
      const bool low = key >= begin && key < end;
      const bool high = key + 8 >= begin && key + 8 < end;
#pragma unroll
      for (int t = 0; t < kQueryTiles; ++t) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          s[u][t][k] = (k < 2 ? low : high) ? (sum[t][0][k] + sum[t][1][k]) * factor[t][k % 2] : -INFINITY;
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kQueryTiles; ++t) {
      float max[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int k = 0; k < 4; ++k) max[k % 2] = fmaxf(max[k % 2], s[u][t][k]);
      }
#pragma unroll
      for (int d = 4; d < 32; d *= 2) {
        max[0] = fmaxf(max[0], __shfl_xor_sync(kAllLanes, max[0], d));
        max[1] = fmaxf(max[1], __shfl_xor_sync(kAllLanes, max[1], d));
      }
      if (__any_sync(kAllLanes, max[0] > m[t][0] || max[1] > m[t][1])) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          max[c] = fmaxf(max[c], m[t][c]);
          const float old = Exp2(m[t][c] - max[c]);
          m[t][c] = max[c];
          l[t][c] *= old;
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            o[t][step][c] *= old;
            o[t][step][c + 2] *= old;
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          s[u][t][k] = Exp2(s[u][t][k] - m[t][k % 2]);
          l[t][k % 2] += s[u][t][k];
        }
        p[u][t][0] = Transpose(Pack(s[u][t][0], s[u][t][1], Operand()));
        p[u][t][1] = Transpose(Pack(s[u][t][2], s[u][t][3], Operand()));
      }
    }
  }

  // Zeroes the values of this warp's keys outside [begin, end): whatever lies there must not meet the product.
  __device__ __forceinline__ void ClearValues(unsigned char* tile, int begin, int end) const {
    constexpr int kPieces = kHeadDim * kElementBytes / 16;
    for (int i = lane; i < kWarpKeys * kPieces; i += 32) {
      const int key = i / kPieces;
      const int piece = i % kPieces;
      if (key >= begin && key < end) continue;
      const int part = piece / (kRowBytes / 16);
      // The order of the pieces within a row does not matter.
      *reinterpret_cast<uint4*>(tile + (part * kTileKeys + warp * kWarpKeys + key) * kRowBytes +
                                piece % (kRowBytes / 16) * 16) = make_uint4(0, 0, 0, 0);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
  }

  __device__ __forceinline__ void Values(uint32_t tile, const uint32_t (&p)[kUnits][kQueryTiles][2]) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int row = (warp * kUnits + u) * 16 + lane % 8 + lane / 16 * 8;
#pragma unroll
      for (int n = 0; n < kLoads; ++n) {
        uint32_t a[4];
        LoadMatrixTransposed(a, tile + Offset(row, lane / 8 % 2, n));
        if constexpr (kFp8) {
          // Bytes of a register: dimensions 2i, 2i + 1 of one key, then of the next.
#pragma unroll
          for (int k = 0; k < 4; ++k) a[k] = __byte_perm(a[k], 0, 0x3120);
        }
#pragma unroll
        for (int t = 0; t < kQueryTiles; ++t) {
          if constexpr (kFp8) {
            MultiplyAdd(o[t][2 * n], Widen(a[0]), Widen(a[0] >> 16), Widen(a[2]), Widen(a[2] >> 16), p[u][t],
                        Operand());
            MultiplyAdd(o[t][2 * n + 1], Widen(a[1]), Widen(a[1] >> 16), Widen(a[3]), Widen(a[3] >> 16), p[u][t],
                        Operand());
          } else {
            MultiplyAdd(o[t][n], a[0], a[1], a[2], a[3], p[u][t], Operand());
          }
        }
      }
    }
  }

  // The warp's sums to o_out [group][stride] and ml_out [group] in shared memory.
  __device__ __forceinline__ void Store(float* o_out, int stride, float2* ml_out, int group) {
    const int i = lane / 4;
#pragma unroll
    for (int t = 0; t < kQueryTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = l[t][c];
#pragma unroll
        for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
        const int head = t * 8 + 2 * (lane % 4) + c;
        if (head >= group) continue;
        if (i == 0) ml_out[head] = make_float2(m[t][c], sum);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          float* to = o_out + head * stride + s * 16;
          to[kFp8 ? 2 * i : i] = o[t][s][c];
          to[kFp8 ? 2 * i + 1 : i + 8] = o[t][s][c + 2];
        }
      }
    }
  }
};

template <bool kFp8, int kHeadDim, int kQueryTiles>
__device__ __forceinline__ void Consume(const Params& p, const SharedLayout& layout, unsigned char* shared) {
  using Warp = Consumer<kFp8, kHeadDim, kQueryTiles>;
  Warp consumer;
  consumer.lane = threadIdx.x % 32;
  consumer.warp = threadIdx.x / 32;
  const uint32_t base = SharedAddress(shared);
  int stage = 0;
  uint32_t phase = 0;
  int result = 0;
  uint32_t result_phase = 1;
  while (true) {
    BarrierWait(base + layout.stage_barriers + stage * kStageBarriers, phase);
    const Item item = reinterpret_cast<const Item*>(shared + layout.items)[stage];
    if (item.row >= 0) {
      consumer.Start(reinterpret_cast<const uint32_t*>(shared + layout.q + stage * layout.q_bytes), p.group,
                     p.scale_log2);
      for (int tile = item.begin / Warp::kTileKeys; tile * Warp::kTileKeys < item.end; ++tile) {
        const uint32_t full = base + layout.stage_barriers + stage * kStageBarriers;
        const uint32_t keys = stage * 2 * layout.tile_bytes;
        const int first = tile * Warp::kTileKeys + consumer.warp * Warp::kWarpKeys;
        const int begin = max(item.begin - first, 0);
        const int end = min(item.end - first, Warp::kWarpKeys);
        uint32_t probabilities[Warp::kUnits][kQueryTiles][2];
        BarrierWait(full, phase);
        if (begin < end) consumer.Keys(base + keys, begin, end, probabilities);
        __syncwarp();
        if (consumer.lane == 0) BarrierArrive(full + kEmptyKeys);
        BarrierWait(full + kFullValues, phase);
        if (begin < end) {
          if (begin > 0 || end < Warp::kWarpKeys) consumer.ClearValues(shared + keys + layout.tile_bytes, begin, end);
          consumer.Values(base + keys + layout.tile_bytes, probabilities);
        }
        __syncwarp();
        if (consumer.lane == 0) BarrierArrive(full + kEmptyValues);
        if (++stage == p.stages) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
    const uint32_t full = base + layout.result_barriers + result * kResultBarriers;
    BarrierWait(full + kEmptyResult, result_phase);
    if (item.row >= 0) {
      const int o_stride = layout.o_stride;
      consumer.Store(
          reinterpret_cast<float*>(shared + layout.o + result * layout.o_bytes) + consumer.warp * p.group * o_stride,
          o_stride,
          reinterpret_cast<float2*>(shared + layout.ml) + (result * kConsumerWarps + consumer.warp) * kMaxGroup,
          p.group);
    }
    if (threadIdx.x == 0) reinterpret_cast<Item*>(shared + layout.result_items)[result] = item;
    __syncwarp();
    if (consumer.lane == 0) BarrierArrive(full);
    if (item.row < 0) return;
    if (++result == layout.results) {
      result = 0;
      result_phase ^= 1;
    }
  }
}

template <bool kFp8, int kHeadDim, int kQueryTiles>
__global__ __launch_bounds__(kThreads,
                             kQueryTiles == 1 ? 2 : 1) void DecodeAttentionKernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const SharedLayout layout(p.stages, p.group, kHeadDim, kFp8 ? 1 : 2, p.num_rows);
  const uint32_t base = SharedAddress(shared);
  if (threadIdx.x == 0) {
    PrefetchMap(&p.keys);
    PrefetchMap(&p.values);
    for (int stage = 0; stage < p.stages; ++stage) {
      const uint32_t full = base + layout.stage_barriers + stage * kStageBarriers;
      BarrierInit(full, 1);
      BarrierInit(full + kFullValues, 1);
      BarrierInit(full + kEmptyKeys, kConsumerWarps);
      BarrierInit(full + kEmptyValues, kConsumerWarps);
    }
    for (int result = 0; result < layout.results; ++result) {
      const uint32_t full = base + layout.result_barriers + result * kResultBarriers;
      BarrierInit(full, kConsumerWarps);
      BarrierInit(full + kEmptyResult, kFinisherWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  PdlTrigger();
  __syncthreads();
  if (threadIdx.x < kConsumers) {
    PdlWait();
    Consume<kFp8, kHeadDim, kQueryTiles>(p, layout, shared);
  } else if (threadIdx.x < kConsumers + kFinishers) {
    const Finisher<kHeadDim> finisher(p, layout, shared);
    PdlWait();
    finisher.ClearEmptyRows();
    finisher.Run();
  } else {
    Producer<kHeadDim, kFp8 ? 1 : 2> producer(p, layout, shared);
    if (p.early_tables) {
      producer.Plan();
      if (p.prefetch) producer.Prefetch();
      PdlWait();
    } else {
      PdlWait();
      producer.Plan();
    }
    producer.Run();
  }
}

}  // namespace soloist::cuda::decode

#endif  // SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_KERNEL_CUH_
