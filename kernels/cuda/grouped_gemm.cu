#include <algorithm>

#include "kernels/cuda/grouped_gemm.h"
#include "kernels/cuda/grouped_gemm_kernel.cuh"

namespace soloist::cuda {
namespace {

using Kernel = void (*)(CUtensorMap, CUtensorMap, CUtensorMap, GroupedKernelParams);

constexpr int64_t kArrivalBytes = 4096;  // a counter for each block

// Shared memory: the ring of stages, the consumers' staging areas (two each where that costs no stage), GroupedShared.
struct SharedLayout {
  int stages;
  int staging_buffers;
  int bytes;
};
SharedLayout LayoutFor(int row_tile) {
  constexpr int kLimit = 227 * 1024;
  constexpr int kShared = static_cast<int>(sizeof(GroupedShared));
  const int stage = kGroupedWeightBytes + row_tile * 128;
  const auto stages = [&](int buffers) {
    return std::min(kGroupedMaxStages, (kLimit - kShared - 2 * buffers * kGroupedStagingBytes) / stage);
  };
  SharedLayout layout;
  layout.stages = stages(1);
  layout.staging_buffers = stages(2) == layout.stages ? 2 : 1;
  layout.bytes = layout.stages * stage + 2 * layout.staging_buffers * kGroupedStagingBytes + kShared;
  return layout;
}

constexpr Kernel kKernels[] = {GroupedGemmKernel<GroupedVariant<GroupedActivation::kNone, false>>,
                               GroupedGemmKernel<GroupedVariant<GroupedActivation::kGelu, false>>,
                               GroupedGemmKernel<GroupedVariant<GroupedActivation::kSiluGated, false>>,
                               GroupedGemmKernel<GroupedVariant<GroupedActivation::kNone, true>>};

Kernel KernelFor(const GroupedGemmArgs& args) {
  return kKernels[args.out_dtype == DType::kF32 ? 3 : static_cast<int>(args.activation)];
}

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool Valid(const GroupedGemmArgs& a) {
  if (a.out_dtype != DType::kBF16 && (a.out_dtype != DType::kF32 || a.activation != GroupedActivation::kNone)) {
    return false;
  }
  if (a.num_experts < 1 || a.num_experts > kMaxGroupedExperts || a.k < 64 || a.k % 64 != 0 || a.n < 16 ||
      a.n % 16 != 0) {
    return false;
  }
  if (a.x_stride < a.k || a.x_stride % 8 != 0 || a.w_stride < a.k || a.w_stride % 64 != 0 || a.out_stride < a.n ||
      a.out_stride % 8 != 0) {
    return false;
  }
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return aligned(a.x) && aligned(a.out) && aligned(a.w[0]) && aligned(a.workspace) && a.workspace != nullptr &&
         a.row_capacity < (int64_t{1} << 25);
}

bool Valid(const GroupedTiling& t) {
  return t.row_tile >= 64 && t.row_tile <= 256 && t.row_tile % 64 == 0 && t.multicast >= 1 && t.multicast <= 2 &&
         t.max_splits >= 1 && t.max_splits <= kGroupedMaxSplits && (t.max_splits & (t.max_splits - 1)) == 0 &&
         t.raster >= 1;
}

bool EncodeMap(const GroupedGemmDevice& device, CUtensorMap* map, const void* base, int rank, const cuuint64_t* sizes,
               const cuuint64_t* strides, const cuuint32_t* box) {
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(device.encode_map);
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(base), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

cudaError_t PrepareGroupedGemm(GroupedGemmDevice* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &device->encode_map, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  int most = 0;
  for (int row_tile = 64; row_tile <= 256; row_tile += 64) most = std::max(most, LayoutFor(row_tile).bytes);
  for (const Kernel kernel : kKernels) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  int num_sms = 0;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, index);
  if (error != cudaSuccess) return error;
  device->num_blocks = std::min<int>(num_sms, kArrivalBytes / sizeof(int));
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 2;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_sms / 2 * 2);
  config.blockDim = dim3(kGroupedThreads);
  config.dynamicSmemBytes = most;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&device->num_pairs, kKernels[0], &config);
}

int64_t GroupedGemmWorkspaceBytes(const GroupedGemmDevice& device) {
  return kArrivalBytes + device.num_blocks * kGroupedPartials * static_cast<int64_t>(sizeof(float4));
}

GroupedTiling ChooseGroupedTiling(const GroupedGemmDevice& device, const GroupedGemmArgs& args) {
  GroupedTiling t = args.tiling;
  const int64_t mean = DivideUp(std::max<int64_t>(args.expected_rows, 1), args.num_experts);
  const int64_t weight_tiles = DivideUp(args.n, args.activation == GroupedActivation::kSiluGated ? 64 : 128);
  // Room for the usual spread about the mean, so that a decode step seldom reads weights for a second tile.
  if (t.row_tile == 0) t.row_tile = mean <= 44 ? 64 : mean <= 100 ? 128 : mean <= 160 ? 192 : 256;
  if (t.multicast == 0) {
    // Where weights are all the traffic, a block alone is not held up by another.
    const bool weights_only = mean <= 64 || (args.num_experts == 1 && mean <= t.row_tile);
    t.multicast = weights_only || weight_tiles < 2 || device.num_pairs == 0 ? 1 : 2;
  }
  if (t.max_splits == 0) t.max_splits = kGroupedMaxSplits;
  if (t.raster == 0) {
    t.raster = static_cast<int>(mean <= t.row_tile ? DivideUp(weight_tiles, t.multicast) : 16 / t.multicast);
  }
  return t;
}

cudaError_t GroupedGemm(const GroupedGemmDevice& device, const GroupedGemmArgs& args, cudaStream_t stream) {
  if (args.row_capacity == 0) return cudaSuccess;
  const GroupedTiling tiling = ChooseGroupedTiling(device, args);
  if (!Valid(args) || !Valid(tiling)) return cudaErrorInvalidValue;
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
  params.out = args.out;
  params.out_stride = args.out_stride;
  params.arrivals = static_cast<int*>(args.workspace);
  params.partials = reinterpret_cast<float4*>(static_cast<char*>(args.workspace) + kArrivalBytes);
  params.num_experts = args.num_experts;
  params.columns = static_cast<int>(args.n);
  params.k_blocks = static_cast<int>(args.k / 64);
  params.row_tile = tiling.row_tile;
  params.row_tile_reciprocal = static_cast<uint32_t>(DivideUp(int64_t{1} << 32, tiling.row_tile));
  const SharedLayout layout = LayoutFor(tiling.row_tile);
  params.stages = layout.stages;
  params.staging_buffers = layout.staging_buffers;
  params.multicast = tiling.multicast;
  params.max_splits = tiling.max_splits;
  params.x_box_rows = std::min(128, tiling.row_tile / tiling.multicast);
  if (tiling.row_tile % params.x_box_rows != 0) params.x_box_rows = 64;
  // Rows that are not the expert's would cost a decode step half as many bytes again as the weights, out of the L2
  // cache: a tile for few rows reads them in small boxes, as far as there are any.
  if (tiling.row_tile == 64) params.x_box_rows = 16;
  params.weight_units = static_cast<int>(DivideUp(weight_tiles, tiling.multicast));
  params.raster = tiling.raster;
  params.expect_one_tile = args.num_experts == 1 && args.expected_rows > 0 && args.expected_rows <= tiling.row_tile;
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
  CUtensorMap out_map = {};
  const cuuint64_t out_sizes[2] = {static_cast<cuuint64_t>(args.n), static_cast<cuuint64_t>(args.row_capacity)};
  const cuuint64_t out_strides[1] = {static_cast<cuuint64_t>(args.out_stride) * 2};
  const cuuint32_t out_box[2] = {gated ? 32u : 64u, kGroupedChunkRows};
  if (!EncodeMap(device, &w_map, lowest, 5, w_sizes, w_strides, w_box) ||
      !EncodeMap(device, &x_map, args.x, 2, x_sizes, x_strides, x_box) ||
      (args.out_dtype == DType::kBF16 && !EncodeMap(device, &out_map, args.out, 2, out_sizes, out_strides, out_box))) {
    return cudaErrorInvalidValue;
  }

  // As many clusters as there may be work for: a unit is shared by at most max_splits.
  const int64_t units = params.weight_units * (args.row_capacity / tiling.row_tile + args.num_experts);
  const int64_t resident = tiling.multicast == 1 ? device.num_blocks : device.num_pairs;
  const int clusters = static_cast<int>(std::min(resident, units * tiling.max_splits));
  if (clusters < 1) return cudaErrorInvalidConfiguration;
  return Launch(KernelFor(args), dim3(clusters * tiling.multicast), dim3(kGroupedThreads), layout.bytes, stream,
                tiling.multicast, w_map, x_map, out_map, params);
}

}  // namespace soloist::cuda
