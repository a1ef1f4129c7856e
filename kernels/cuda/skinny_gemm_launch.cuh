// Host side of skinny_gemm.cuh: chooses the cut (see skinny_gemm_plan.h) and launches.
#ifndef SOLOIST_KERNELS_CUDA_SKINNY_GEMM_LAUNCH_CUH_
#define SOLOIST_KERNELS_CUDA_SKINNY_GEMM_LAUNCH_CUH_

#include <algorithm>

#include "kernels/cuda/skinny_gemm.cuh"
#include "kernels/cuda/skinny_gemm_plan.h"

namespace soloist::cuda::skinny {

// Two blocks of a multiprocessor, of this kernel and of the next one, and some more for a small kernel between them.
inline constexpr int kSharedOfTwo = 108 * 1024;
inline constexpr int kSharedOfOne = 220 * 1024;
// A larger part of x is spread over more blocks where k allows.
inline constexpr int kSharedOfX = 20 * 1024;

inline bool Aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Fills s from n, k, epilogue and `rows`; false if k is too long. `tables`: shared bytes besides ring, x and sums.
inline bool ChooseCut(Shape& s, int rows, int tables, const Tuning& tuning, int& cluster) {
  s.tiles = s.epilogue == SkinnyEpilogue::kSiluGated ? (s.n / 2 + 7) / 8 : (s.n + kTileRows - 1) / kTileRows;
  const int stages = (s.k + kStageK - 1) / kStageK;
  s.slices = std::min(kMaxSlices, stages);
  s.slice_stages = (stages + s.slices - 1) / s.slices;
  s.slices = (stages + s.slice_stages - 1) / s.slice_stages;

  const auto other_bytes = [&] {
    s.block_slices = (s.slices + cluster - 1) / cluster;
    s.x_pitch = std::min(s.block_slices * s.slice_stages * kStageK * 2, (s.k * 2 + 127) / 128 * 128) + 16;
    s.depth = s.row_tile <= 16 ? 2 : 1;
    return tables + s.row_tile * s.x_pitch + s.depth * s.slices * s.row_tile / 8 * kPartBytes;
  };
  for (s.row_tile = rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64; s.row_tile >= 8; s.row_tile /= 2) {
    cluster = tuning.cluster > 0 ? tuning.cluster : 1;
    int other = other_bytes();
    while (tuning.cluster <= 0 && cluster * 2 <= s.slices && s.row_tile * s.x_pitch > kSharedOfX) {
      cluster *= 2;
      other = other_bytes();
    }
    const int of_two = (kSharedOfTwo - other) / kStageBytes;
    const int of_one = (kSharedOfOne - other) / kStageBytes;
    s.ring = tuning.ring > 0 ? std::min(tuning.ring, of_one) : of_two >= 3 ? of_two : std::min(of_one, 8);
    s.ring = std::min(s.ring, kMaxRing);
    if (s.ring > kMaxConsumers) s.ring -= s.ring % 2;
    s.consumers = s.ring > kMaxConsumers ? s.ring / 2 : s.ring;
    if (s.ring >= 3) break;
  }
  s.ahead = tuning.ahead >= 0 ? tuning.ahead : 0;
  s.trigger_left = tuning.trigger_left >= 0 ? tuning.trigger_left : 1000;
  s.evict_first = tuning.evict_first != 0;
  return s.row_tile >= 8;
}

template <class Jobs, int kMaxNt>
cudaError_t LaunchKernel(const Shape& s, const typename Jobs::Params& params, int blocks, int cluster,
                         cudaStream_t stream) {
  const int bytes = SharedBytes<Jobs>(s);
  const auto kernel = &SkinnyGemmKernel<Jobs, kMaxNt>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  // Not kernels/cuda/launch.cuh's Launch: st.async needs a launch with clusters even where a cluster is one block.
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3((s.consumers + 3) * 32);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, s, params);
}

// `max_jobs`: bound of the jobs, as far as known.
template <class Jobs>
cudaError_t LaunchJobs(Shape& s, const typename Jobs::Params& params, int rows, int max_jobs, const Tuning& tuning,
                       cudaStream_t stream) {
  int cluster = 1;
  if (!ChooseCut(s, rows, kRingOffset<Jobs>, tuning, cluster)) return cudaErrorInvalidValue;
  int device = 0;
  int processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  int64_t clusters = std::min<int64_t>(int64_t{s.tiles} * max_jobs, processors / cluster);
  if (tuning.blocks > 0) clusters = tuning.blocks / cluster;
  const int blocks = static_cast<int>(clusters) * cluster;
  if (s.row_tile <= 16) return LaunchKernel<Jobs, 2>(s, params, blocks, cluster, stream);
  if (s.row_tile <= 32) return LaunchKernel<Jobs, 4>(s, params, blocks, cluster, stream);
  return LaunchKernel<Jobs, 8>(s, params, blocks, cluster, stream);
}

}  // namespace soloist::cuda::skinny

#endif  // SOLOIST_KERNELS_CUDA_SKINNY_GEMM_LAUNCH_CUH_
