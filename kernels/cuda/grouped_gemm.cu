#include <algorithm>

#include "kernels/cuda/grouped_gemm.h"
#include "kernels/cuda/grouped_gemm_kernel.cuh"

namespace soloist::cuda {
namespace {

using Kernel = void (*)(CUtensorMap, CUtensorMap, GroupedKernelParams);

constexpr int kSharedLimit = 227 * 1024;

Kernel KernelFor(GroupedActivation activation) {
  switch (activation) {
    case GroupedActivation::kNone:
      return GroupedGemmKernel<GroupedActivation::kNone>;
    case GroupedActivation::kGelu:
      return GroupedGemmKernel<GroupedActivation::kGelu>;
    case GroupedActivation::kSiluGated:
      return GroupedGemmKernel<GroupedActivation::kSiluGated>;
  }
  return nullptr;
}

int StageBytes(int row_tile) { return kGroupedWeightBytes + row_tile * 128; }
int Stages(int row_tile) {
  const int ring = kSharedLimit - 1024 - 2 * kGroupedStagingBytes - static_cast<int>(sizeof(GroupedShared));
  return std::min(kGroupedMaxStages, ring / StageBytes(row_tile));
}
int DynamicSharedBytes(int row_tile) {
  return 1024 + Stages(row_tile) * StageBytes(row_tile) + 2 * kGroupedStagingBytes;
}
int Log2(int power) { return power == 1 ? 0 : power == 2 ? 1 : power == 4 ? 2 : 3; }
bool IsPowerUpTo(int value, int limit) { return value >= 1 && value <= limit && (value & (value - 1)) == 0; }
int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool Valid(const GroupedGemmArgs& a) {
  if (a.num_experts < 1 || a.num_experts > kMaxGroupedExperts || a.k < 64 || a.k % 64 != 0 || a.n < 16 ||
      a.n % 16 != 0) {
    return false;
  }
  if (a.x_stride < a.k || a.x_stride % 8 != 0 || a.w_stride < a.k || a.w_stride % 64 != 0 || a.out_stride < a.n ||
      a.out_stride % 8 != 0) {
    return false;
  }
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return aligned(a.x) && aligned(a.out) && aligned(a.w[0]) && a.row_capacity < (int64_t{1} << 31);
}

bool Valid(const GroupedTiling& t) {
  if (!IsPowerUpTo(t.multicast, 4) || !IsPowerUpTo(t.splits, 8) || t.multicast * t.splits > 8 || t.raster < 1) {
    return false;
  }
  const bool power_tile = t.row_tile == 64 || t.row_tile == 128 || t.row_tile == 256;
  if (t.splits == 1) return power_tile || t.row_tile == 192;
  return power_tile && (t.splits < 8 || t.row_tile >= 128);
}

CUresult EncodeMap(const GroupedGemmDevice& device, CUtensorMap* map, const void* base, int rank,
                   const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box) {
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(device.encode_map);
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(base), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace

cudaError_t PrepareGroupedGemm(GroupedGemmDevice* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&device->num_sms, cudaDevAttrMultiProcessorCount, index);
  if (error != cudaSuccess) return error;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &device->encode_map, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const int most =
      std::max({DynamicSharedBytes(64), DynamicSharedBytes(128), DynamicSharedBytes(192), DynamicSharedBytes(256)});
  for (const GroupedActivation activation :
       {GroupedActivation::kNone, GroupedActivation::kGelu, GroupedActivation::kSiluGated}) {
    error = cudaFuncSetAttribute(KernelFor(activation), cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  for (int size = 1; size <= 8; size *= 2) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(device->num_sms / size * size);
    config.blockDim = dim3(kGroupedThreads);
    config.dynamicSmemBytes = most;
    config.attrs = &attribute;
    config.numAttrs = 1;
    error =
        cudaOccupancyMaxActiveClusters(&device->max_clusters[Log2(size)], KernelFor(GroupedActivation::kNone), &config);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

GroupedTiling ChooseGroupedTiling(const GroupedGemmDevice& device, const GroupedGemmArgs& args) {
  GroupedTiling t = args.tiling;
  const int64_t mean = DivideUp(std::max<int64_t>(args.expected_rows, 1), args.num_experts);
  const int64_t weight_tiles = DivideUp(args.n, args.activation == GroupedActivation::kSiluGated ? 64 : 128);
  if (t.row_tile == 0) {
    // Room for the usual spread about the mean, so that a decode step seldom reads weights for a second tile.
    t.row_tile = mean <= 44 ? 64 : mean <= 100 ? 128 : mean <= 160 && t.splits <= 1 ? 192 : 256;
  }
  const int64_t tiles = args.num_experts * weight_tiles * DivideUp(mean, t.row_tile);
  if (t.splits == 0) {
    t.splits = 1;
    while (t.splits < 4 && tiles * t.splits * 2 <= device.num_sms && args.k / 64 >= 8 * t.splits) t.splits *= 2;
    if (t.splits > 1 && t.row_tile == 192) t.row_tile = 256;
  }
  if (t.multicast == 0) t.multicast = weight_tiles >= 2 ? 2 : 1;
  if (t.raster == 0) {
    t.raster = static_cast<int>(mean <= t.row_tile ? DivideUp(weight_tiles, t.multicast) : 16 / t.multicast);
  }
  return t;
}

cudaError_t GroupedGemm(const GroupedGemmDevice& device, const GroupedGemmArgs& args, cudaStream_t stream) {
  if (args.row_capacity == 0) return cudaSuccess;
  const GroupedTiling tiling = ChooseGroupedTiling(device, args);
  if (!Valid(args) || !Valid(tiling) || args.k / 64 < tiling.splits) return cudaErrorInvalidValue;
  const bool gated = args.activation == GroupedActivation::kSiluGated;
  const int64_t weight_tiles = DivideUp(args.n, gated ? 64 : 128);

  GroupedKernelParams params = {};
  const char* lowest = reinterpret_cast<const char*>(args.w[0]);
  const char* highest = lowest;
  for (int e = 1; e < args.num_experts; ++e) {
    lowest = std::min(lowest, reinterpret_cast<const char*>(args.w[e]));
    highest = std::max(highest, reinterpret_cast<const char*>(args.w[e]));
  }
  if (highest - lowest >= int64_t{1} << 38) return cudaErrorInvalidValue;
  for (int e = 0; e < args.num_experts; ++e) {
    const int64_t distance = reinterpret_cast<const char*>(args.w[e]) - lowest;
    if (distance % 128 != 0) return cudaErrorInvalidValue;
    params.w_start[e] = static_cast<int32_t>(distance / 128);
  }
  params.offsets = args.offsets;
  params.out = reinterpret_cast<__nv_bfloat16*>(args.out);
  params.out_stride = args.out_stride;
  params.num_experts = args.num_experts;
  params.columns = static_cast<int>(args.n);
  params.k_blocks = static_cast<int>(args.k / 64);
  params.row_tile = tiling.row_tile;
  params.stages = Stages(tiling.row_tile);
  params.multicast = tiling.multicast;
  params.splits = tiling.splits;
  params.x_box_rows = std::min(128, tiling.row_tile / tiling.multicast);
  if (tiling.row_tile % params.x_box_rows != 0) params.x_box_rows = 64;
  params.weight_units = static_cast<int>(DivideUp(weight_tiles, tiling.multicast));
  params.raster = tiling.raster;
  params.w_policy = args.expected_rows <= tiling.row_tile * args.num_experts ? ptx::kEvictFirst : ptx::kEvictNormal;

  CUtensorMap w_map;
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(args.w_stride) * 2;
  const cuuint64_t w_sizes[5] = {64, static_cast<cuuint64_t>((highest - lowest) / 128 + args.k / 64), 8, 2,
                                 static_cast<cuuint64_t>(args.n / (gated ? 8 : 16))};
  const cuuint64_t w_strides[4] = {128, row_bytes, gated ? args.n * row_bytes : 8 * row_bytes,
                                   (gated ? 8 : 16) * row_bytes};
  const cuuint32_t w_box[5] = {64, 1, 8, 2, 8};
  CUtensorMap x_map;
  const cuuint64_t x_sizes[2] = {static_cast<cuuint64_t>(args.k), static_cast<cuuint64_t>(args.row_capacity)};
  const cuuint64_t x_strides[1] = {static_cast<cuuint64_t>(args.x_stride) * 2};
  const cuuint32_t x_box[2] = {64, static_cast<cuuint32_t>(params.x_box_rows)};
  if (EncodeMap(device, &w_map, lowest, 5, w_sizes, w_strides, w_box) != CUDA_SUCCESS ||
      EncodeMap(device, &x_map, args.x, 2, x_sizes, x_strides, x_box) != CUDA_SUCCESS) {
    return cudaErrorInvalidValue;
  }

  const int size = tiling.multicast * tiling.splits;
  const int64_t units = params.weight_units * (args.row_capacity / tiling.row_tile + args.num_experts);
  const int clusters = static_cast<int>(std::min<int64_t>(device.max_clusters[Log2(size)], units));
  if (clusters < 1) return cudaErrorInvalidConfiguration;
  return Launch(KernelFor(args.activation), dim3(clusters * size), dim3(kGroupedThreads),
                DynamicSharedBytes(tiling.row_tile), stream, size, w_map, x_map, params);
}

}  // namespace soloist::cuda
