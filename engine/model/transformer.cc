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
      {&expert_counts_, config_.num_layers * config_.num_experts * i32},
      {&last_hidden_, limits_.max_logit_rows * hidden * act},
      {&logits_, limits_.max_logit_rows * config_.vocab_size * f32},
  };
  for (const auto& [buffer, bytes] : buffers) {
    ASSIGN_OR_RETURN(*buffer, device_.Allocate(bytes));
  }
  return absl::OkStatus();
}

absl::Status Transformer::Forward(const StepInputs& in, const std::vector<KvLayer>& kv, Stream& stream) {
  CHECK(in.num_tokens <= in.capacity && in.capacity <= limits_.max_tokens);
  CHECK_LE(in.num_logit_rows, limits_.max_logit_rows);
  CHECK_EQ(static_cast<int>(kv.size()), config_.num_layers);
  Ops& ops = device_.ops();
  const int64_t hidden = config_.hidden_size;
  const Tensor residual = residual_.View<float>(in.num_tokens, hidden), normed = Act(normed_, in.num_tokens, hidden);

  ops.Embed(in.token_ids, in.previous_tokens, shared_.embedding, residual, stream);
  ops.AddRmsNorm(residual, Tensor{}, shared_.layers[0].attention_norm, config_.rms_norm_eps, normed, stream);
  GroupEnds("embed");
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    Attention(layer, in, kv[layer], stream);
    RETURN_IF_ERROR(Moe(layer, in, stream));
  }
  const Tensor last = Act(last_hidden_, in.num_logit_rows, hidden);
  ops.GatherRows(normed, in.logit_rows, last, stream);
  ops.Linear(last, shared_.lm_head, logits(in.num_logit_rows), stream);
  GroupEnds("head");
  return absl::OkStatus();
}

void Transformer::Attention(int layer, const StepInputs& in, const KvLayer& kv, Stream& stream) {
  Ops& ops = device_.ops();
  const LayerWeights& weights = shared_.layers[layer];
  const int64_t n = in.num_tokens;
  const int64_t q_width = static_cast<int64_t>(config_.num_heads) * config_.head_dim;
  const Tensor qkv = Act(qkv_, n, q_width + 2LL * config_.num_kv_heads * config_.head_dim);
  const Tensor q = Act(q_, n, q_width), out = Act(attention_, n, q_width);
  ops.Linear(Act(normed_, n, config_.hidden_size), weights.qkv, qkv, stream);
  GroupEnds("attention_linear");
  ops.RopeAppendKv(qkv, in.positions, in.slot_mapping, shared_.cos_sin, kv, q, stream);
  ops.PagedAttention({.q = q,
                      .kv = kv,
                      .query_starts = in.query_starts,
                      .seq_lens = in.seq_lens,
                      .block_tables = in.block_tables,
                      .num_sequences = in.num_sequences,
                      .num_decodes = in.num_decodes,
                      .max_query_rows = in.max_query_rows,
                      .max_seq_len = in.max_seq_len,
                      .max_blocks = in.max_blocks,
                      .num_heads = static_cast<int>(config_.num_heads),
                      .sliding_window = static_cast<int>(config_.sliding_window),
                      .scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
                      .out = out},
                     stream);
  GroupEnds("attention");
  ops.Linear(out, weights.attention_output, Act(delta_, n, config_.hidden_size), stream);
  GroupEnds("attention_linear");
}

absl::Status Transformer::Moe(int layer, const StepInputs& in, Stream& stream) {
  Ops& ops = device_.ops();
  const int64_t n = in.num_tokens, first = layer * limits_.max_tokens;
  const Tensor residual = residual_.View<float>(n, config_.hidden_size), normed = Act(normed_, n, config_.hidden_size);
  const Tensor experts = routed_experts().Rows(first, n), weights = routed_weights().Rows(first, n);
  ops.Route({.residual = residual,
             .delta = Act(delta_, n, config_.hidden_size),
             .norm_weight = shared_.layers[layer].moe_norm,
             .eps = config_.rms_norm_eps,
             .normed = normed,
             .gate = shared_.layers[layer].router,
             .num_rows = in.num_rows,
             .experts = experts,
             .weights = weights},
            stream);
  GroupEnds("router");
  ASSIGN_OR_RETURN(const DispatchHandle handle,
                   dispatcher_.Dispatch(normed, experts, weights, in.capacity,
                                        expert_counts().Rows(layer, 1).as<int32_t>(), stream));
  GroupEnds("dispatch");
  const auto& w_in = expert_weights_.layers[layer].w_in;
  const auto& w_out = expert_weights_.layers[layer].w_out;
  if (!w_in.empty()) {
    ops.ExpertMlp({.x = handle.expert_input,
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
  GroupEnds("expert");
  const bool is_last = layer + 1 == config_.num_layers;
  RETURN_IF_ERROR(
      dispatcher_.Combine(handle,
                          {.residual = residual,
                           .norm_weight = is_last ? shared_.final_norm : shared_.layers[layer + 1].attention_norm,
                           .eps = config_.rms_norm_eps,
                           .normed = normed},
                          stream));
  GroupEnds("combine");
  return absl::OkStatus();
}

}  // namespace soloist
