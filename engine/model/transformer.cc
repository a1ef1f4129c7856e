#include "engine/model/transformer.h"

#include <cmath>
#include <utility>

#include "base/status.h"

namespace soloist {

Transformer::Transformer(const ModelConfig& config, const TransformerLimits& limits, const SharedWeights& shared,
                         const ExpertWeights& experts, Device& device, TokenDispatcher& dispatcher)
    : config_(config),
      limits_(limits),
      shared_(shared),
      expert_weights_(experts),
      device_(device),
      dispatcher_(dispatcher),
      act_(device.activation_dtype()) {}

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Create(const ModelConfig& config,
                                                                 const TransformerLimits& limits,
                                                                 const SharedWeights& shared,
                                                                 const ExpertWeights& experts, Device& device,
                                                                 TokenDispatcher& dispatcher) {
  std::unique_ptr<Transformer> transformer(new Transformer(config, limits, shared, experts, device, dispatcher));
  RETURN_IF_ERROR(transformer->Allocate());
  return transformer;
}

absl::Status Transformer::Allocate() {
  const int64_t tokens = limits_.max_tokens, hidden = config_.hidden_size;
  const int64_t q_width = static_cast<int64_t>(config_.num_heads) * config_.head_dim;
  const int64_t kv_width = static_cast<int64_t>(config_.num_kv_heads) * config_.head_dim;
  const int64_t inner = config_.expert_hidden_size * (config_.activation == Activation::kSiluGated ? 2 : 1);
  const int64_t routed = config_.num_layers * tokens * config_.experts_per_token;
  const int64_t act = DTypeBytes(act_), f32 = DTypeBytes(DType::kF32), i32 = DTypeBytes(DType::kI32);
  const std::pair<Buffer*, int64_t> buffers[] = {
      {&residual_, tokens * hidden * f32},
      {&normed_, tokens * hidden * act},
      {&delta_, tokens * hidden * act},
      {&qkv_, tokens * (q_width + 2 * kv_width) * act},
      {&q_, tokens * q_width * act},
      {&attention_, tokens * q_width * act},
      {&expert_scratch_, dispatcher_.max_expert_rows() * inner * act},
      {&experts_, routed * i32},
      {&weights_, routed * f32},
      {&expert_counts_, kMaxMicroBatches * config_.num_layers * config_.num_experts * i32},
      {&last_hidden_, limits_.max_logit_rows * hidden * act},
      {&logits_, limits_.max_logit_rows * config_.vocab_size * f32},
  };
  for (const auto& [buffer, bytes] : buffers) {
    ASSIGN_OR_RETURN(*buffer, device_.Allocate(bytes));
  }
  return absl::OkStatus();
}

absl::Status Transformer::Forward(const StepInputs& in, const std::vector<KvLayer>& kv, CommTimes* times,
                                  Stream& stream) {
  const int64_t tokens = in.num_tokens(), hidden = config_.hidden_size;
  CHECK(tokens <= in.capacity.max_tokens && in.capacity.max_tokens <= limits_.max_tokens);
  CHECK(in.num_micro_batches == 1 || (in.num_micro_batches == kMaxMicroBatches && in.num_rows == nullptr));
  CHECK_LE(in.num_logit_rows, limits_.max_logit_rows);
  CHECK_EQ(static_cast<int>(kv.size()), config_.num_layers);
  Ops& ops = device_.ops();
  const Tensor residual = residual_.View<float>(tokens, hidden), normed = Act(normed_, tokens, hidden);

  dispatcher_.queue().BeginStep(/*overlaps=*/in.num_micro_batches > 1, times);
  ops.Embed(in.token_ids, in.previous_tokens, shared_.embedding, residual, stream);
  ops.AddRmsNorm(residual, Tensor{}, shared_.layers[0].attention_norm, config_.rms_norm_eps, normed, stream);
  GroupEnds("embed");
  if (const absl::Status status = RunLayers(in, kv, stream); !status.ok()) {
    dispatcher_.queue().Abandon(status);
    return status;
  }
  const Tensor last = Act(last_hidden_, in.num_logit_rows, hidden);
  ops.GatherRows(normed, in.logit_rows, last, stream);
  ops.Linear(last, shared_.lm_head, logits(in.num_logit_rows), stream);
  GroupEnds("head");
  return absl::OkStatus();
}

// A's dispatch travels under B's attention, B's under A's experts, A's combine under B's experts, and B's combine under
// A's attention in the next layer.
absl::Status Transformer::RunLayers(const StepInputs& in, const std::vector<KvLayer>& kv, Stream& stream) {
  const bool two = in.num_micro_batches > 1;
  Part a{.batch = in.micro_batches[0], .index = 0, .first_row = 0, .alone = !two, .handle = {}};
  Part b{.batch = in.micro_batches[1], .index = 1, .first_row = a.batch.num_tokens, .alone = false, .handle = {}};
  const int layers = static_cast<int>(config_.num_layers);
  for (int layer = 0; layer < layers; ++layer) {
    Attention(layer, in, kv[layer], a, stream);
    RETURN_IF_ERROR(StartDispatch(layer, in, a, stream));
    if (two) {
      if (layer > 0) RETURN_IF_ERROR(FinishCombine(layer - 1, b, stream));
      Attention(layer, in, kv[layer], b, stream);
      RETURN_IF_ERROR(StartDispatch(layer, in, b, stream));
    }
    RETURN_IF_ERROR(FinishDispatch(a, stream));
    Experts(layer, a, stream);
    RETURN_IF_ERROR(dispatcher_.StartCombine(a.handle, stream));
    if (two) {
      RETURN_IF_ERROR(FinishDispatch(b, stream));
      Experts(layer, b, stream);
      RETURN_IF_ERROR(dispatcher_.StartCombine(b.handle, stream));
    }
    RETURN_IF_ERROR(FinishCombine(layer, a, stream));
  }
  return two ? FinishCombine(layers - 1, b, stream) : absl::OkStatus();
}

void Transformer::Attention(int layer, const StepInputs& in, const KvLayer& kv, const Part& part, Stream& stream) {
  Ops& ops = device_.ops();
  const LayerWeights& weights = shared_.layers[layer];
  const MicroBatch& batch = part.batch;
  const int64_t q_width = static_cast<int64_t>(config_.num_heads) * config_.head_dim;
  const Tensor qkv = Act(qkv_, part, q_width + 2LL * config_.num_kv_heads * config_.head_dim);
  const Tensor q = Act(q_, part, q_width), out = Act(attention_, part, q_width);
  ops.Linear(Act(normed_, part, config_.hidden_size), weights.qkv, qkv, stream);
  GroupEnds("attention_linear", part);
  ops.RopeAppendKv(qkv, in.positions + part.first_row, in.slot_mapping + part.first_row, shared_.cos_sin, kv, q,
                   stream);
  ops.PagedAttention({.q = q,
                      .kv = kv,
                      .query_starts = batch.query_starts,
                      .seq_lens = batch.seq_lens,
                      .block_tables = batch.block_tables,
                      .num_sequences = batch.num_sequences,
                      .num_decodes = batch.num_decodes,
                      .max_query_rows = batch.max_query_rows,
                      .max_seq_len = batch.max_seq_len,
                      .max_blocks = in.max_blocks,
                      .num_heads = static_cast<int>(config_.num_heads),
                      .sliding_window = static_cast<int>(config_.sliding_window),
                      .scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
                      .out = out},
                     stream);
  GroupEnds("attention", part);
  ops.Linear(out, weights.attention_output, Act(delta_, part, config_.hidden_size), stream);
  GroupEnds("attention_linear", part);
}

absl::Status Transformer::StartDispatch(int layer, const StepInputs& in, const Part& part, Stream& stream) {
  const int64_t first = layer * limits_.max_tokens + part.first_row, n = part.batch.num_tokens;
  const Tensor normed = Act(normed_, part, config_.hidden_size);
  const Tensor experts = routed_experts().Rows(first, n), weights = routed_weights().Rows(first, n);
  device_.ops().Route({.residual = Residual(part),
                       .delta = Act(delta_, part, config_.hidden_size),
                       .norm_weight = shared_.layers[layer].moe_norm,
                       .eps = config_.rms_norm_eps,
                       .normed = normed,
                       .gate = shared_.layers[layer].router,
                       .num_rows = in.num_rows,
                       .experts = experts,
                       .weights = weights},
                      stream);
  GroupEnds("router", part);
  RETURN_IF_ERROR(dispatcher_.StartDispatch(part.index,
                                            {.x = normed,
                                             .experts = experts,
                                             .weights = weights,
                                             .capacity = in.capacity,
                                             .counts = expert_counts(part.index).Rows(layer, 1).as<int32_t>()},
                                            stream));
  if (!part.alone) GroupEnds("dispatch", part);
  return absl::OkStatus();
}

absl::Status Transformer::FinishDispatch(Part& part, Stream& stream) {
  ASSIGN_OR_RETURN(part.handle, dispatcher_.FinishDispatch(part.index, stream));
  GroupEnds("dispatch", part);
  return absl::OkStatus();
}

void Transformer::Experts(int layer, const Part& part, Stream& stream) {
  const auto& w_in = expert_weights_.layers[layer].w_in;
  const auto& w_out = expert_weights_.layers[layer].w_out;
  const DispatchHandle& handle = part.handle;
  if (!w_in.empty()) {
    device_.ops().ExpertMlp({.x = handle.expert_input,
                             .groups = handle.groups.data(),
                             .num_groups = static_cast<int>(handle.groups.size()),
                             .w_in = w_in.data(),
                             .w_out = w_out.data(),
                             .num_experts = static_cast<int>(w_in.size()),
                             .activation = config_.activation,
                             .row_offsets = handle.row_offsets,
                             .expected_rows = handle.expected_rows,
                             .scratch = Act(expert_scratch_, handle.expert_input.rows, w_in[0].rows),
                             .out = handle.expert_output},
                            stream);
  }
  GroupEnds("expert", part);
}

absl::Status Transformer::FinishCombine(int layer, const Part& part, Stream& stream) {
  const bool is_last = layer + 1 == config_.num_layers;
  RETURN_IF_ERROR(
      dispatcher_.FinishCombine(part.handle,
                                {.residual = Residual(part),
                                 .norm_weight = is_last ? shared_.final_norm : shared_.layers[layer + 1].attention_norm,
                                 .eps = config_.rms_norm_eps,
                                 .normed = Act(normed_, part, config_.hidden_size)},
                                stream));
  GroupEnds("combine", part);
  return absl::OkStatus();
}

}  // namespace soloist
