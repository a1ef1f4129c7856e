// CudaOps: Ops on one GPU. Checks what the host can see, chooses among kernels by sizes that the host knows, and
// launches; the kernels are in the files beside this one.
#ifndef SOLOIST_KERNELS_CUDA_CUDA_OPS_H_
#define SOLOIST_KERNELS_CUDA_CUDA_OPS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/grouped_gemm.h"
#include "kernels/cuda/lt_gemm.h"
#include "kernels/cuda/prefill_attention.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace soloist::cuda {

// Used by its rank's thread, with one stream at a time (the workspaces are shared).
class CudaOps final : public Ops {
 public:
  CudaOps(int device, const DeviceOptions& options) : device_(device), options_(options) {}

  // See Device::Prepare. Before it, only FillUniform works.
  absl::Status Prepare(const OpLimits& limits, Device& device);

  void Embed(const int32_t* token_ids, const int32_t* previous_tokens, const Tensor& table, const Tensor& out,
             Stream& stream) override;
  void AddRmsNorm(const Tensor& residual, const Tensor& delta, const Tensor& weight, float eps, const Tensor& out,
                  Stream& stream) override;
  void Linear(const Tensor& x, const Tensor& w, const Tensor& out, Stream& stream) override;
  void RopeAppendKv(const Tensor& qkv, const int32_t* positions, const int32_t* slot_mapping, const Tensor& cos_sin,
                    const KvLayer& kv, const Tensor& q_out, Stream& stream) override;
  void PagedAttention(const AttentionArgs& args, Stream& stream) override;
  void Route(const RouteArgs& args, Stream& stream) override;
  void DispatchRows(const DispatchRowsArgs& args, Stream& stream) override;
  void ExpertMlp(const ExpertMlpArgs& args, Stream& stream) override;
  void CombineRows(const CombineRowsArgs& args, Stream& stream) override;
  void GatherRows(const Tensor& x, const int32_t* rows, const Tensor& out, Stream& stream) override;
  void CopyBytes(void* dst, const void* src, int64_t bytes, Stream& stream) override;
  void FillUniform(uint64_t key, float scale, int64_t first_row, const Tensor& out, Stream& stream) override;
  void Sample(const SampleArgs& args, Stream& stream) override;

 private:
  // The matrix shapes that a step will ask for.
  absl::Status TuneLinear();
  absl::Status PreparePrefill();
  // Rows [first, first + rows), each a sequence.
  void DecodeRows(const AttentionArgs& args, int first, int rows, Stream& stream);
  // out = x * w^T, by cuBLASLt, and by GroupedGemm as the rows of one expert (up to kMaxFewRows; deterministic).
  void ByLibrary(const Tensor& x, const Tensor& w, const Tensor& out, Stream& stream);
  void FewRows(const Tensor& x, const Tensor& w, const Tensor& out, Stream& stream);
  void OneExpert(const ExpertMlpArgs& args, Stream& stream);
  void Grouped(const Tensor& from, const Tensor* w, const Tensor& to, const ExpertMlpArgs& args, const int32_t* offsets,
               GroupedActivation activation, Stream& stream);

  const int device_;
  const DeviceOptions options_;
  OpLimits limits_;
  GroupedGemmDevice grouped_;
  std::unique_ptr<LtGemm> lt_gemm_;
  std::unique_ptr<PrefillAttention> prefill_attention_;
  Buffer decode_workspace_;  // zeroed once: see DecodeAttention
  Buffer dispatch_scratch_;
  Buffer fp8_scratch_;        // see PrefillOptions
  Buffer compact_;            // act [max_expert_rows, hidden]: expert rows without gaps
  Buffer expert_offsets_;     // I32 [local_experts + 1]
  Buffer grouped_workspace_;  // zeroed once: see GroupedGemm
  Buffer row_offsets_;        // I32 [kMaxFewRows + 1, 2]: {0, m} for m rows
};

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_CUDA_OPS_H_
