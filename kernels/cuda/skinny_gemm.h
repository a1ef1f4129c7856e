// Matrix products of few rows: out = x * w^T where reading w is all the work. They decide the decode speed.
//
// Bound: the bytes of w over the rate of reading device memory. While an earlier kernel still runs, the first weights
// are fetched already; so the gap between two products costs little as long as what is between them is small.
//
// Numerics: inputs BF16, sums F32, rounded once. The bits of an output row depend on its own row of x and on w only: k
// is cut into slices by k alone, each slice is summed by one warp in one order, the slices are added in their order.
//
// All functions enqueue only, allocate nothing and may be captured in a CUDA graph.
#ifndef SOLOIST_KERNELS_CUDA_SKINNY_GEMM_H_
#define SOLOIST_KERNELS_CUDA_SKINNY_GEMM_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops.h"

namespace soloist::cuda {

inline constexpr int kMaxSkinnyRows = 64;
inline constexpr int kMaxSkinnyGroups = 1024;
inline constexpr int kMaxSkinnyExperts = 256;

struct SkinnyGemmArgs {
  const BFloat16* x = nullptr;     // [m, k]; 16-byte aligned
  int64_t x_stride = 0;            // elements, multiple of 8
  int m = 0;                       // 0..kMaxSkinnyRows
  const BFloat16* w = nullptr;     // [n, k], contiguous; 16-byte aligned
  int64_t n = 0;                   // multiple of 8
  int64_t k = 0;                   // multiple of 8
  void* out = nullptr;             // [m, n]; 8-byte aligned
  DType out_dtype = DType::kBF16;  // BF16 or F32
  int64_t out_stride = 0;          // elements, even
};

// out = x * w^T. cudaErrorInvalidValue if the arguments break what SkinnyGemmArgs says.
// Moves n * k * 2 bytes of w from device memory; x from L2, once or less per multiprocessor.
cudaError_t SkinnyGemm(const SkinnyGemmArgs& args, cudaStream_t stream);

enum class SkinnyEpilogue : uint8_t {
  kNone,
  kGelu,       // 0.5 v (1 + erf(v / sqrt 2))
  kSiluGated,  // silu(g) * u; g are the first n / 2 rows of w, u the others; out has n / 2 columns
};

// One half of the expert MLPs of a rank: for each group of rows, out[row, :] = epilogue(x[row, :] * w[expert]^T).
struct SkinnyExpertsArgs {
  const BFloat16* x = nullptr;  // [rows, k]
  int64_t x_stride = 0;
  const ExpertRows* groups = nullptr;  // host memory, read during the call; row_count and row_begin_on_device: device
  int num_groups = 0;                  // 0..kMaxSkinnyGroups; groups of one expert are consecutive
  const BFloat16* const* w = nullptr;  // host array [num_experts] of device pointers to [n, k]
  int num_experts = 0;                 // of them at most kMaxSkinnyExperts have groups
  int64_t n = 0;                       // multiple of 8 (16 if gated)
  int64_t k = 0;                       // multiple of 8
  SkinnyEpilogue epilogue = SkinnyEpilogue::kNone;
  BFloat16* out = nullptr;  // [rows, n or n / 2]; rows of no group keep what they had
  int64_t out_stride = 0;
  // Most rows that one expert will probably have, as far as the host knows: chooses the kernel, not the result. An
  // expert with more rows than the kernel takes at once has its weights read again for each further pass.
  int expected_rows = 0;
  // Whether the kernel before this one in the stream is a SkinnyExperts over the same groups: the counts are then final
  // before that kernel ends, and this one reads them (and prefetches weights) while it still runs.
  bool follows_same_groups = false;
};

// Any number of rows, also none. Reads only the weights of experts that have rows. Errors as SkinnyGemm.
cudaError_t SkinnyExperts(const SkinnyExpertsArgs& args, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_SKINNY_GEMM_H_
