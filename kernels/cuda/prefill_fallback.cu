// Flash attention (Dao 2023) on mma.sync: 64 query rows of one head per block, keys and values in tiles that start at
// multiples of kKeys positions. A row's result is a function of its own query and of keys and values of [0, position]
// alone: the tiles are at absolute positions and walked upwards, each row keeps its own maximum and sum, and a tile in
// which a row sees nothing changes nothing (factor 1, products 0).
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/prefill_fallback.h"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // 16 per warp
constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ void LoadMatrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

// c += a * b: [16, 16] by [16, 8].
__device__ __forceinline__ void Multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// kBytes from global to shared memory, asynchronously; zeros if not `valid`.
template <int kBytes>
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, bool valid) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid ? 8 : 0));
  }
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void WaitForAllButLastCopies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t Pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Four e4m3 values to bfloat16, exactly.
__device__ __forceinline__ uint2 Widen(uint32_t quad) {
  __nv_fp8x4_e4m3 packed;
  packed.__x = quad;
  const float4 f = static_cast<float4>(packed);
  return {__byte_perm(__float_as_uint(f.x), __float_as_uint(f.y), 0x7632),
          __byte_perm(__float_as_uint(f.z), __float_as_uint(f.w), 0x7632)};
}

// kDim: head_dim rounded up; the columns in between are zeros.
template <int kDim, typename Kv>
struct Shared {
  static constexpr bool kFp8 = !std::is_same_v<Kv, __nv_bfloat16>;
  static constexpr int kKeys = kDim > 128 ? 32 : 64;
  static constexpr int kStages = kFp8 ? 1 : 2;
  static constexpr int kStride = kDim + 8;  // ldmatrix then finds the 8 rows of a matrix in different banks

  __nv_bfloat16 keys[kStages][kKeys][kStride];
  __nv_bfloat16 values[kStages][kKeys][kStride];
  alignas(16) uint8_t raw[kFp8 ? 2 : 1][kFp8 ? 2 : 1][kFp8 ? kKeys : 1][kDim];  // [stage][keys, values]
  int64_t offsets[2][kKeys];  // element of the caches where a key of the tile begins; -1: behind the last
};

template <int kDim, typename Kv>
__global__ void __launch_bounds__(kThreads) AttentionKernel(const __grid_constant__ PrefillFallbackArgs args) {
  using Smem = Shared<kDim, Kv>;
  constexpr bool kFp8 = Smem::kFp8;
  constexpr int kKeys = Smem::kKeys, kStride = Smem::kStride;
  extern __shared__ __align__(16) char shared_bytes[];
  Smem& shared = *reinterpret_cast<Smem*>(shared_bytes);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  PdlWait();
  PdlTrigger();
  const int sequence = blockIdx.z, head = blockIdx.y;
  const int first_row = (gridDim.x - 1 - blockIdx.x) * kRows;  // the longest rows first
  const int begin = args.query_starts[sequence];
  const int rows = args.query_starts[sequence + 1] - begin, seq_len = args.seq_lens[sequence];
  if (first_row >= rows || seq_len == 0) return;

  const int dim = args.head_dim, block_size = args.block_size;
  const int kv_head = head / (args.num_heads / args.num_kv_heads);
  const int32_t* table = args.block_tables + static_cast<int64_t>(sequence) * args.max_blocks;
  const int first_position = seq_len - rows + first_row;
  const int end = min(seq_len, first_position + kRows);  // of the keys that some row sees
  const int oldest = args.sliding_window > 0 ? max(0, first_position - args.sliding_window + 1) : 0;
  const int first_tile = oldest / kKeys, last_tile = (end - 1) / kKeys;

  const auto find_keys = [&](int tile) {
    if (thread >= kKeys) return;
    const int position = tile * kKeys + thread;
    shared.offsets[tile & 1][thread] =
        position < end
            ? ((static_cast<int64_t>(table[position / block_size]) * args.num_kv_heads + kv_head) * block_size +
               position % block_size) *
                  dim
            : -1;
  };
  const int chunks = dim / 8;  // of 8 elements, in a row
  const auto load = [&](int tile) {
    const int stage = tile & 1;
    for (int i = thread; i < kKeys * (kDim / 8); i += kThreads) {
      const int key = i / (kDim / 8), chunk = i % (kDim / 8);
      if (chunk >= chunks) continue;
      const int64_t offset = shared.offsets[stage][key];
      const int64_t from = max(offset, int64_t{0}) + chunk * 8;
      void* to[2];
      if constexpr (kFp8) {
        to[0] = &shared.raw[stage][0][key][chunk * 8];
        to[1] = &shared.raw[stage][1][key][chunk * 8];
      } else {
        to[0] = &shared.keys[stage][key][chunk * 8];
        to[1] = &shared.values[stage][key][chunk * 8];
      }
      const Kv* const source[2] = {static_cast<const Kv*>(args.keys) + from,
                                   static_cast<const Kv*>(args.values) + from};
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        CopyAsync<8 * sizeof(Kv)>(static_cast<uint32_t>(__cvta_generic_to_shared(to[which])), source[which],
                                  offset >= 0);
      }
    }
    CommitCopies();
  };

  if (dim < kDim) {
    uint32_t* words = reinterpret_cast<uint32_t*>(shared_bytes);
    for (int i = thread; i < static_cast<int>(sizeof(Smem) / 4); i += kThreads) words[i] = 0;
    __syncthreads();
  }
  find_keys(first_tile);
  find_keys(first_tile + 1);
  __syncthreads();
  load(first_tile);

  // The warp's 16 queries as A fragments: rows lane / 4 and lane / 4 + 8.
  const int warp_row = first_row + warp * 16, quad = lane / 4, pair = lane % 4 * 2;
  uint32_t q[kDim / 16][4];
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp_row + quad + i % 2 * 8, column = k * 16 + pair + i / 2 * 8;
      const int64_t at = ((begin + static_cast<int64_t>(row)) * args.num_heads + head) * dim + column;
      q[k][i] = row < rows && column < dim ? *reinterpret_cast<const uint32_t*>(args.q + at) : 0;
    }
  }

  float out[kDim / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // in units of log2; sums of this thread's columns
  const float scale = args.scale * kLog2E;
  // Row and 8-column chunk of a [16, 16] piece whose address this lane gives to ldmatrix.
  const int k_row = lane % 8 + lane / 16 * 8, k_column = lane / 8 % 2 * 8;
  const int v_row = lane % 16, v_column = lane / 16 * 8;

  for (int tile = first_tile; tile <= last_tile; ++tile) {
    if (tile < last_tile) {
      load(tile + 1);
    } else {
      CommitCopies();
    }
    WaitForAllButLastCopies();
    __syncthreads();
    if constexpr (kFp8) {
      for (int i = thread; i < 2 * kKeys * (kDim / 8); i += kThreads) {
        const int which = i / (kKeys * (kDim / 8)), key = i / (kDim / 8) % kKeys, chunk = i % (kDim / 8);
        const uint2 raw = *reinterpret_cast<const uint2*>(&shared.raw[tile & 1][which][key][chunk * 8]);
        const uint2 low = Widen(raw.x), high = Widen(raw.y);
        __nv_bfloat16* to = which == 0 ? &shared.keys[0][key][chunk * 8] : &shared.values[0][key][chunk * 8];
        *reinterpret_cast<uint4*>(to) = {low.x, low.y, high.x, high.y};
      }
      __syncthreads();
    }
    const int stage = kFp8 ? 0 : tile & 1;
    if (warp_row < rows) {
      const uint32_t keys = static_cast<uint32_t>(__cvta_generic_to_shared(&shared.keys[stage][k_row][k_column]));
      const uint32_t values = static_cast<uint32_t>(__cvta_generic_to_shared(&shared.values[stage][v_row][v_column]));
      float score[kKeys / 8][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];
          LoadMatrices(b, keys + (n * 16 * kStride + k * 16) * 2);
          Multiply(score[2 * n], q[k], b[0], b[1]);
          Multiply(score[2 * n + 1], q[k], b[2], b[3]);
        }
      }
      const int first_key = tile * kKeys + pair;
      const int position = seq_len - rows + warp_row + quad;  // of the upper of this thread's two rows
      const bool all_visible =
          (tile + 1) * kKeys <= seq_len - rows + warp_row + 1 &&
          (args.sliding_window == 0 || tile * kKeys > seq_len - rows + warp_row + 15 - args.sliding_window);
      if (!all_visible) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = first_key + n * 8 + i % 2, row_position = position + i / 2 * 8;
            if (key > row_position || (args.sliding_window > 0 && key <= row_position - args.sliding_window)) {
              score[n][i] = -INFINITY;
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = maximum[r];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(score[n][2 * r], score[n][2 * r + 1]) * scale);
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        const float base = top == -INFINITY ? 0.0f : top;  // nothing seen so far
        const float shrink = Exp2(maximum[r] - base);
        maximum[r] = top;
        sum[r] *= shrink;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          out[n][2 * r] *= shrink;
          out[n][2 * r + 1] *= shrink;
        }
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            score[n][i] = Exp2(fmaf(score[n][i], scale, -base));
            sum[r] += score[n][i];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        const uint32_t p[4] = {Pack(score[2 * k][0], score[2 * k][1]), Pack(score[2 * k][2], score[2 * k][3]),
                               Pack(score[2 * k + 1][0], score[2 * k + 1][1]),
                               Pack(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
          uint32_t b[4];
          LoadMatricesTransposed(b, values + (k * 16 * kStride + n * 16) * 2);
          Multiply(out[2 * n], p, b[0], b[1]);
          Multiply(out[2 * n + 1], p, b[2], b[3]);
        }
      }
    }
    if (tile + 2 <= last_tile) find_keys(tile + 2);
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = sum[r];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    const int row = warp_row + quad + r * 8;
    if (row >= rows) continue;
    const float inverse = 1.0f / total;
    BFloat16* to = args.out + ((begin + static_cast<int64_t>(row)) * args.num_heads + head) * dim;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int column = n * 8 + pair;
      if (column < dim)
        *reinterpret_cast<uint32_t*>(to + column) = Pack(out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse);
    }
  }
}

template <int kDim, typename Kv>
cudaError_t LaunchAttention(const PrefillFallbackArgs& args, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kDim, Kv>);
  const cudaError_t error =
      cudaFuncSetAttribute(AttentionKernel<kDim, Kv>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid((args.max_query_rows + kRows - 1) / kRows, args.num_heads, args.num_sequences);
  return Launch(AttentionKernel<kDim, Kv>, grid, dim3(kThreads), kBytes, stream, 1, args);
}

template <typename Kv>
cudaError_t LaunchForDim(const PrefillFallbackArgs& args, cudaStream_t stream) {
  if (args.head_dim <= 32) return LaunchAttention<32, Kv>(args, stream);
  if (args.head_dim <= 64) return LaunchAttention<64, Kv>(args, stream);
  if (args.head_dim <= 128) return LaunchAttention<128, Kv>(args, stream);
  return LaunchAttention<256, Kv>(args, stream);
}

}  // namespace

cudaError_t RunPrefillFallback(const PrefillFallbackArgs& args, cudaStream_t stream) {
  if (args.head_dim <= 0 || args.head_dim > 256 || args.head_dim % 8 != 0 || args.block_size <= 0 ||
      args.num_kv_heads <= 0 || args.num_heads % args.num_kv_heads != 0 || args.num_heads > 65535 ||
      args.num_sequences > 65535) {
    return cudaErrorInvalidValue;
  }
  if (args.num_sequences <= 0 || args.max_query_rows <= 0) return cudaSuccess;
  return args.fp8 ? LaunchForDim<__nv_fp8_e4m3>(args, stream) : LaunchForDim<__nv_bfloat16>(args, stream);
}

}  // namespace soloist::cuda
