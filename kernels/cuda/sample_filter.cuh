// The filters of sampling: which tokens top-k and top-p leave, without sorting. Included by sample.cu only.
//
// A filter asks for the largest value v such that the values >= v together weigh enough: a count of k, or a share of
// the probability mass. It is found by histograms, exactly: the first has bins of equal width below the row's maximum,
// the next ones split the bin that crosses the limit by the bits of Key until one value is left (2 or 3 histograms as a
// rule, 5 at most). Masses are fixed-point numbers, so that sums do not depend on the order of additions.
// One cluster of thread blocks works on a row: each block has a slice of it in shared memory and its own histogram. The
// blocks exchange the sums of groups of bins, then the bins of the group that crosses the limit.
#ifndef SOLOIST_KERNELS_CUDA_SAMPLE_FILTER_CUH_
#define SOLOIST_KERNELS_CUDA_SAMPLE_FILTER_CUH_

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <limits>

#include "kernels/cuda/sample_exchange.cuh"

namespace soloist::cuda::sampling {

inline constexpr int kCluster = 8;  // thread blocks per row
inline constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / 32;
inline constexpr unsigned kAllLanes = ~0u;
inline constexpr float kBanned = -std::numeric_limits<float>::infinity();

// A lane has a group, then a bin of a group.
inline constexpr int kBinBits = 10, kBins = 1 << kBinBits, kGroups = 32, kGroupBins = kBins / kGroups;
static_assert(kGroupBins == 32);
// Of the first histogram; a power of two. Its bins reach kReach below the maximum, where a token has exp(-32) = 1e-14
// of the most likely one's mass.
inline constexpr float kBinsPerUnit = 32, kReach = kBins / kBinsPerUnit;
// Mass of the most likely token. What rounds to 0 is below 2^-39 of it: nothing beyond kReach has a mass, and no
// vocabulary loses more than what single precision would.
inline constexpr float kUnitMass = 0x1p38f;

// Tokens [begin, begin + 4 * quads) of a row, in shared memory; beyond the vocabulary: -inf. Quad q is worked on by
// thread q % blockDim.x.
struct Slice {
  float4* values;
  int begin;  // a multiple of 4
  int quads;
};

struct FilterShared {
  alignas(16) unsigned long long histogram[kBins];   // of the block's slice; 0 between filters
  unsigned long long weights[2][kCluster][kGroups];  // received: of all blocks' groups, or bins of a group
  unsigned long long rest;                           // what the crossing bin must weigh
  int bin;                                           // the crossing bin; kBins: there is none
};

// Unsigned integers in the order of the floats (no NaN); -0 and 0 have the same.
__device__ __forceinline__ uint32_t Key(float x) {
  const int32_t bits = __float_as_int(x + 0.0f);
  return static_cast<uint32_t>(bits < 0 ? ~bits : bits | INT32_MIN);
}
__device__ __forceinline__ float FromKey(uint32_t key) {
  return __int_as_float(static_cast<int32_t>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key));
}

__device__ __forceinline__ float At(const float4& quad, int c) {
  return c == 0 ? quad.x : c == 1 ? quad.y : c == 2 ? quad.z : quad.w;
}
__device__ __forceinline__ float Max(const float4& quad) { return fmaxf(fmaxf(quad.x, quad.y), fmaxf(quad.z, quad.w)); }
// Never fused with what uses it: every pass must see the same values.
__device__ __forceinline__ float4 Scaled(const float4& quad, float scale) {
  return {__fmul_rn(quad.x, scale), __fmul_rn(quad.y, scale), __fmul_rn(quad.z, scale), __fmul_rn(quad.w, scale)};
}

__device__ __forceinline__ void ClearHistogram(unsigned long long* histogram) {
  for (int i = threadIdx.x; i < kBins / 2; i += blockDim.x) reinterpret_cast<ulonglong2*>(histogram)[i] = {0, 0};
}

// The bin of the first histogram; kBins - 1 also for all that is lower.
__device__ __forceinline__ int FirstBin(float value, float max) {
  return min(static_cast<int>((max - value) * kBinsPerUnit), kBins - 1);
}

// The values that a histogram is about: keys in [low, high], and FirstBin == first_bin unless that is negative.
struct Range {
  uint32_t low, high;
  int first_bin = -1;
  int shift = 0;  // of high - key to the bin, if first_bin >= 0
};

template <bool kMass>
__device__ __forceinline__ unsigned long long Weight(float value, float max) {
  return kMass ? __float2ull_rn(expf(value - max) * kUnitMass) : 1;
}

// histogram[bin[c]] += weight[c], by 32-bit atomics, which shared memory has in hardware; the first returns what tells
// the carry. Counts have none.
template <bool kMass, int kCount>
__device__ __forceinline__ void AddWeights(const int (&bin)[kCount], const unsigned long long (&weight)[kCount],
                                           unsigned long long* histogram) {
  uint32_t before[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    before[c] = 0;
    if (weight[c] != 0) {
      before[c] = atomicAdd(reinterpret_cast<uint32_t*>(histogram + bin[c]), static_cast<uint32_t>(weight[c]));
    }
  }
  if constexpr (kMass) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      uint32_t high = static_cast<uint32_t>(weight[c] >> 32);
      if (before[c] > ~static_cast<uint32_t>(weight[c])) ++high;
      if (high != 0) atomicAdd(reinterpret_cast<uint32_t*>(histogram + bin[c]) + 1, high);
    }
  }
}

// The slice's values (times scale) in the range to the first histogram, each with its weight: its mass, or 1.
template <bool kMass>
__device__ __forceinline__ void AddToFirst(const Slice& slice, float scale, float max, const Range& range,
                                           unsigned long long* histogram) {
  for (int q = threadIdx.x; q < slice.quads; q += blockDim.x) {
    const float4 quad = Scaled(slice.values[q], scale);
    if (Key(Max(quad)) < range.low) continue;
    int bin[4];
    unsigned long long weight[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      bin[c] = FirstBin(At(quad, c), max);
      weight[c] = Key(At(quad, c)) < range.low ? 0 : Weight<kMass>(At(quad, c), max);
    }
    // Equal neighbours make one addition.
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      if (bin[c] != bin[c + 1]) continue;
      weight[c + 1] += weight[c];
      weight[c] = 0;
    }
    AddWeights<kMass>(bin, weight, histogram);
  }
}

// The same to a later histogram, which few of the values are in.
template <bool kMass>
__device__ __forceinline__ void AddToLater(const Slice& slice, float scale, float max, const Range& range,
                                           unsigned long long* histogram) {
  for (int q = threadIdx.x; q < slice.quads; q += blockDim.x) {
    const float4 quad = Scaled(slice.values[q], scale);
    if (Key(Max(quad)) < range.low) continue;
    int bin[1] = {-1};
    unsigned long long weight[1];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float value = At(quad, c);
      const uint32_t key = Key(value);
      if (key < range.low || key > range.high || FirstBin(value, max) != range.first_bin) continue;
      const int to = static_cast<int>((range.high - key) >> range.shift);
      const unsigned long long more = Weight<kMass>(value, max);
      if (to == bin[0]) {
        weight[0] += more;
        continue;
      }
      if (bin[0] >= 0) AddWeights<kMass>(bin, weight, histogram);
      bin[0] = to;
      weight[0] = more;
    }
    if (bin[0] >= 0) AddWeights<kMass>(bin, weight, histogram);
  }
}

// Sums of the weights of lanes 0 ... lane.
__device__ __forceinline__ unsigned long long PrefixSum(unsigned long long weight, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned long long before = __shfl_up_sync(kAllLanes, weight, step);
    if (lane >= step) weight += before;
  }
  return weight;
}

// The first lane whose prefix sum reaches `need`, from which the sum before it is taken. 32 if none does.
__device__ __forceinline__ int Cross(unsigned long long upto, unsigned long long& need) {
  const int at = __popc(__ballot_sync(kAllLanes, upto < need));
  const unsigned long long before = __shfl_sync(kAllLanes, upto, (at + 31) % 32);
  if (at > 0) need -= before;
  return at;
}

// One warp: the prefix sums of what the blocks sent.
__device__ __forceinline__ unsigned long long Receive(const unsigned long long (*weights)[kGroups], Exchange& exchange,
                                                      int lane) {
  exchange.Wait();
  unsigned long long sum = 0;
#pragma unroll
  for (int r = 0; r < kCluster; ++r) sum += weights[r][lane];
  return PrefixSum(sum, lane);
}

// The largest key such that the values with keys >= it weigh `need`; `least` if all together do not. kMass false: a
// value weighs 1; true: exp(value - max), and need is `share` of the weight of all. Only values with keys >= least
// count, and none of -inf. max: the largest value, not -inf; values are those of the slice times scale. All threads of
// the cluster call it; two exchanges for each histogram.
template <bool kMass>
__device__ uint32_t LeastKey(const Slice& slice, int rank, float scale, float max, uint32_t least,
                             unsigned long long need, double share, FilterShared& shared, Exchange& exchange) {
  constexpr uint32_t kBytes = kCluster * kGroups * sizeof(unsigned long long);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, lanes_per_group = blockDim.x / kGroups;
  const uint32_t lowest = ::max(least, Key(-FLT_MAX));
  Range range = {::max(lowest, Key(max - kReach)), Key(max)};
  while (true) {
    if (range.first_bin < 0) {
      AddToFirst<kMass>(slice, scale, max, range, shared.histogram);
    } else {
      AddToLater<kMass>(slice, scale, max, range, shared.histogram);
    }
    if (threadIdx.x == 0) exchange.Expect(kBytes);
    __syncthreads();
    const int group = threadIdx.x / lanes_per_group, part = threadIdx.x % lanes_per_group;
    unsigned long long sum = 0;
    for (int i = part; i < kGroupBins; i += lanes_per_group) sum += shared.histogram[group * kGroupBins + i];
    for (int step = lanes_per_group / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (part < kCluster) exchange.Send(&shared.weights[exchange.slot()][rank][group], sum, part);
    if (warp == 0) {
      const unsigned long long upto = Receive(shared.weights[exchange.slot()], exchange, lane);
      if (kMass && range.first_bin < 0) {
        const unsigned long long all = __shfl_sync(kAllLanes, upto, 31);
        need = ::max(1ull, __double2ull_ru(share * static_cast<double>(all)));
      }
      const int crossing = Cross(upto, need);
      // Without a crossing group another one is exchanged, so that the number of exchanges is the same.
      const unsigned long long mine = shared.histogram[crossing % kGroups * kGroupBins + lane];
      exchange.Next();
      if (lane == 0) exchange.Expect(kBytes);
      for (int r = 0; r < kCluster; ++r) {
        exchange.Send(&shared.weights[exchange.slot()][rank][lane], mine, r);
      }
      const unsigned long long upto_bin = Receive(shared.weights[exchange.slot()], exchange, lane);
      const int bin = crossing < kGroups ? crossing * kGroupBins + Cross(upto_bin, need) : kBins;
      exchange.Next();
      if (lane == 0) {
        shared.bin = bin;
        shared.rest = need;
      }
    } else {
      exchange.Next();
      exchange.Next();
    }
    __syncthreads();
    const int bin = shared.bin;
    need = shared.rest;
    ClearHistogram(shared.histogram);
    __syncthreads();
    if (bin == kBins && range.low == lowest) return least;
    if (range.first_bin >= 0) {
      range.high -= static_cast<uint32_t>(bin) << range.shift;
      range.low = ::max(range.low, range.high - ((1u << range.shift) - 1));
    } else if (bin == kBins) {  // all that are lower than the first histogram reaches
      range = {lowest, range.low - 1, kBins - 1, 0};
    } else {
      // Bounds of the values in the bin. Scaling by a power of two is exact; max - value was rounded to nearest: a
      // value whose difference rounded up to the bin's begin lies just above it.
      range.first_bin = bin;
      const float from = static_cast<float>(bin) / kBinsPerUnit * (1 - 0x1p-22f);
      const float to = static_cast<float>(bin + 1) / kBinsPerUnit;
      range.high = ::min(range.high, Key(__fsub_ru(max, from)));
      if (bin < kBins - 1) range.low = ::max(range.low, Key(__fsub_rd(max, to)));
    }
    if (range.low >= range.high) return range.high;
    range.shift = ::max(0, 32 - __clz(static_cast<int>(range.high - range.low)) - kBinBits);
  }
}

}  // namespace soloist::cuda::sampling

#endif  // SOLOIST_KERNELS_CUDA_SAMPLE_FILTER_CUH_
