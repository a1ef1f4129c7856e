// How the work of grouped_gemm_kernel.cuh is cut: its parameters, the units of work, and who does which.
#ifndef SOLOIST_KERNELS_CUDA_GROUPED_GEMM_UNITS_CUH_
#define SOLOIST_KERNELS_CUDA_GROUPED_GEMM_UNITS_CUH_

#include <cstdint>

#include "kernels/cuda/grouped_gemm.h"

namespace soloist::cuda {

inline constexpr int kGroupedConsumers = 256;                    // threads
inline constexpr int kGroupedThreads = kGroupedConsumers + 128;  // and the producer's warp group
inline constexpr int kGroupedMaxStages = 8;
inline constexpr int kGroupedMaxSplits = 8;
inline constexpr int kGroupedWeightBytes = 128 * 128;                 // of a stage
inline constexpr int kGroupedChunkRows = 64;                          // of out, that a consumer stages at a time
inline constexpr int kGroupedStagingBytes = kGroupedChunkRows * 128;  // 64 columns
inline constexpr int kGroupedPartials = 32 * 256;                     // float4 of one block

// One instantiation of the kernel.
template <GroupedActivation kActivationValue, bool kFloatOut>
struct GroupedVariant {
  static constexpr GroupedActivation kActivation = kActivationValue;
  static constexpr bool kGated = kActivation == GroupedActivation::kSiluGated;
  static constexpr bool kFloat = kFloatOut;
};

struct GroupedKernelParams {
  const int32_t* offsets;
  void* out;
  float4* partials;  // [blocks of the grid, kGroupedPartials]
  int* arrivals;     // [blocks of the grid]; 0 between launches
  int64_t out_stride;
  uint64_t w_policy;
  int num_experts;
  int columns;   // of out
  int k_blocks;  // of 64
  int row_tile;
  uint32_t row_tile_reciprocal;  // 2^32 / row_tile, rounded up: exact quotients below 2^25
  int stages;
  int staging_buffers;  // of each consumer: 1 or 2
  int x_box_rows;
  int multicast;
  int max_splits;
  int weight_units;  // weight tiles / multicast, rounded up
  int raster;
  bool expect_one_tile;                 // one expert, and the host thinks that its rows are one tile
  int32_t w_start[kMaxGroupedExperts];  // in 128-byte steps from the base of the tensor map
};

// After the stages and the staging areas.
struct GroupedShared {
  uint64_t full[kGroupedMaxStages];
  uint64_t empty[kGroupedMaxStages];
  int offsets[kMaxGroupedExperts + 1];
  int tile_begin[kMaxGroupedExperts + 1];  // row tiles of the experts before
};

// The parts of k of one unit.
struct GroupedSplit {
  int index;         // this block's
  int count;         // 1: the whole of k
  int block_stride;  // from the block of one part to that of the next
};

// How many clusters share each of `units`: as many as leaves each cluster with one.
__device__ __forceinline__ int SplitsFor(const GroupedKernelParams& params, int units, int num_clusters) {
  if (units == 0) return 1;
  int splits = params.max_splits;
  while (splits > 1 && (units * splits > num_clusters || params.k_blocks < 2 * splits)) splits /= 2;
  return splits;
}

// Prefix sum of the experts' row tiles, by one warp: lane i has experts 8 i to 8 i + 7.
__device__ __forceinline__ void CountTiles(const GroupedKernelParams& params, GroupedShared& shared, int lane) {
  const int begin = min(lane * 8, params.num_experts);
  const int end = min(begin + 8, params.num_experts);
  int sum = 0;
#pragma unroll 1
  for (int e = begin; e < end; ++e) {
    const uint32_t rows = shared.offsets[e + 1] - shared.offsets[e];
    sum += __umulhi(rows + params.row_tile - 1, params.row_tile_reciprocal);
    shared.tile_begin[e + 1] = sum;
  }
  int before = sum;
#pragma unroll 1
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  before -= sum;
#pragma unroll 1
  for (int e = begin; e < end; ++e) shared.tile_begin[e + 1] += before;
  if (lane == 0) shared.tile_begin[0] = 0;
}

// Walks the units of one cluster, in ascending order.
class UnitCursor {
 public:
  __device__ UnitCursor(const GroupedKernelParams& params, const GroupedShared& shared)
      : params_(params), shared_(shared) {}

  // Goes to unit `index`, not before the last one asked for; false past the end.
  __device__ bool Seek(int index) {
    while (expert < params_.num_experts && index >= shared_.tile_begin[expert + 1] * params_.weight_units) ++expert;
    if (expert == params_.num_experts) return false;
    const int row_tiles = shared_.tile_begin[expert + 1] - shared_.tile_begin[expert];
    index -= shared_.tile_begin[expert] * params_.weight_units;
    const int strip = index / (params_.raster * row_tiles);
    index -= strip * params_.raster * row_tiles;
    const int width = min(params_.raster, params_.weight_units - strip * params_.raster);
    const int row_tile = index / width;
    weight_unit = strip * params_.raster + index - row_tile * width;
    row_begin = shared_.offsets[expert] + row_tile * params_.row_tile;
    rows = min(params_.row_tile, shared_.offsets[expert + 1] - row_begin);
    return true;
  }

  int expert = 0;
  int weight_unit = 0;
  int row_begin = 0;
  int rows = 0;

 private:
  const GroupedKernelParams& params_;
  const GroupedShared& shared_;
};

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_GROUPED_GEMM_UNITS_CUH_
