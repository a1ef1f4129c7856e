// The valid rows of an expert tensor on the device: ExpertRows groups as one list of rows without gaps. Included by .cu
// files only.
#ifndef SOLOIST_KERNELS_CUDA_EXPERT_ROWS_CUH_
#define SOLOIST_KERNELS_CUDA_EXPERT_ROWS_CUH_

#include <algorithm>
#include <array>
#include <limits>

#include "kernels/cuda/token_ops.h"
#include "kernels/cuda/token_vectors.cuh"

namespace soloist::cuda {

constexpr int kMaxGroups = 1024;

// A kernel parameter: up to kCapacity groups by ascending expert. As arrays, so that 1,024 fit (32,764 bytes).
template <int kCapacity>
struct RowGroups {
  const int32_t* counts[kCapacity];
  const int32_t* begins_on_device[kCapacity];
  int32_t begins[kCapacity];
  int32_t limits[kCapacity];
  int32_t experts[kCapacity];
  int num_groups;
};

// No groups: the rows [0, min(*total, rows)), or [0, rows) if total is null.
template <>
struct RowGroups<0> {
  const int32_t* total;
  int32_t rows;
};

// In shared memory.
template <int kCapacity>
struct RowList {
  int32_t starts[kCapacity + 1];  // rows of earlier groups; [num_groups]: all
  int32_t begins[kCapacity];
  int32_t warp_sums[32];

  // By the whole block, after PdlWait. Ends with a barrier.
  __device__ __forceinline__ void Read(const RowGroups<kCapacity>& groups) {
    const int thread = static_cast<int>(threadIdx.x);
    const int threads = static_cast<int>(blockDim.x);
    int32_t before = 0;
    for (int first = 0; first < groups.num_groups; first += threads) {
      const int g = first + thread;
      int32_t count = 0;
      if (g < groups.num_groups) {
        count = min(LoadInt(groups.counts[g]), groups.limits[g]);
        const int32_t* begin = groups.begins_on_device[g];
        begins[g] = begin != nullptr ? LoadInt(begin) : groups.begins[g];
      }
      int32_t sum = count;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int32_t other = __shfl_up_sync(kFullWarp, sum, offset);
        if (thread % 32 >= offset) sum += other;
      }
      if (thread % 32 == 31) warp_sums[thread / 32] = sum;
      __syncthreads();
      for (int w = 0; w < threads / 32; ++w) {
        if (w < thread / 32) sum += warp_sums[w];
      }
      if (g < groups.num_groups) starts[g] = before + sum - count;
      if (g == groups.num_groups - 1) starts[groups.num_groups] = before + sum;
      for (int w = 0; w < threads / 32; ++w) before += warp_sums[w];
      __syncthreads();
    }
  }
  __device__ __forceinline__ int32_t Total(const RowGroups<kCapacity>& groups) const {
    return starts[groups.num_groups];
  }
  // The row in the tensor of the list's row i < Total.
  __device__ __forceinline__ int32_t Row(const RowGroups<kCapacity>& groups, int32_t i) const {
    int low = 0, high = groups.num_groups;  // starts[low] <= i < starts[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (starts[middle] <= i ? low : high) = middle;
    }
    return begins[low] + i - starts[low];
  }
};

template <>
struct RowList<0> {
  int32_t total;

  __device__ __forceinline__ void Read(const RowGroups<0>& groups) {
    if (threadIdx.x == 0) total = groups.total != nullptr ? min(LoadInt(groups.total), groups.rows) : groups.rows;
    __syncthreads();
  }
  __device__ __forceinline__ int32_t Total(const RowGroups<0>&) const { return total; }
  __device__ __forceinline__ int32_t Row(const RowGroups<0>&, int32_t i) const { return i; }
};

// Calls run(RowGroups<..>, rows that can be valid at most) with the smallest list that takes them.
// cudaErrorInvalidValue if a group cannot be one of a tensor of `rows` rows.
template <typename Run>
cudaError_t WithGroups(const ExpertRows* groups, int num_groups, int64_t rows, const Run& run) {
  if (num_groups < 1 || num_groups > kMaxGroups || rows > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  std::array<int16_t, kMaxGroups> by_expert;
  int64_t most = 0;
  for (int g = 0; g < num_groups; ++g) {
    by_expert[static_cast<size_t>(g)] = static_cast<int16_t>(g);
    if (groups[g].row_count == nullptr || groups[g].row_capacity < 0 || groups[g].row_capacity > rows ||
        groups[g].row_begin < 0 || groups[g].row_begin > rows) {
      return cudaErrorInvalidValue;
    }
    most += groups[g].row_capacity;
  }
  std::stable_sort(by_expert.begin(), by_expert.begin() + num_groups,
                   [&](int16_t a, int16_t b) { return groups[a].expert < groups[b].expert; });
  const auto fill = [&](auto list) {
    for (int i = 0; i < num_groups; ++i) {
      const ExpertRows& group = groups[by_expert[static_cast<size_t>(i)]];
      list.counts[i] = group.row_count;
      list.begins_on_device[i] = group.row_begin_on_device;
      list.begins[i] = static_cast<int32_t>(group.row_begin);
      list.limits[i] = static_cast<int32_t>(group.row_capacity);
      list.experts[i] = group.expert;
    }
    list.num_groups = num_groups;
    return run(list, std::min(most, rows));
  };
  if (num_groups <= 32) return fill(RowGroups<32>());
  if (num_groups <= 256) return fill(RowGroups<256>());
  return fill(RowGroups<kMaxGroups>());
}

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_EXPERT_ROWS_CUH_
