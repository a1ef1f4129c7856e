// Sampling: one kernel, one cluster of 8 thread blocks per row. Each block keeps its slice of the row in shared memory,
// so that whatever a row asks for (penalties, top-k, top-p, the draw) is computed without reading device memory again;
// the blocks meet in a few exchanges through distributed shared memory. Order of work per row:
//   1. load the slice; maximum and sum of exp in the same pass (log-probabilities are of the raw logits)
//   2. rows with log-probabilities: the n best of each block to block 0
//   3. mask, penalties and bias, in shared memory
//   4. exchange: maximum, sum of exp, best token. Greedy rows end here.
//   5. top-k, min-p, top-p: each raises `least`, the key of the least likely survivor (sample_filter.cuh)
//   6. draw over the survivors; exchange: the best noisy token
// A row with a target takes it after 4, whatever was best.
// Everything is exact or in a fixed order: maxima, integer sums, and sums of exp over fixed slices of the vocabulary.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/sample_filter.cuh"
#include "kernels/cuda/sample_top.cuh"

namespace soloist::cuda {
namespace {

using namespace sampling;  // sample_*.cuh

// Above the largest g = -log(-log(u)), u <= 1 - 2^-24.
constexpr float kMaxGumbel = 16.7f;

// Quads of a slice up to which a block has half of its threads.
constexpr int kSmallSlice = 2048;

struct Shared {
  FilterShared filter;
  int32_t params[2 * sizeof(SamplingRow) / 4];  // the row's and the next one's
  Partial partial[kCluster * kMaxWarps];        // written by the warps of all blocks
  uint64_t drawn[kCluster * kMaxWarps];         // block 0: written by the warps of all blocks
  TopList warp_top[kMaxWarps];                  // of the raw logits, by warp
  TopList block_top[kCluster];                  // block 0: by block
  int pending_seen;
};

// Tokens [token, token + 4) of the row, -inf beyond the vocabulary.
__device__ __forceinline__ float4 LoadQuad(const float* row, int token, int vocab, bool aligned) {
  if (aligned && token + 4 <= vocab) return __ldcs(reinterpret_cast<const float4*>(row + token));
  return {token < vocab ? row[token] : kBanned, token + 1 < vocab ? row[token + 1] : kBanned,
          token + 2 < vocab ? row[token + 2] : kBanned, token + 3 < vocab ? row[token + 3] : kBanned};
}

// Global to shared memory; the thread's part of the result.
__device__ __forceinline__ Partial LoadSlice(const float* row, int vocab, bool aligned, const Slice& slice) {
  constexpr int kBatch = 4;
  Partial p = kNothing;
  int best = slice.begin + 4 * static_cast<int>(threadIdx.x);
  for (int first = threadIdx.x; first < slice.quads; first += kBatch * blockDim.x) {
    float4 quads[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int q = first + j * blockDim.x;
      quads[j] = LoadQuad(row, slice.begin + 4 * q, q < slice.quads ? vocab : 0, aligned);
    }
    float max = p.max;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int q = first + j * blockDim.x;
      if (q < slice.quads) slice.values[q] = quads[j];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (At(quads[j], c) > max) {
          max = At(quads[j], c);
          best = slice.begin + 4 * q + c;
        }
      }
    }
    if (max == kBanned) continue;
    p.sum = Rescale(p.sum, p.max, max);
    p.max = max;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) p.sum += expf(At(quads[j], c) - max);
    }
  }
  if (threadIdx.x < slice.quads) p.best = Candidate(p.max, best);
  return p;
}

// Shared memory to the row of raw_logits.
__device__ void CopySlice(const Slice& slice, int vocab, bool aligned, float* row) {
  if (aligned) {
    for (int q = threadIdx.x; q < slice.quads; q += blockDim.x) {
      *reinterpret_cast<float4*>(row + slice.begin + 4 * q) = slice.values[q];
    }
    return;
  }
  const float* values = reinterpret_cast<const float*>(slice.values);
  for (int i = threadIdx.x; i < min(4 * slice.quads, vocab - slice.begin); i += blockDim.x) {
    row[slice.begin + i] = values[i];
  }
}

// The thread's best token by the values in shared memory.
__device__ uint64_t BestOfSlice(const Slice& slice) {
  uint64_t best = 0;
  for (int q = threadIdx.x; q < slice.quads; q += blockDim.x) {
    const float4 quad = slice.values[q];
#pragma unroll
    for (int c = 0; c < 4; ++c) best = max(best, Candidate(At(quad, c), slice.begin + 4 * q + c));
  }
  return best;
}

// A quad's four bits are in one word: quads begin at multiples of 4. Beyond the vocabulary the slice has -inf already.
__device__ void ApplyMask(const uint32_t* mask, int vocab, const Slice& slice) {
  for (int q = threadIdx.x; q < slice.quads; q += blockDim.x) {
    const int token = slice.begin + 4 * q;
    if (token >= vocab) continue;
    const uint32_t bits = mask[token / 32] >> (token % 32);
    if ((bits & 15u) == 15u) continue;
    float4 quad = slice.values[q];
    if ((bits & 1u) == 0) quad.x = kBanned;
    if ((bits & 2u) == 0) quad.y = kBanned;
    if ((bits & 4u) == 0) quad.z = kBanned;
    if ((bits & 8u) == 0) quad.w = kBanned;
    slice.values[q] = quad;
  }
}

__device__ void Penalize(const SampleArgs& args, const SamplingRow& row, int end, const Slice& slice,
                         int* pending_seen) {
  float* values = reinterpret_cast<float*>(slice.values);
  const int pending = row.pending_row >= 0 ? args.previous_tokens[row.pending_row] - slice.begin : -1;
  const auto apply = [&](int i, int count) {
    const float logit = values[i];
    const float scaled =
        logit > 0 ? __fdiv_rn(logit, row.repetition_penalty) : __fmul_rn(logit, row.repetition_penalty);
    const float once = __fadd_rn(row.presence_penalty, __fmul_rn(row.frequency_penalty, static_cast<float>(count)));
    values[i] = count > 0 ? __fsub_rn(scaled, once) : scaled;
  };
  if (threadIdx.x == 0) *pending_seen = 0;
  __syncthreads();
  for (int i = row.history_begin + threadIdx.x; i < end; i += blockDim.x) {
    const TokenHistory entry = args.history[i];
    const int at = entry.token - slice.begin;
    if (at < 0 || at >= 4 * slice.quads) continue;
    if (at == pending) *pending_seen = 1;
    apply(at, entry.output_count + (at == pending ? 1 : 0));
  }
  __syncthreads();
  if (threadIdx.x == 0 && pending >= 0 && pending < 4 * slice.quads && *pending_seen == 0) apply(pending, 1);
}

// One warp. A token may occur more than once: its biases are added in the order of the list.
__device__ void AddBias(const LogitBias* bias, int begin, int end, const Slice& slice, int lane) {
  float* values = reinterpret_cast<float*>(slice.values);
  constexpr int kBatch = 4;
  for (int first = begin; first < end; first += 32 * kBatch) {
    LogitBias entries[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + 32 * j + lane;
      entries[j] = i < end ? bias[i] : LogitBias{-1, 0};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = entries[j].token - slice.begin;
      const bool inside = entries[j].token >= 0 && at >= 0 && at < 4 * slice.quads;
      const unsigned same = __match_any_sync(kAllLanes, inside ? at : -1);
      const int turn = inside ? __popc(same & ((1u << lane) - 1)) : -1;
      const int turns = __reduce_max_sync(kAllLanes, turn) + 1;
      for (int t = 0; t < turns; ++t) {
        if (turn == t) values[at] = __fadd_rn(values[at], entries[j].bias);
        __syncwarp();
      }
    }
  }
}

// Philox4x32-10 as in kernels/philox.h, for tokens 4 * quad ... 4 * quad + 3.
__device__ __forceinline__ uint4 Random(const SamplingRow& row, int quad) {
  uint4 c = {static_cast<uint32_t>(quad), static_cast<uint32_t>(row.position), static_cast<uint32_t>(row.output_index),
             0};
  uint32_t key0 = row.seed_low, key1 = row.seed_high;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    c = {__umulhi(0xCD9E8D57u, c.z) ^ c.y ^ key0, 0xCD9E8D57u * c.z, __umulhi(0xD2511F53u, c.x) ^ c.w ^ key1,
         0xD2511F53u * c.x};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

__device__ __forceinline__ uint32_t Word(const uint4& random, int c) {
  return c == 0 ? random.x : c == 1 ? random.y : c == 2 ? random.z : random.w;
}

__device__ __forceinline__ float Gumbel(uint32_t bits) {
  // The sum rounds to 2^24 for the largest bits; u stays below 1.
  const float u = fminf((static_cast<float>(bits >> 8) + 0.5f) * 0x1p-24f, 0x1.fffffep-1f);
  return -logf(-logf(u));
}

// Bits below this have less noise than gap for sure: g >= gap needs 1 - u <= -log(u) <= exp(-gap), where 1 - u is at
// least the complement of the bits' upper 24, times 2^-24. Most others have more.
__device__ __forceinline__ uint32_t BitsForGumbel(float gap) {
  return ~__float2uint_ru(__expf(-gap) * (0x1p32f * 1.001f) + 512.0f);
}

// The thread's best of value * scale + noise over the survivors. `best` is the row's most likely token, which always
// survives: its noisy value is a bound that few tokens can reach, so that little noise has to be computed.
__device__ uint64_t Draw(const SamplingRow& row, const Slice& slice, float scale, uint32_t least, uint64_t best) {
  int token = TokenOf(best);
  float value = __fmul_rn(ValueOf(best), scale) + Gumbel(Word(Random(row, token / 4), token % 4));
  for (int q = threadIdx.x; q < slice.quads; q += blockDim.x) {
    const float4 quad = Scaled(slice.values[q], scale);
    const float max = Max(quad);
    if (Key(max) < least || max + kMaxGumbel < value) continue;
    const uint4 random = Random(row, slice.begin / 4 + q);
    const uint32_t enough = BitsForGumbel(value - max - fabsf(value) * 0x1p-22f);  // the sum below is rounded
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t bits = Word(random, c);
      if (bits < enough || Key(At(quad, c)) < least) continue;
      const float noisy = At(quad, c) + Gumbel(bits);
      const int id = slice.begin + 4 * q + c;
      if (noisy > value || (noisy == value && id < token)) {
        value = noisy;
        token = id;
      }
    }
  }
  return Candidate(value, token);
}

// What top-k, min-p and top-p leave: the key of the least likely survivor's scaled logit. `max` is the largest.
__device__ uint32_t Filter(const SamplingRow& row, int vocab, const Slice& slice, float scale, float max,
                           FilterShared& shared, const cg::cluster_group& cluster) {
  uint32_t least = 0;
  if (max == kBanned) return least;
  int phase = 0;
  if (row.top_k > 0 && row.top_k < vocab) {
    least =
        LeastKey<false>(slice, scale, max, 0, static_cast<unsigned long long>(row.top_k), 0, shared, phase, cluster);
  }
  if (row.min_p > 0) {
    const float log_min_p = static_cast<float>(log(static_cast<double>(row.min_p)));
    least = ::max(least, Key(__fadd_rn(max, log_min_p)));
  }
  if (row.top_p < 1) least = LeastKey<true>(slice, scale, max, least, 0, row.top_p, shared, phase, cluster);
  return least;
}

// logits [rows, vocab] are read once: rows * vocab * 4 bytes; of a mask each block its part; history and bias of a row
// by each of its blocks. Grid:
// kCluster blocks of 256 or 512 threads per row; dynamic shared memory: one slice, 16 * quads bytes.
__global__ void __launch_bounds__(kMaxThreads, 3)
    SampleKernel(const __grid_constant__ SampleArgs args, bool aligned, int quads) {
  extern __shared__ float4 values[];
  __shared__ Shared shared;
  const cg::cluster_group cluster = cg::this_cluster();
  auto started = cluster.barrier_arrive();
  const int r = blockIdx.x / kCluster, rank = blockIdx.x % kCluster;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int vocab = static_cast<int>(args.logits.cols), begin = min(4 * rank * quads, (vocab + 3) / 4 * 4);
  const Slice slice = {values, begin, min(quads, (vocab - begin + 3) / 4)};
  for (auto& histogram : shared.filter.histogram) ClearHistogram(histogram);

  PdlWait();
  const float* logits = static_cast<const float*>(args.logits.data) + r * args.logits.stride;
  if (threadIdx.x < 32) {
    shared.params[lane] = reinterpret_cast<const int32_t*>(args.params + r)[lane];
  }
  Partial partial = LoadSlice(logits, vocab, aligned, slice);
  PdlTrigger();
  __syncthreads();
  cluster.barrier_wait(std::move(started));

  const SamplingRow& row = reinterpret_cast<const SamplingRow*>(shared.params)[0];
  const SamplingRow& next = reinterpret_cast<const SamplingRow*>(shared.params)[1];
  const int num_top = row.num_top_logprobs;
  if (row.return_logits != 0) {
    CopySlice(slice, vocab, aligned && vocab % 4 == 0, args.raw_logits + int64_t{r} * vocab);
  }
  if (num_top > 0) {
    TopOfWarp(slice, vocab, num_top, partial.best, shared.warp_top[warp], lane);
    uint64_t* list = cluster.map_shared_rank(shared.block_top[rank], 0);
    if (threadIdx.x < kMaxTopLogprobs) list[threadIdx.x] = 0;
    __syncthreads();
    ForEachRanked(shared.warp_top, warps, [&](int place, uint64_t candidate) {
      if (place < num_top) list[place] = candidate;
    });
  }
  const bool penalties = row.repetition_penalty != 1 || row.presence_penalty != 0 || row.frequency_penalty != 0;
  const int mask = args.mask_of_row == nullptr ? -1 : args.mask_of_row[r];
  if (mask >= 0) {
    __syncthreads();  // the raw values may still be being copied
    ApplyMask(reinterpret_cast<const uint32_t*>(args.masks) + int64_t{mask} * ((vocab + 31) / 32), vocab, slice);
  }
  if (penalties) Penalize(args, row, next.history_begin, slice, &shared.pending_seen);
  if (row.bias_begin < next.bias_begin) {
    __syncthreads();
    if (warp == 0) AddBias(args.bias, row.bias_begin, next.bias_begin, slice, lane);
  }
  if (mask >= 0 || penalties || row.bias_begin < next.bias_begin) {
    __syncthreads();
    partial.best = BestOfSlice(slice);
  }

  partial = WarpReduce(partial);
  if (lane < kCluster) cluster.map_shared_rank(shared.partial, lane)[rank * warps + warp] = partial;
  cluster.sync();
  partial = Merge(shared.partial, kCluster * warps, lane);
  const float log_sum = partial.max + logf(partial.sum);
  if (rank == 0) {
    int32_t* tokens = args.top_tokens + int64_t{r} * kMaxTopLogprobs;
    float* logprobs = args.top_logprobs + int64_t{r} * kMaxTopLogprobs;
    if (warp == 0 && lane < kMaxTopLogprobs && lane >= min(num_top, vocab)) {
      tokens[lane] = -1;
      logprobs[lane] = 0;
    }
    if (num_top > 0)
      ForEachRanked(shared.block_top, kCluster, [&](int place, uint64_t candidate) {
        if (place >= num_top) return;
        tokens[place] = TokenOf(candidate);
        logprobs[place] = ValueOf(candidate) - log_sum;
      });
  }
  uint64_t chosen = partial.best;
  const int target = args.targets == nullptr ? -1 : args.targets[r];
  if (target < 0 && row.temperature != 0) {
    const float scale = __fdiv_rn(1.0f, row.temperature), max = __fmul_rn(ValueOf(chosen), scale);
    const uint32_t least = Filter(row, vocab, slice, scale, max, shared.filter, cluster);
    chosen = WarpMax(Draw(row, slice, scale, least, chosen));
    if (lane == 0) cluster.map_shared_rank(shared.drawn, 0)[rank * warps + warp] = chosen;
    cluster.sync();
    chosen = 0;
    for (int i = lane; i < kCluster * warps; i += 32) chosen = ::max(chosen, shared.drawn[i]);
    chosen = WarpMax(chosen);
  }
  if (rank == 0 && threadIdx.x == 0) {
    const int token = target >= 0 ? target : TokenOf(chosen);
    args.tokens[r] = token;
    args.logprobs[r] = logits[token] - log_sum;
  }
}

}  // namespace

cudaError_t Sample(const SampleArgs& args, cudaStream_t stream) {
  const Tensor& logits = args.logits;
  if (logits.rows == 0) return cudaSuccess;
  if (logits.dtype != DType::kF32 || logits.cols < 1 || logits.cols > kMaxSampleVocab) return cudaErrorInvalidValue;
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  const bool aligned = !misaligned(logits.data) && logits.stride % 4 == 0 && !misaligned(args.raw_logits);
  const int quads = static_cast<int>((logits.cols + 4 * kCluster - 1) / (4 * kCluster));
  const size_t bytes = quads * sizeof(float4);
  const cudaError_t error =
      cudaFuncSetAttribute(SampleKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  // Small blocks let many rows share a multiprocessor; large slices leave no room for that.
  const int threads = quads <= kSmallSlice ? kMaxThreads / 2 : kMaxThreads;
  return Launch(SampleKernel, dim3(static_cast<unsigned>(logits.rows * kCluster)), dim3(threads), bytes, stream,
                kCluster, args, aligned, quads);
}

}  // namespace soloist::cuda
