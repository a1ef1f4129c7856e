// The filters of sampling: which tokens top-k and top-p leave, without sorting. Included by sample.cu only.
//
// A filter asks for the largest value v such that the values >= v together weigh enough: a count of k, or a share of
// the probability mass. It is found by histograms, exactly: the first has bins of equal width below the row's maximum,
// the next ones split the bin that crosses the limit by the bits of Key until one value is left (2 or 3 histograms as a
// rule, 5 at most). Masses are fixed-point numbers, so that sums do not depend on the order of additions.
// One cluster of thread blocks works on a row: each block has a slice of it in shared memory and fills its own
// histogram. Of the others' it reads the sums of groups of bins, then the bins of the group that crosses the limit.
#ifndef SOLOIST_KERNELS_CUDA_SAMPLE_FILTER_CUH_
#define SOLOIST_KERNELS_CUDA_SAMPLE_FILTER_CUH_

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <limits>

namespace soloist::cuda::sampling {

namespace cg = cooperative_groups;

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
  alignas(16) unsigned long long histogram[2][kBins];  // in turn: the others read one while the next is filled
  unsigned long long group[2][kGroups];
  unsigned long long rest;  // what the crossing bin must weigh
  int bin;                  // the crossing bin; kBins: there is none
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

// *sum += weight by 32-bit atomics, which shared memory has in hardware; the first returns what tells the carry. A
// count has no carry.
template <bool kMass>
__device__ __forceinline__ void AddWeight(unsigned long long* sum, unsigned long long weight) {
  uint32_t* halves = reinterpret_cast<uint32_t*>(sum);
  const uint32_t low = static_cast<uint32_t>(weight);
  if (!kMass) {
    atomicAdd(halves, low);
    return;
  }
  uint32_t high = static_cast<uint32_t>(weight >> 32);
  if (atomicAdd(halves, low) > ~low) ++high;
  if (high != 0) atomicAdd(halves + 1, high);
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

// Adds the slice's values (times scale) in the range to the histogram, each with its weight: its mass, or 1.
template <bool kMass>
__device__ __forceinline__ void AddSlice(const Slice& slice, float scale, float max, const Range& range,
                                         unsigned long long* histogram) {
  for (int q = threadIdx.x; q < slice.quads; q += blockDim.x) {
    const float4 quad = Scaled(slice.values[q], scale);
    if (Key(Max(quad)) < range.low) continue;
    int bin[4];
    unsigned long long weight[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float value = At(quad, c);
      const uint32_t key = Key(value);
      const int first_bin = FirstBin(value, max);
      const bool inside =
          key >= range.low && key <= range.high && (range.first_bin < 0 || first_bin == range.first_bin);
      bin[c] = range.first_bin < 0 ? first_bin : static_cast<int>((range.high - key) >> range.shift);
      weight[c] = !inside ? 0 : kMass ? __float2ull_rn(expf(value - max) * kUnitMass) : 1;
    }
    // Equal neighbours make one addition.
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      if (bin[c] == bin[c + 1]) {
        weight[c + 1] += weight[c];
        weight[c] = 0;
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (weight[c] != 0) AddWeight<kMass>(histogram + bin[c], weight[c]);
    }
  }
}

// Sum of what the blocks of the cluster have at `mine`.
__device__ __forceinline__ unsigned long long ClusterSum(unsigned long long* mine, const cg::cluster_group& cluster) {
  unsigned long long sum = 0;
#pragma unroll
  for (int r = 0; r < kCluster; ++r) sum += *cluster.map_shared_rank(mine, r);
  return sum;
}

// One warp: the first lane up to which the weights sum to `need`, which becomes what that lane's weight must give. 32
// if all do not: then need loses what all weigh.
__device__ __forceinline__ int Cross(unsigned long long weight, unsigned long long& need, int lane) {
  unsigned long long upto = weight;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned long long before = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += before;
  }
  const int at = __popc(__ballot_sync(kAllLanes, upto < need));
  need -= at == 0 ? 0 : __shfl_sync(kAllLanes, upto, at - 1);
  return at;
}

// The largest key such that the values with keys >= it weigh `need`; `least` if all together do not. kMass false: a
// value weighs 1; true: exp(value - max), and need is `share` of the weight of all. Only values with keys >= least
// count, and none of -inf. max: the largest value, not -inf; values are those of the slice times scale. All threads of
// the cluster call it; `phase` counts the histograms of the row.
template <bool kMass>
__device__ uint32_t LeastKey(const Slice& slice, float scale, float max, uint32_t least, unsigned long long need,
                             double share, FilterShared& shared, int& phase, const cg::cluster_group& cluster) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, lanes_per_group = blockDim.x / kGroups;
  const uint32_t lowest = ::max(least, Key(-FLT_MAX));
  Range range = {::max(lowest, Key(max - kReach)), Key(max)};
  while (true) {
    unsigned long long* histogram = shared.histogram[phase & 1];
    unsigned long long* group = shared.group[phase & 1];
    AddSlice<kMass>(slice, scale, max, range, histogram);
    __syncthreads();
    unsigned long long sum = 0;
    for (int i = threadIdx.x % lanes_per_group; i < kGroupBins; i += lanes_per_group) {
      sum += histogram[threadIdx.x / lanes_per_group * kGroupBins + i];
    }
    for (int step = lanes_per_group / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (threadIdx.x % lanes_per_group == 0) group[threadIdx.x / lanes_per_group] = sum;
    cluster.sync();
    // Nobody reads the other histogram any more: all have passed the barrier after those reads.
    ClearHistogram(shared.histogram[++phase & 1]);
    if (warp == 0) {
      const unsigned long long weight = ClusterSum(group + lane, cluster);
      if (kMass && range.first_bin < 0) {
        unsigned long long all = weight;
        for (int step = 16; step > 0; step /= 2) all += __shfl_xor_sync(kAllLanes, all, step);
        need = ::max(1ull, __double2ull_ru(share * static_cast<double>(all)));
      }
      const int crossing = Cross(weight, need, lane);
      int bin = kBins;
      if (crossing < kGroups) {
        bin = crossing * kGroupBins;
        bin += Cross(ClusterSum(histogram + bin + lane, cluster), need, lane);
      }
      if (lane == 0) {
        shared.bin = bin;
        shared.rest = need;
      }
    }
    __syncthreads();
    const int bin = shared.bin;
    need = shared.rest;
    if (bin == kBins && range.low == lowest) return least;
    if (range.first_bin >= 0) {
      range.high -= static_cast<uint32_t>(bin) << range.shift;
      range.low = ::max(range.low, range.high - ((1u << range.shift) - 1));
    } else {
      // Bounds of the values in the bin, or of all that are lower. Scaling by a power of two is exact; max - value was
      // rounded to nearest: a value whose difference rounded up to the bin's begin lies just above it.
      range.first_bin = ::min(bin, kBins - 1);
      const float from = static_cast<float>(range.first_bin) / kBinsPerUnit * (1 - 0x1p-22f);
      const float to = static_cast<float>(range.first_bin + 1) / kBinsPerUnit;
      if (bin == kBins) {
        range = {lowest, ::min(range.high, range.low - 1), kBins - 1, 0};
      } else {
        range.low = ::max(range.low, Key(__fsub_rd(max, to)));
        range.high = ::min(range.high, Key(__fsub_ru(max, from)));
      }
    }
    if (range.low >= range.high) return range.high;
    range.shift = ::max(0, 32 - __clz(static_cast<int>(range.high - range.low)) - kBinBits);
  }
}

}  // namespace soloist::cuda::sampling

#endif  // SOLOIST_KERNELS_CUDA_SAMPLE_FILTER_CUH_
