#include "kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/status.h"
#include "kernels/cuda/copy_bytes.h"
#include "kernels/cuda/cuda_error.h"
#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/token_ops.h"
#include "spdlog/spdlog.h"

namespace soloist::cuda {
namespace {

// FP8 cache: room for a BF16 copy of so many keys and values of one layer, for cuDNN.
constexpr int64_t kFp8ScratchTokens = 131072;

// Deterministic products are made in pieces of so many rows.
constexpr int64_t kMaxFewRows = 64;

// One expert's products of more rows are cuBLASLt's too, where the host knows that all rows are valid.
constexpr int64_t kMaxGroupedRows = 1024;

GroupedActivation ActivationOf(Activation activation) {
  return activation == Activation::kSiluGated ? GroupedActivation::kSiluGated : GroupedActivation::kGelu;
}

// Every row's width: what GroupedGemm takes.
constexpr int64_t kWidthUnit = 64;
// And a product's: of columns, and of the distance of its rows.
constexpr int64_t kColumnUnit = 16, kStrideUnit = 8;

BFloat16* Bf16(const Tensor& tensor) { return tensor.as<BFloat16>(); }

}  // namespace

absl::Status CudaOps::Prepare(const OpLimits& limits, Device& device) {
  limits_ = limits;
  const std::pair<const char*, int64_t> widths[] = {
      {"hidden_size", limits.hidden_size},
      {"num_heads * head_dim", int64_t{limits.num_heads} * limits.head_dim},
      {"expert_hidden_size", limits.expert_hidden_size}};
  for (const auto& [name, width] : widths) {
    if (width % kWidthUnit != 0)
      return InvalidArgument("{} is {}, on CUDA it must be a multiple of {}", name, width, kWidthUnit);
  }
  if (options_.deterministic && (limits.vocab_size % kStrideUnit != 0 || limits.vocab_size < kColumnUnit)) {
    return InvalidArgument("vocab_size is {}, in deterministic mode on CUDA it must be a multiple of {}, at least {}",
                           limits.vocab_size, kStrideUnit, kColumnUnit);
  }
  const int64_t kv_row = 4 * int64_t{limits.num_kv_heads} * limits.head_dim;
  const int decode_rows = static_cast<int>(std::min<int64_t>(limits.max_sequences, kDecodeAttentionMaxRows));
  ASSIGN_OR_RETURN(decode_workspace_, device.Allocate(DecodeAttentionWorkspaceBytes(
                                          decode_rows, limits.max_model_len, limits.num_heads, limits.head_dim)));
  ASSIGN_OR_RETURN(dispatch_scratch_,
                   device.Allocate(DispatchRowsScratchBytes(limits.max_tokens, limits.top_k, limits.num_experts)));
  if (limits.fp8_kv) {
    ASSIGN_OR_RETURN(
        fp8_scratch_,
        device.Allocate(std::min(kFp8ScratchTokens, limits.max_sequences * limits.max_model_len) * kv_row));
  }
  ASSIGN_OR_RETURN(compact_, device.Allocate(limits.max_expert_rows * limits.hidden_size * 2));
  ASSIGN_OR_RETURN(expert_offsets_, device.Allocate((limits.local_experts + 1) * 4));
  RETURN_IF_ERROR(PreparePrefill());
  RETURN_IF_CUDA_ERROR(device_, PrepareGroupedGemm(&grouped_));
  ASSIGN_OR_RETURN(grouped_workspace_, device.Allocate(GroupedGemmWorkspaceBytes(grouped_)));
  std::vector<int32_t> offsets;
  for (int32_t m = 0; m <= kMaxFewRows; ++m) offsets.insert(offsets.end(), {0, m});
  ASSIGN_OR_RETURN(row_offsets_, device.Allocate(std::ssize(offsets) * 4));
  RETURN_IF_CUDA_ERROR(device_,
                       cudaMemcpy(row_offsets_.data(), offsets.data(), row_offsets_.bytes(), cudaMemcpyHostToDevice));
  return options_.deterministic ? absl::OkStatus() : TuneLinear();
}

absl::Status CudaOps::PreparePrefill() {
  PrefillOptions options = {.max_model_len = limits_.max_model_len,
                            .kv_scratch = fp8_scratch_.data(),
                            .kv_scratch_bytes = fp8_scratch_.bytes(),
                            .use_cudnn = !options_.deterministic};
  auto prefill = PrefillAttention::Create(options);
  if (!prefill.ok() && options.use_cudnn) {
    spdlog::warn("cuda:{} attention of prompts takes 2.5 times as long as it could: {}", device_,
                 prefill.status().message());
    options.use_cudnn = false;
    prefill = PrefillAttention::Create(options);
  }
  RETURN_IF_ERROR(prefill.status());
  prefill_attention_ = *std::move(prefill);
  AttentionArgs like;
  like.kv = {.dtype = limits_.fp8_kv ? DType::kF8E4M3 : DType::kBF16,
             .num_kv_heads = limits_.num_kv_heads,
             .block_size = limits_.kv_block_size,
             .head_dim = limits_.head_dim};
  like.num_heads = limits_.num_heads;
  like.sliding_window = limits_.sliding_window;
  like.scale = 1.0f / std::sqrt(static_cast<float>(limits_.head_dim));
  return options.use_cudnn && limits_.kv_block_size > 0 ? prefill_attention_->Warm(like) : absl::OkStatus();
}

absl::Status CudaOps::TuneLinear() {
  const int64_t max_m = std::max({limits_.max_tokens, limits_.max_logit_rows, limits_.max_expert_rows});
  ASSIGN_OR_RETURN(lt_gemm_, LtGemm::Create({.max_m = max_m, .tuning_file = options_.tuning_file}));
  const int64_t hidden = limits_.hidden_size, q = int64_t{limits_.num_heads} * limits_.head_dim,
                kv = int64_t{limits_.num_kv_heads} * limits_.head_dim;
  const auto tune = [&](int64_t n, int64_t k, DType out, int64_t x_stride, int64_t most) {
    return lt_gemm_->Tune({.n = n, .k = k, .out_dtype = out, .x_stride = x_stride, .w_stride = k, .out_stride = n},
                          most);
  };
  RETURN_IF_ERROR(tune(limits_.vocab_size, hidden, DType::kF32, hidden, limits_.max_logit_rows));
  RETURN_IF_ERROR(tune(q + 2 * kv, hidden, DType::kBF16, hidden, limits_.max_tokens));
  RETURN_IF_ERROR(tune(hidden, q, DType::kBF16, q, limits_.max_tokens));
  if (limits_.local_experts == 1) {
    const int64_t inner = limits_.expert_hidden_size, wide = inner * (limits_.gated_experts ? 2 : 1);
    RETURN_IF_ERROR(tune(wide, hidden, DType::kBF16, hidden, limits_.max_expert_rows));
    RETURN_IF_ERROR(tune(hidden, inner, DType::kBF16, wide, limits_.max_expert_rows));
  }
  spdlog::info("cuda:{} matrix products: {} algorithms searched, the others known", device_, lt_gemm_->searched());
  return lt_gemm_->Save();
}

void CudaOps::Embed(const int32_t* token_ids, const int32_t* previous_tokens, const Tensor& table, const Tensor& out,
                    Stream& stream) {
  AsCuda(stream).Note(cuda::Embed(token_ids, previous_tokens, table, out, AsCuda(stream).get()), "Embed");
}

void CudaOps::AddRmsNorm(const Tensor& residual, const Tensor& delta, const Tensor& weight, float eps,
                         const Tensor& out, Stream& stream) {
  AsCuda(stream).Note(cuda::AddRmsNorm(residual, delta, weight, eps, out, AsCuda(stream).get()), "AddRmsNorm");
}

void CudaOps::Linear(const Tensor& x, const Tensor& w, const Tensor& out, Stream& stream) {
  CHECK(x.cols == w.cols && out.cols == w.rows && x.rows == out.rows && w.stride == w.cols);
  if (x.rows == 0) return;
  if (!options_.deterministic) return ByLibrary(x, w, out, stream);
  // A width of 8 more than a multiple of GroupedGemm's unit (a vocabulary): the last columns once more, alike.
  const int64_t even = w.rows / kColumnUnit * kColumnUnit;
  for (int64_t row = 0; row < x.rows; row += kMaxFewRows) {
    const int64_t rows = std::min(kMaxFewRows, x.rows - row);
    const Tensor from = x.Rows(row, rows), to = out.Rows(row, rows);
    FewRows(from, w.Rows(0, even), to.Cols(0, even), stream);
    if (even < w.rows) {
      const int64_t last = w.rows - kColumnUnit;
      FewRows(from, w.Rows(last, kColumnUnit), to.Cols(last, kColumnUnit), stream);
    }
  }
}

void CudaOps::ByLibrary(const Tensor& x, const Tensor& w, const Tensor& out, Stream& stream) {
  AsCuda(stream).Note(lt_gemm_->Run({.n = w.rows,
                                     .k = w.cols,
                                     .out_dtype = out.dtype,
                                     .x_stride = x.stride,
                                     .w_stride = w.stride,
                                     .out_stride = out.stride},
                                    Bf16(x), x.rows, Bf16(w), out.data, AsCuda(stream).get()));
}

void CudaOps::FewRows(const Tensor& x, const Tensor& w, const Tensor& out, Stream& stream) {
  const BFloat16* weights = Bf16(w);
  AsCuda(stream).Note(GroupedGemm(grouped_,
                                  {.x = Bf16(x),
                                   .x_stride = x.stride,
                                   .offsets = static_cast<const int32_t*>(row_offsets_.data()) + 2 * x.rows,
                                   .num_experts = 1,
                                   .w = &weights,
                                   .w_stride = w.stride,
                                   .n = w.rows,
                                   .k = w.cols,
                                   .out_dtype = out.dtype,
                                   .out = out.data,
                                   .out_stride = out.stride,
                                   .row_capacity = x.rows,
                                   .expected_rows = x.rows,
                                   .workspace = grouped_workspace_.data(),
                                   .tiling = {.max_splits = 1}},
                                  AsCuda(stream).get()),
                      "GroupedGemm");
}

void CudaOps::RopeAppendKv(const Tensor& qkv, const int32_t* positions, const int32_t* slot_mapping,
                           const Tensor& cos_sin, const KvLayer& kv, const Tensor& q_out, Stream& stream) {
  AsCuda(stream).Note(cuda::RopeAppendKv(qkv, positions, slot_mapping, cos_sin, kv, q_out, AsCuda(stream).get()),
                      "RopeAppendKv");
}

void CudaOps::PagedAttention(const AttentionArgs& args, Stream& stream) {
  if (args.q.rows == 0) return;
  // In deterministic mode one kernel does prefill and decode, so that a recomputed row has the bits that it had.
  const int decodes = options_.deterministic ? 0 : args.num_decodes;
  for (int first = 0; first < decodes; first += kDecodeAttentionMaxRows) {
    DecodeRows(args, first, std::min(kDecodeAttentionMaxRows, decodes - first), stream);
  }
  if (decodes < args.num_sequences) AsCuda(stream).Note(prefill_attention_->Run(args, decodes, AsCuda(stream).get()));
}

// Lengths and tables are of the step's plan, which is copied in before the first kernel.
void CudaOps::DecodeRows(const AttentionArgs& args, int first, int rows, Stream& stream) {
  AsCuda(stream).Note(DecodeAttention({.q = Bf16(args.q.Rows(first, rows)),
                                       .q_stride = args.q.stride,
                                       .kv = args.kv,
                                       .kv_lens = args.seq_lens + first,
                                       .block_tables = args.block_tables + int64_t{first} * args.max_blocks,
                                       .early_tables = true,
                                       .max_blocks = args.max_blocks,
                                       .max_len = args.max_seq_len,
                                       .num_rows = rows,
                                       .num_heads = args.num_heads,
                                       .sliding_window = args.sliding_window,
                                       .scale = args.scale,
                                       .out = Bf16(args.out.Rows(first, rows)),
                                       .out_stride = args.out.stride,
                                       .workspace = decode_workspace_.data(),
                                       .workspace_bytes = decode_workspace_.bytes()},
                                      AsCuda(stream).get()),
                      "DecodeAttention");
}

void CudaOps::Route(const RouteArgs& args, Stream& stream) {
  AsCuda(stream).Note(cuda::Route(args, AsCuda(stream).get()), "Route");
}

void CudaOps::DispatchRows(const DispatchRowsArgs& args, Stream& stream) {
  CHECK_LE(DispatchRowsScratchBytes(args.x.rows, args.experts.cols, args.num_experts), dispatch_scratch_.bytes());
  AsCuda(stream).Note(cuda::DispatchRows(args, dispatch_scratch_.data(), AsCuda(stream).get()), "DispatchRows");
}

void CudaOps::ExpertMlp(const ExpertMlpArgs& args, Stream& stream) {
  if (args.num_groups == 0 || args.x.rows == 0) return;
  CHECK_LE(args.x.rows, limits_.max_expert_rows);
  CHECK_LE(args.num_experts, kMaxGroupedExperts);
  const cudaStream_t cuda_stream = AsCuda(stream).get();
  const Tensor inner = args.scratch.Rows(0, args.x.rows).Cols(0, args.w_out[0].cols);
  if (args.row_offsets != nullptr) {
    if (args.num_experts == 1 && args.x.rows > kMaxGroupedRows && !options_.deterministic)
      return OneExpert(args, stream);
    Grouped(args.x, args.w_in, inner, args, args.row_offsets, ActivationOf(args.activation), stream);
    Grouped(inner, args.w_out, args.out, args, args.row_offsets, GroupedActivation::kNone, stream);
    return;
  }
  // Rows without gaps, and back to where they came from.
  auto* offsets = static_cast<int32_t*>(expert_offsets_.data());
  CompactRowsArgs compact = {.sparse = args.x,
                             .groups = args.groups,
                             .num_groups = args.num_groups,
                             .num_experts = args.num_experts,
                             .dense = compact_.View<BFloat16>(args.x.rows, args.x.cols),
                             .row_offsets = offsets};
  AsCuda(stream).Note(CompactRows(compact, cuda_stream), "CompactRows");
  Grouped(compact.dense, args.w_in, inner, args, offsets, ActivationOf(args.activation), stream);
  Grouped(inner, args.w_out, compact.dense, args, offsets, GroupedActivation::kNone, stream);
  compact.sparse = args.out;
  AsCuda(stream).Note(ExpandRows(compact, cuda_stream), "ExpandRows");
}

// Every row is the one expert's: what lies behind the last valid row is computed too and read by nobody.
void CudaOps::OneExpert(const ExpertMlpArgs& args, Stream& stream) {
  const Tensor wide = args.scratch.Rows(0, args.x.rows);
  const Tensor inner = wide.Cols(0, args.w_out[0].cols);
  ByLibrary(args.x, args.w_in[0], wide, stream);
  const cudaError_t error = args.activation == Activation::kSiluGated
                                ? SiluGateRows(wide, {}, inner, AsCuda(stream).get())
                                : GeluRows(wide, {}, inner, AsCuda(stream).get());
  AsCuda(stream).Note(error, "activation of expert rows");
  ByLibrary(inner, args.w_out[0], args.out, stream);
}

// to = activation(from * w[e]^T) for the rows of each expert.
void CudaOps::Grouped(const Tensor& from, const Tensor* w, const Tensor& to, const ExpertMlpArgs& args,
                      const int32_t* offsets, GroupedActivation activation, Stream& stream) {
  const BFloat16* weights[kMaxGroupedExperts];
  for (int e = 0; e < args.num_experts; ++e) weights[e] = Bf16(w[e]);
  AsCuda(stream).Note(GroupedGemm(grouped_,
                                  {.x = Bf16(from),
                                   .x_stride = from.stride,
                                   .offsets = offsets,
                                   .num_experts = args.num_experts,
                                   .w = weights,
                                   .w_stride = w[0].stride,
                                   .n = to.cols,
                                   .k = from.cols,
                                   .activation = activation,
                                   .out = Bf16(to),
                                   .out_stride = to.stride,
                                   .row_capacity = from.rows,
                                   .expected_rows = args.expected_rows,
                                   .workspace = grouped_workspace_.data(),
                                   .tiling = {.max_splits = options_.deterministic ? 1 : 0}},
                                  AsCuda(stream).get()),
                      "GroupedGemm");
}

void CudaOps::CombineRows(const CombineRowsArgs& args, Stream& stream) {
  AsCuda(stream).Note(cuda::CombineRows(args, AsCuda(stream).get()), "CombineRows");
}

void CudaOps::GatherRows(const Tensor& x, const int32_t* rows, const Tensor& out, Stream& stream) {
  AsCuda(stream).Note(cuda::GatherRows(x, rows, out, AsCuda(stream).get()), "GatherRows");
}

void CudaOps::CopyBytes(void* dst, const void* src, int64_t bytes, Stream& stream) {
  AsCuda(stream).Note(cuda::CopyBytes(dst, src, bytes, AsCuda(stream).get()), "CopyBytes");
}

void CudaOps::FillUniform(uint64_t key, float scale, int64_t first_row, const Tensor& out, Stream& stream) {
  AsCuda(stream).Note(cuda::FillUniform(key, scale, first_row, out, AsCuda(stream).get()), "FillUniform");
}

void CudaOps::Sample(const SampleArgs& args, Stream& stream) {
  AsCuda(stream).Note(cuda::Sample(args, AsCuda(stream).get()), "Sample");
}

}  // namespace soloist::cuda
