// The small ops of a step on CUDA: everything between the matrix products. Formulas: kernels/ops.h.
//
// All functions enqueue on `stream` and return at once: no allocation, no synchronisation, no host wait; they can be
// captured in a CUDA graph. Kernels are launched with programmatic dependent launch (launch.cuh).
//  - Activations ("act") are BF16, the residual stream is F32, sums are F32, outputs are rounded once.
//  - Rows are accessed in vectors of 8 elements: the columns of every activation tensor must be a multiple of 8, its
//    address and the bytes of its stride multiples of 16. Rows may have strides. hidden <= 16,384 where a row is
//    normalised (AddRmsNorm, Route, CombineRows with a residual).
//  - A row's bits depend on that row alone, whatever the number of rows.
//  - cudaErrorInvalidValue: shapes, dtypes or alignments that the op does not take; nothing was enqueued. Otherwise the
//    error of the launch. No rows: cudaSuccess.
//  - Norm weights, gates, tables (cos_sin, base, order, the embedding table) are read before the kernels of the same
//    stream that come before have ended: no kernel of a step may write them.
#ifndef SOLOIST_KERNELS_CUDA_TOKEN_OPS_H_
#define SOLOIST_KERNELS_CUDA_TOKEN_OPS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops.h"

namespace soloist::cuda {

// out[i, :] = table[id(i), :]; see Ops::Embed. Token ids are device memory.
cudaError_t Embed(const int32_t* token_ids, const int32_t* previous_tokens,
                  const Tensor& table /* BF16 [vocab, hidden] */, const Tensor& out /* F32 [n, hidden] */,
                  cudaStream_t stream);

// residual += delta (unless delta.data is null); out = RMSNorm(residual) * weight. One kernel, one pass.
cudaError_t AddRmsNorm(const Tensor& residual /* F32 [n, hidden], in place */,
                       const Tensor& delta /* act [n, hidden] */, const Tensor& weight /* F32 [1, hidden] */, float eps,
                       const Tensor& out /* act [n, hidden] */, cudaStream_t stream);

// See Ops::RopeAppendKv. head_dim: a multiple of 16, <= 512. kv.dtype BF16 or F8E4M3 (saturating at +-448). A negative
// slot: the row's q is rotated and written, its k and v go nowhere.
cudaError_t RopeAppendKv(const Tensor& qkv /* act [n, (hq + 2 hkv) * head_dim] */, const int32_t* positions,
                         const int32_t* slot_mapping, const Tensor& cos_sin /* F32 [max_positions, head_dim] */,
                         const KvLayer& kv, const Tensor& q_out /* act [n, hq * head_dim] */, cudaStream_t stream);

// See RouteArgs. 1..512 experts, top_k 1..16 (and <= experts). Logits use the normalised row before it is rounded. NaN
// logits lose against all others; the chosen experts of a row always differ. One kernel.
cudaError_t Route(const RouteArgs& args, cudaStream_t stream);

// See DispatchRowsArgs. 1..512 experts, top_k 1..16; experts and slots without gaps between rows. n = 0 writes counts,
// begins and headers. Few choices (n * top_k <= kDispatchSmallChoices): one kernel, no scratch. More: three kernels and
// `scratch`, device memory of DispatchRowsScratchBytes.
constexpr int64_t kDispatchSmallChoices = 4096;
int64_t DispatchRowsScratchBytes(int64_t n, int64_t top_k, int num_experts);
cudaError_t DispatchRows(const DispatchRowsArgs& args, void* scratch, cudaStream_t stream);

// See CombineRowsArgs. Also fuses what AddRmsNorm does when args.residual is given. One kernel.
cudaError_t CombineRows(const CombineRowsArgs& args, cudaStream_t stream);

// out[i, :] = x[rows[i], :].
cudaError_t GatherRows(const Tensor& x /* act [n, hidden] */, const int32_t* rows,
                       const Tensor& out /* act [m, hidden] */, cudaStream_t stream);

// See Ops::FillUniform. out F32 or BF16 [n, cols], any shape and stride.
cudaError_t FillUniform(uint64_t key, float scale, int64_t first_row, const Tensor& out, cudaStream_t stream);

// Which rows of a tensor are worked on: those of `groups` if there are any (num_groups <= 1,024; host memory, read
// before the call returns), else rows [0, *total) (device memory), else all.
struct ValidRows {
  const ExpertRows* groups = nullptr;
  int num_groups = 0;
  const int32_t* total = nullptr;
};

// out[r, :] = 0.5 x (1 + erf(x / sqrt 2)) of in[r, :] for the valid rows r; other rows are not touched. in and out act
// [rows, h]; may be the same.
cudaError_t GeluRows(const Tensor& in, const ValidRows& valid, const Tensor& out, cudaStream_t stream);
// out[r, :] = silu(g) * u of in[r, :] = [g | u]. in act [rows, 2 h], out act [rows, h]; out may be in's first half
// (same address and stride).
cudaError_t SiluGateRows(const Tensor& in, const ValidRows& valid, const Tensor& out, cudaStream_t stream);

// The valid rows of `sparse` (act [rows, cols]) as one dense tensor without gaps, by expert, then by group order:
// before and after a grouped GEMM. 1..1,024 groups (host memory, read before the call returns).
struct CompactRowsArgs {
  Tensor sparse;
  const ExpertRows* groups = nullptr;
  int num_groups = 0;
  int num_experts = 0;  // groups[i].expert < num_experts
  Tensor dense;         // act [>= all rows that can be valid, cols]
  int32_t* row_offsets =
      nullptr;  // [num_experts + 1] device: first row of each expert in dense, then the total; or null
  int32_t* row_counts = nullptr;  // [num_experts] device, or null
};
// dense <- sparse. Writes row_offsets and row_counts.
cudaError_t CompactRows(const CompactRowsArgs& args, cudaStream_t stream);
// sparse <- dense, to the same rows. Other rows keep what they had; row_offsets and row_counts are not used.
cudaError_t ExpandRows(const CompactRowsArgs& args, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_TOKEN_OPS_H_
