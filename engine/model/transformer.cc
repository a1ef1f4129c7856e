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
      dispatcher_(dispatcher) {}

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
  const std::pair<Buffer*, int64_t> buffers[] = {
      {&residual_, tokens * hidden},
      {&normed_, tokens * hidden},
      {&delta_, tokens * hidden},
      {&qkv_, tokens * (q_width + 2 * kv_width)},
      {&q_, tokens * q_width},
      {&attention_, tokens * q_width},
      {&expert_scratch_, dispatcher_.max_expert_rows() * inner},
      {&experts_, routed},
      {&weights_, routed},
      {&last_hidden_, limits_.max_logit_rows * hidden},
      {&logits_, limits_.max_logit_rows * config_.vocab_size},
  };
  for (const auto& [buffer, elements] : buffers) {
    ASSIGN_OR_RETURN(*buffer, device_.Allocate(elements * static_cast<int64_t>(sizeof(float))));
  }
  return absl::OkStatus();
}

absl::Status Transformer::Forward(const StepInputs& in, const std::vector<KvLayer>& kv, Stream& stream) {
  CHECK_LE(in.num_tokens, limits_.max_tokens);
  CHECK_LE(in.num_logit_rows, limits_.max_logit_rows);
  CHECK_EQ(static_cast<int>(kv.size()), config_.num_layers);
  Ops& ops = device_.ops();
  const int64_t n = in.num_tokens, hidden = config_.hidden_size;
  const Tensor residual = residual_.View<float>(n, hidden), delta = delta_.View<float>(n, hidden),
               normed = normed_.View<float>(n, hidden);

  ops.Embed(in.token_ids, in.previous_tokens, shared_.embedding, residual, stream);
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    const LayerWeights& weights = shared_.layers[layer];
    ops.AddRmsNorm(residual, layer == 0 ? Tensor{} : delta, weights.attention_norm, config_.rms_norm_eps, normed,
                   stream);
    Attention(layer, in, kv[layer], stream);
    ops.AddRmsNorm(residual, delta, weights.moe_norm, config_.rms_norm_eps, normed, stream);
    RETURN_IF_ERROR(Moe(layer, in, stream));
  }
  ops.AddRmsNorm(residual, delta, shared_.final_norm, config_.rms_norm_eps, normed, stream);
  const Tensor last = last_hidden_.View<float>(in.num_logit_rows, hidden);
  ops.GatherRows(normed, in.logit_rows, last, stream);
  ops.Linear(last, shared_.lm_head, logits(in.num_logit_rows), stream);
  return absl::OkStatus();
}

void Transformer::Attention(int layer, const StepInputs& in, const KvLayer& kv, Stream& stream) {
  Ops& ops = device_.ops();
  const LayerWeights& weights = shared_.layers[layer];
  const int64_t n = in.num_tokens;
  const int64_t q_width = static_cast<int64_t>(config_.num_heads) * config_.head_dim;
  const Tensor qkv = qkv_.View<float>(n, q_width + 2LL * config_.num_kv_heads * config_.head_dim);
  const Tensor q = q_.View<float>(n, q_width), out = attention_.View<float>(n, q_width);
  ops.Linear(normed_.View<float>(n, config_.hidden_size), weights.qkv, qkv, stream);
  ops.RopeAppendKv(qkv, in.positions, in.slot_mapping, shared_.cos_sin, kv, q, stream);
  ops.PagedAttention({.q = q,
                      .kv = kv,
                      .query_starts = in.query_starts,
                      .seq_lens = in.seq_lens,
                      .block_tables = in.block_tables,
                      .num_sequences = in.num_sequences,
                      .max_blocks = in.max_blocks,
                      .num_heads = static_cast<int>(config_.num_heads),
                      .sliding_window = static_cast<int>(config_.sliding_window),
                      .scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
                      .out = out},
                     stream);
  ops.Linear(out, weights.attention_output, delta_.View<float>(n, config_.hidden_size), stream);
}

absl::Status Transformer::Moe(int layer, const StepInputs& in, Stream& stream) {
  Ops& ops = device_.ops();
  const int64_t n = in.num_tokens, first = layer * limits_.max_tokens;
  const Tensor normed = normed_.View<float>(n, config_.hidden_size);
  const Tensor experts = routed_experts().Rows(first, n), weights = routed_weights().Rows(first, n);
  ops.Route(normed, shared_.layers[layer].router, experts, weights, stream);
  ASSIGN_OR_RETURN(const DispatchHandle handle,
                   dispatcher_.Dispatch(normed, experts, weights, in.max_home_tokens, stream));
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
                   .scratch = expert_scratch_.View<float>(handle.expert_input.rows, w_in[0].rows),
                   .out = handle.expert_output},
                  stream);
  }
  return dispatcher_.Combine(handle, delta_.View<float>(n, config_.hidden_size), stream);
}

}  // namespace soloist
