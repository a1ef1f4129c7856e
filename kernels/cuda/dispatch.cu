// DispatchRows: gives each choice of an expert a row of dst, counts the experts' rows, and copies the rows there.
//
// A choice's key is its expert id (rows have a base per expert) or its expert's position in `order` (packed rows). With
// bases, its slot is base[expert] + (earlier choices with the same key); packed, it is its rank among all choices by
// (key, choice): both depend on the choices' order alone. Earlier choices that fill the expert's room leave it none.
//
// Few choices: one kernel, whose blocks share nothing. Block i < n reads all choices, counts for its own token's
// choices, and copies its row; block n writes counts, begins and headers. Bytes: per token 4 * n * top_k choices (from
// L2) and 2 * hidden * (1 + top_k) of rows.
// Many: (1) tiles of 1,024 choices: each choice's rank within its tile and expert goes to `slots`, each tile's counts
// to scratch; (2) one block turns the tiles' counts into prefix sums, and writes counts, begins, headers; (3) a block
// per token puts the slots together and copies the row. Bytes of (1) and (2): 8 * n * top_k + 12 * tiles * experts.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/token_ops.h"
#include "kernels/cuda/token_vectors.cuh"

namespace soloist::cuda {
namespace {

constexpr int kMaxExperts = 512;
constexpr int kMaxTopK = 16;
constexpr int kSmallThreads = 256;
constexpr int kSmallVectors = 2;  // of x that a thread loads before it knows the slots
constexpr int kCopyThreads = 128;
constexpr int kCopyVectors = 4;
constexpr int kTile = 1024;  // choices; threads too
constexpr int kTileWarps = kTile / 32;
constexpr int kScanThreads = kMaxExperts;
constexpr uint16_t kNoExpert = 0xffff;

struct DispatchParams {
  const BFloat16* x;
  int64_t x_stride;
  const int32_t* experts;  // [n * top_k]
  const int64_t* base;
  const int32_t* order;
  int32_t* slots;  // [n * top_k]
  int32_t* counts;
  int32_t* begins;
  BFloat16* dst;
  int64_t dst_stride;
  int64_t header_stride_bytes;
  int64_t n;
  int top_k;
  int hidden;
  int num_experts;
  int num_headers;
  int32_t room;  // of each expert; INT32_MAX: for all
};

// A part of a token's row in registers: kVectors vectors a thread, from column `begin` on.
template <int kThreads, int kVectors>
struct RowPart {
  static constexpr int kColumns = kThreads * kVectors * kVector;
  uint4 packed[kVectors];

  __device__ __forceinline__ static int Column(int begin, int v) {
    return begin + (v * kThreads + static_cast<int>(threadIdx.x)) * kVector;
  }
  __device__ __forceinline__ void Load(const DispatchParams& params, int64_t row, int begin) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = Column(begin, v);
      if (column < params.hidden) packed[v] = Load16(params.x + row * params.x_stride + column);
    }
  }
  // To the rows slots[0, top_k) of dst, but not to negative ones.
  __device__ __forceinline__ void Scatter(const DispatchParams& params, const int32_t* slots, int begin) const {
    for (int j = 0; j < params.top_k; ++j) {
      const int64_t slot = slots[j];
      if (slot < 0) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int column = Column(begin, v);
        if (column < params.hidden) Store16(params.dst + slot * params.dst_stride + column, packed[v]);
      }
    }
  }
  // The rest of the row, after Load(.., 0).
  __device__ __forceinline__ void ScatterAll(const DispatchParams& params, int64_t row, const int32_t* slots) {
    Scatter(params, slots, 0);
    for (int begin = kColumns; begin < params.hidden; begin += kColumns) {
      Load(params, row, begin);
      Scatter(params, slots, begin);
    }
  }
};

// By warp 0: out[order[o]] = sum of counts[order[p]] over p < o.
__device__ __forceinline__ void ScanInOrder(const int32_t* counts, const int32_t* order, int num_experts,
                                            int32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int32_t before = 0;
  for (int begin = 0; begin < num_experts; begin += 32) {
    const int o = begin + lane;
    const int expert = o < num_experts ? order[o] : -1;
    int32_t sum = expert >= 0 ? counts[expert] : 0;
    const int32_t own = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int32_t other = __shfl_up_sync(kFullWarp, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (expert >= 0) out[expert] = before + sum - own;
    before += __shfl_sync(kFullWarp, sum, 31);
  }
}

// By the block, from shared counts (and begins, where packed).
__device__ __forceinline__ void WriteCounts(const DispatchParams& params, const int32_t* counts,
                                            const int32_t* begins) {
  for (int e = static_cast<int>(threadIdx.x); e < params.num_experts; e += static_cast<int>(blockDim.x)) {
    params.counts[e] = counts[e];
    if (params.begins != nullptr) {
      params.begins[e] = params.base != nullptr ? static_cast<int32_t>(params.base[e]) : begins[e];
    }
  }
  if (params.begins != nullptr && params.base == nullptr && threadIdx.x == 0) {
    const int32_t last = params.order[params.num_experts - 1];
    params.begins[params.num_experts] = begins[last] + counts[last];
  }
  for (int i = static_cast<int>(threadIdx.x); i < params.num_headers * params.num_experts;
       i += static_cast<int>(blockDim.x)) {
    const int header = i / params.num_experts;
    const int e = i % params.num_experts;
    reinterpret_cast<int32_t*>(reinterpret_cast<char*>(params.dst) + header * params.header_stride_bytes)[e] =
        min(counts[e], params.room);
  }
}

__device__ __forceinline__ void CountAll(const DispatchParams& params) {
  __shared__ int32_t counts[kMaxExperts];
  __shared__ int32_t begins[kMaxExperts];
  for (int e = static_cast<int>(threadIdx.x); e < params.num_experts; e += kSmallThreads) counts[e] = 0;
  __syncthreads();
  const int choices = static_cast<int>(params.n) * params.top_k;
  for (int c = static_cast<int>(threadIdx.x); c < choices; c += kSmallThreads) {
    const int32_t expert = LoadInt(params.experts + c);
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  if (params.base == nullptr && threadIdx.x < 32) ScanInOrder(counts, params.order, params.num_experts, begins);
  __syncthreads();
  WriteCounts(params, counts, begins);
}

__global__ __launch_bounds__(kSmallThreads) void DispatchSmallKernel(const DispatchParams params) {
  __shared__ uint16_t keys[kDispatchSmallChoices];
  __shared__ uint16_t key_of[kMaxExperts];
  __shared__ int64_t bases[kMaxExperts];
  __shared__ int32_t found[kMaxTopK];  // choices before the own one
  __shared__ int32_t slots[kMaxTopK];
  PdlTrigger();
  const int thread = static_cast<int>(threadIdx.x);
  const int top_k = params.top_k;
  for (int i = thread; i < params.num_experts; i += kSmallThreads) {
    if (params.base != nullptr) {
      bases[i] = params.base[i];
      key_of[i] = static_cast<uint16_t>(i);
    } else {
      key_of[params.order[i]] = static_cast<uint16_t>(i);
    }
  }
  if (thread < kMaxTopK) found[thread] = 0;
  PdlWait();
  const int row = static_cast<int>(blockIdx.x);
  if (row == params.n) {
    CountAll(params);
    return;
  }

  RowPart<kSmallThreads, kSmallVectors> part;
  part.Load(params, row, 0);
  __syncthreads();
  const int first = row * top_k;
  // Packed slots depend on later choices too.
  const int relevant = params.base != nullptr ? first + top_k : static_cast<int>(params.n) * top_k;
#pragma unroll 4
  for (int c = thread; c < relevant; c += kSmallThreads) {
    const int32_t expert = LoadInt(params.experts + c);
    keys[c] = expert >= 0 ? key_of[expert] : kNoExpert;
  }
  __syncthreads();

  // A warp counts for one own choice over one of `segments` shares of all choices.
  constexpr int kWarps = kSmallThreads / 32;
  const int segments = top_k < kWarps ? kWarps / top_k : 1;
  const int lane = thread % 32;
  for (int task = thread / 32; task < top_k * segments; task += kWarps) {
    const int own = first + task % top_k;
    const uint16_t key = keys[own];
    unsigned count = 0;
    for (int c = task / top_k * 32 + lane; c < relevant; c += segments * 32) {
      count += (keys[c] == key && c < own) || (params.base == nullptr && keys[c] < key);
    }
    count = __reduce_add_sync(kFullWarp, count);
    if (lane == 0 && count > 0) atomicAdd(&found[task % top_k], static_cast<int32_t>(count));
  }
  __syncthreads();
  if (thread < top_k) {
    const uint16_t key = keys[first + thread];
    int32_t slot = -1;
    if (key != kNoExpert && found[thread] < params.room)
      slot = found[thread] + (params.base != nullptr ? static_cast<int32_t>(bases[key]) : 0);
    slots[thread] = slot;
    params.slots[first + thread] = slot;
  }
  __syncthreads();
  part.ScatterAll(params, row, slots);
}

// slots[c] = rank of choice c among its tile's choices of the same expert; tile_counts[tile][expert].
__global__ __launch_bounds__(kTile) void RankTilesKernel(const DispatchParams params, int32_t* tile_counts) {
  extern __shared__ uint16_t
      before[];  // [kTileWarps][num_experts]: a warp's choices, then those of the warps before it
  PdlTrigger();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kTileWarps * params.num_experts; i += kTile) before[i] = 0;
  __syncthreads();
  PdlWait();
  const int64_t choice = static_cast<int64_t>(blockIdx.x) * kTile + thread;
  const int32_t expert = choice < params.n * params.top_k ? LoadInt(params.experts + choice) : -1;
  const unsigned peers = __match_any_sync(kFullWarp, expert);
  int32_t rank = __popc(peers & ((1u << (thread % 32)) - 1));
  uint16_t* of_warp = before + thread / 32 * params.num_experts;
  if (expert >= 0 && rank == 0) of_warp[expert] = static_cast<uint16_t>(__popc(peers));
  __syncthreads();
  if (thread < params.num_experts) {
    int32_t sum = 0;
    for (int w = 0; w < kTileWarps; ++w) {
      uint16_t& count = before[w * params.num_experts + thread];
      const uint16_t own = count;
      count = static_cast<uint16_t>(sum);
      sum += own;
    }
    tile_counts[static_cast<int64_t>(blockIdx.x) * params.num_experts + thread] = sum;
  }
  __syncthreads();
  if (choice < params.n * params.top_k) params.slots[choice] = expert >= 0 ? rank + of_warp[expert] : -1;
}

// One block. tile_counts[t][e] becomes the sum over tiles before t; firsts[e] the first row of expert e.
__global__ __launch_bounds__(kScanThreads) void ScanTilesKernel(const DispatchParams params, int32_t* tile_counts,
                                                                int64_t tiles, int32_t* firsts) {
  __shared__ int32_t counts[kMaxExperts];
  __shared__ int32_t begins[kMaxExperts];
  constexpr int kBatch = 16;  // loads in flight
  PdlTrigger();
  PdlWait();
  const int thread = static_cast<int>(threadIdx.x);
  const int experts = params.num_experts;
  if (thread < experts) {
    int32_t sum = 0;
    for (int64_t begin = 0; begin < tiles; begin += kBatch) {
      int32_t own[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        own[i] = begin + i < tiles ? LoadInt(tile_counts + (begin + i) * experts + thread) : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (begin + i < tiles) tile_counts[(begin + i) * experts + thread] = sum;
        sum += own[i];
      }
    }
    counts[thread] = sum;
  }
  __syncthreads();
  if (params.base == nullptr && thread < 32) ScanInOrder(counts, params.order, experts, begins);
  __syncthreads();
  if (thread < experts) {
    firsts[thread] = params.base != nullptr ? static_cast<int32_t>(params.base[thread]) : begins[thread];
  }
  WriteCounts(params, counts, begins);
}

// Block per token: slot = firsts[e] + sums[tile][e] + rank within the tile.
__global__ __launch_bounds__(kCopyThreads) void ScatterRowsKernel(const DispatchParams params, const int32_t* tile_sums,
                                                                  const int32_t* firsts) {
  __shared__ int32_t slots[kMaxTopK];
  PdlTrigger();
  PdlWait();
  const int64_t row = blockIdx.x;
  RowPart<kCopyThreads, kCopyVectors> part;
  part.Load(params, row, 0);
  if (threadIdx.x < params.top_k) {
    const int64_t choice = row * params.top_k + threadIdx.x;
    const int32_t expert = LoadInt(params.experts + choice);
    int32_t slot = LoadInt(params.slots + choice);
    if (expert >= 0) {
      slot += LoadInt(tile_sums + choice / kTile * params.num_experts + expert);
      slot = slot < params.room ? slot + LoadInt(firsts + expert) : -1;
      params.slots[choice] = slot;
    }
    slots[threadIdx.x] = slot;
  }
  __syncthreads();
  part.ScatterAll(params, row, slots);
}

int64_t Tiles(int64_t choices) { return (choices + kTile - 1) / kTile; }

}  // namespace

int64_t DispatchRowsScratchBytes(int64_t n, int64_t top_k, int num_experts) {
  if (n * top_k <= kDispatchSmallChoices) return 0;
  return (Tiles(n * top_k) + 1) * num_experts * static_cast<int64_t>(sizeof(int32_t));
}

cudaError_t DispatchRows(const DispatchRowsArgs& args, void* scratch, cudaStream_t stream) {
  const int64_t n = args.experts.rows;
  const int64_t top_k = args.experts.cols;
  const int64_t hidden = args.dst.cols;
  const int64_t choices = n * top_k;
  if (args.num_experts < 1 || args.num_experts > kMaxExperts || args.counts == nullptr || args.dst.data == nullptr ||
      (args.base == nullptr && args.order == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (n > 0 &&
      (top_k < 1 || top_k > kMaxTopK || !IsVectors(args.x, DType::kBF16, hidden) || args.x.rows < n ||
       !IsVectors(args.dst, DType::kBF16, hidden) || !IsPlain(args.experts, DType::kI32, n, top_k) ||
       !IsPlain(args.slots, DType::kI32, n, top_k) || args.experts.stride != top_k || args.slots.stride != top_k)) {
    return cudaErrorInvalidValue;
  }
  const DispatchParams params{
      static_cast<const BFloat16*>(args.x.data),
      args.x.stride,
      static_cast<const int32_t*>(args.experts.data),
      args.base,
      args.order,
      static_cast<int32_t*>(args.slots.data),
      args.counts,
      args.begins,
      static_cast<BFloat16*>(args.dst.data),
      args.dst.stride,
      args.header_stride_bytes,
      n,
      static_cast<int>(top_k),
      static_cast<int>(hidden),
      args.num_experts,
      args.num_headers,
      args.room > 0 && args.base != nullptr && args.room < INT32_MAX ? static_cast<int32_t>(args.room) : INT32_MAX};
  if (choices <= kDispatchSmallChoices) {
    return Launch(DispatchSmallKernel, dim3(static_cast<unsigned>(n + 1)), dim3(kSmallThreads), 0, stream, 1, params);
  }
  if (scratch == nullptr) return cudaErrorInvalidValue;
  const int64_t tiles = Tiles(choices);
  auto* tile_counts = static_cast<int32_t*>(scratch);
  int32_t* firsts = tile_counts + tiles * args.num_experts;
  const size_t shared_bytes = static_cast<size_t>(kTileWarps * args.num_experts) * sizeof(uint16_t);
  cudaError_t error = Launch(RankTilesKernel, dim3(static_cast<unsigned>(tiles)), dim3(kTile), shared_bytes, stream, 1,
                             params, tile_counts);
  if (error != cudaSuccess) return error;
  error = Launch(ScanTilesKernel, dim3(1), dim3(kScanThreads), 0, stream, 1, params, tile_counts, tiles, firsts);
  if (error != cudaSuccess) return error;
  return Launch(ScatterRowsKernel, dim3(static_cast<unsigned>(n)), dim3(kCopyThreads), 0, stream, 1, params,
                static_cast<const int32_t*>(tile_counts), static_cast<const int32_t*>(firsts));
}

}  // namespace soloist::cuda
