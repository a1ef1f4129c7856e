// The best tokens of a row: of a thread, a warp, a block and the row, with what log-probabilities need. Included by
// sample.cu only.
#ifndef SOLOIST_KERNELS_CUDA_SAMPLE_TOP_CUH_
#define SOLOIST_KERNELS_CUDA_SAMPLE_TOP_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/sample_filter.cuh"
#include "kernels/sampling.h"

namespace soloist::cuda::sampling {

// A token with its value: larger is better, the lower id first on a tie. 0: none.
__device__ __forceinline__ uint64_t Candidate(float value, int token) {
  return (uint64_t{Key(value)} << 32) | ~static_cast<uint32_t>(token);
}
__device__ __forceinline__ float ValueOf(uint64_t candidate) { return FromKey(static_cast<uint32_t>(candidate >> 32)); }
__device__ __forceinline__ int TokenOf(uint64_t candidate) {
  return static_cast<int>(~static_cast<uint32_t>(candidate));
}

// The warp's best, in all lanes.
__device__ __forceinline__ uint64_t WarpMax(uint64_t candidate) {
  const uint32_t high = static_cast<uint32_t>(candidate >> 32), low = static_cast<uint32_t>(candidate);
  const uint32_t best = __reduce_max_sync(kAllLanes, high);
  return (uint64_t{best} << 32) | __reduce_max_sync(kAllLanes, high == best ? low : 0u);
}

// What a thread, warp or row knows of the row. best: Candidate(value after penalties and bias, token).
struct Partial {
  float max;  // of the raw logits
  float sum;  // of exp(raw logit - max)
  uint64_t best;
};
inline constexpr Partial kNothing = {kBanned, 0, 0};

// sum of exp relative to `max` instead of `from`.
__device__ __forceinline__ float Rescale(float sum, float from, float max) {
  return from == max ? sum : sum * expf(from - max);
}

// The warp's partial result, in all lanes.
__device__ __forceinline__ Partial WarpReduce(Partial p) {
  const float max = FromKey(__reduce_max_sync(kAllLanes, Key(p.max)));
  p.sum = Rescale(p.sum, p.max, max);
  for (int step = 16; step > 0; step /= 2) p.sum += __shfl_xor_sync(kAllLanes, p.sum, step);
  return {max, p.sum, WarpMax(p.best)};
}

// The row's result from those of `warps` warps (in all blocks together), in all lanes.
__device__ __forceinline__ Partial Merge(const Partial* partial, int warps, int lane) {
  Partial p = kNothing;
  for (int i = lane; i < warps; i += 32) p.max = fmaxf(p.max, partial[i].max);
  for (int i = lane; i < warps; i += 32) {
    p.sum += Rescale(partial[i].sum, partial[i].max, p.max);
    p.best = max(p.best, partial[i].best);
  }
  return WarpReduce(p);
}

// Best tokens, descending; 0: there are no more.
using TopList = uint64_t[kMaxTopLogprobs];

// One warp: the n best of the values that its lanes work on, of which `best` is each lane's best. Takes out the best n
// times; the lane that had it gets its next best.
__device__ inline void TopOfWarp(const Slice& slice, int vocab, int n, uint64_t best, TopList& list, int lane) {
  if (lane >= n && lane < kMaxTopLogprobs) list[lane] = 0;
  for (int i = 0; i < n; ++i) {
    const uint64_t top = WarpMax(best);
    if (lane == 0) list[i] = top;
    if (top == 0) continue;
    const int owner = (TokenOf(top) - slice.begin) / 4 % blockDim.x;
    uint64_t next = 0;
    for (int q = owner + lane * blockDim.x; q < slice.quads; q += 32 * blockDim.x) {
      const float4 quad = slice.values[q];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = slice.begin + 4 * q + c;
        const uint64_t candidate = Candidate(At(quad, c), token);
        if (candidate < top && token < vocab) next = max(next, candidate);
      }
    }
    next = WarpMax(next);
    if (owner % 32 == lane) best = next;
  }
}

// All threads of a block: calls write(rank, candidate) for each entry of the lists but 0, where rank is the number of
// better ones in all of them.
template <typename Write>
__device__ __forceinline__ void ForEachRanked(const TopList* lists, int num_lists, const Write& write) {
  for (int i = threadIdx.x; i < num_lists * kMaxTopLogprobs; i += blockDim.x) {
    const uint64_t candidate = lists[i / kMaxTopLogprobs][i % kMaxTopLogprobs];
    if (candidate == 0) continue;
    int rank = 0;
#pragma unroll 4
    for (int l = 0; l < num_lists; ++l) {
      int better = 0;  // by binary search
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        const int last = better + step - 1;
        if (last < kMaxTopLogprobs && lists[l][last] > candidate) better += step;
      }
      rank += better;
    }
    write(rank, candidate);
  }
}
static_assert(kMaxTopLogprobs < 32);

}  // namespace soloist::cuda::sampling

#endif  // SOLOIST_KERNELS_CUDA_SAMPLE_TOP_CUH_
