// Grouped matrix product of the experts of one rank: rows that lie expert after expert, each expert's share through its
// own weight matrix, with the row counts in device memory only. One launch, no host wait, nothing allocated.
//
// One persistent kernel (grouped_gemm.cu) serves decode, where it streams the weights once at nearly the read rate, and
// prefill, where it is bound by the tensor cores. Weights are the 128-row side of a tile and activation rows its
// column side, so that a few rows waste little.
#ifndef SOLOIST_KERNELS_CUDA_GROUPED_GEMM_H_
#define SOLOIST_KERNELS_CUDA_GROUPED_GEMM_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/tensor.h"

namespace soloist::cuda {

inline constexpr int kMaxGroupedExperts = 256;

enum class GroupedActivation : uint8_t {
  kNone,
  kGelu,       // 0.5 y (1 + erf(y / sqrt 2))
  kSiluGated,  // silu(g) * u: w has the n gate rows, then the n up rows
};

// How the work is cut. Zeros: chosen from expected_rows. Only the parts of k change bits: the device takes as many (1,
// 2, 4, 8; up to max_splits) as the rows that came leave room for. max_splits 1 keeps a row's bits independent of all
// other rows.
struct GroupedTiling {
  int row_tile = 0;    // rows of a tile: 64, 128, 192 or 256
  int multicast = 0;   // neighbouring tiles of weights that share one read of the rows: 1 or 2
  int max_splits = 0;  // most parts of k, each on blocks of its own: 1, 2, 4 or 8
  int raster = 0;      // tiles of weights (in units of multicast) that run beside each other before the next rows
};

// What GroupedGemm knows of a device. Filled once by PrepareGroupedGemm.
struct GroupedGemmDevice {
  void* encode_map = nullptr;  // the driver's cuTensorMapEncodeTiled
  int num_blocks = 0;          // resident, alone
  int num_pairs = 0;           // resident, as clusters of two
};

struct GroupedGemmArgs {
  const BFloat16* x = nullptr;       // [row_capacity, k], 16-byte aligned
  int64_t x_stride = 0;              // elements, multiple of 8
  const int32_t* offsets = nullptr;  // device, [num_experts + 1], ascending: rows [offsets[e], offsets[e + 1]) of x and
                                     // out are expert e's. offsets[num_experts] <= row_capacity
  int num_experts = 0;               // 1 to kMaxGroupedExperts
  const BFloat16* const* w = nullptr;  // host, [num_experts]: [n, k], for kSiluGated [2 n, k]; 16-byte aligned, and a
                                       // multiple of 128 bytes (less than 2^38) from each other
  int64_t w_stride = 0;                // elements, multiple of 64
  int64_t n = 0;                       // columns of out, multiple of 16
  int64_t k = 0;                       // multiple of 64
  GroupedActivation activation = GroupedActivation::kNone;
  DType out_dtype = DType::kBF16;  // or kF32 with kNone
  void* out = nullptr;             // [row_capacity, n], 16-byte aligned; rows of no expert are not written
  int64_t out_stride = 0;          // elements, multiple of 8
  int64_t row_capacity = 0;
  int64_t expected_rows = 0;  // of all experts together, as far as the host knows
  void* workspace = nullptr;  // GroupedGemmWorkspaceBytes, zeroed once; calls that share it run one after the other
  GroupedTiling tiling;
};

// Once for the current device, outside of stream capture. cudaErrorNotSupported where the driver has no tensor maps.
cudaError_t PrepareGroupedGemm(GroupedGemmDevice* device);

int64_t GroupedGemmWorkspaceBytes(const GroupedGemmDevice& device);

// What GroupedGemm uses for the zeros of args.tiling.
GroupedTiling ChooseGroupedTiling(const GroupedGemmDevice& device, const GroupedGemmArgs& args);

// out[i, :] = activation(x[i, :] * w[e]^T) for the rows i of each expert e. f32 sums, rounded to out_dtype once.
// Bytes: each w[e] that has rows, once per 256 of its rows or fewer; 2 * rows * n * k FLOP (twice that if gated).
// Launched with programmatic dependent launch, and reads w before the kernels before it have ended: they must not write
// w. cudaErrorInvalidValue where a condition above is broken. May be captured in a graph.
cudaError_t GroupedGemm(const GroupedGemmDevice& device, const GroupedGemmArgs& args, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_GROUPED_GEMM_H_
