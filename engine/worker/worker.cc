#include "engine/worker/worker.h"

#include <algorithm>
#include <utility>

#include "base/status.h"
#include "kernels/ops.h"

namespace soloist {
namespace {

// Words of the largest valid plan: history and bias are bounded by the vocabulary per row only, so their room grows on
// demand.
int64_t PlanWords(const PlanLimits& limits) {
  const int64_t blocks = (limits.max_model_len + limits.block_size - 1) / limits.block_size;
  return HomePlan::kHeaderWords + 3LL * limits.max_tokens + limits.max_sequences * (2 + blocks + 1 + 16) + 1;
}

}  // namespace

absl::StatusOr<KvArena> KvArena::Create(const ModelConfig& config, const PlanLimits& limits, DType dtype,
                                        Device& device) {
  KvArena arena;
  const int64_t slots = static_cast<int64_t>(limits.num_blocks) * limits.block_size;
  const int64_t half = slots * config.num_kv_heads * config.head_dim * DTypeBytes(dtype);
  auto memory = device.Allocate(2 * half * config.num_layers);
  if (!memory.ok()) {
    return Annotate(memory.status(),
                    fmt::format("KV cache of {} blocks of {} tokens", limits.num_blocks, limits.block_size));
  }
  arena.memory_ = *std::move(memory);
  char* at = static_cast<char*>(arena.memory_.data());
  for (int64_t layer = 0; layer < config.num_layers; ++layer, at += 2 * half) {
    arena.layers_.push_back({.keys = at,
                             .values = at + half,
                             .dtype = dtype,
                             .num_blocks = limits.num_blocks,
                             .num_kv_heads = static_cast<int>(config.num_kv_heads),
                             .block_size = limits.block_size,
                             .head_dim = static_cast<int>(config.head_dim)});
  }
  return arena;
}

absl::StatusOr<std::unique_ptr<Worker>> Worker::Create(const ModelConfig& config, const WorkerOptions& options,
                                                       const SharedWeights& shared, ExpertWeights experts,
                                                       std::unique_ptr<Device> device,
                                                       std::unique_ptr<Communicator> comm) {
  std::unique_ptr<Worker> worker(new Worker);
  worker->config_ = config;
  worker->options_ = options;
  worker->device_ = std::move(device);
  worker->comm_ = std::move(comm);
  worker->experts_ = std::move(experts);
  Device& dev = *worker->device_;
  ASSIGN_OR_RETURN(worker->stream_, dev.CreateStream());
  ASSIGN_OR_RETURN(worker->kv_, KvArena::Create(config, options.limits, options.kv_dtype, dev));
  ASSIGN_OR_RETURN(worker->dispatcher_, CreateTokenDispatcher({.hidden_size = static_cast<int>(config.hidden_size),
                                                               .num_experts = static_cast<int>(config.num_experts),
                                                               .top_k = static_cast<int>(config.experts_per_token),
                                                               .max_tokens_per_rank = options.limits.max_tokens,
                                                               .dtype = DType::kF32,
                                                               .expert_rank = options.expert_rank,
                                                               .masked_max_tokens = options.masked_max_tokens},
                                                              dev, *worker->comm_));
  ASSIGN_OR_RETURN(worker->transformer_, Transformer::Create(config,
                                                             {.max_tokens = options.limits.max_tokens,
                                                              .max_logit_rows = options.limits.max_sequences},
                                                             shared, worker->experts_, dev, *worker->dispatcher_));
  RETURN_IF_ERROR(worker->AllocateStepBuffers());
  return worker;
}

absl::Status Worker::AllocateStepBuffers() {
  const int64_t rows = options_.limits.max_sequences;
  ASSIGN_OR_RETURN(plan_, device_->Allocate(PlanWords(options_.limits) * 4));
  for (Buffer& tokens : tokens_) {
    ASSIGN_OR_RETURN(tokens, device_->AllocatePinned(rows * 4));
  }
  const int64_t choices = options_.limits.max_tokens * config_.experts_per_token * config_.num_layers;
  ASSIGN_OR_RETURN(routed_, device_->AllocatePinned(choices * 4));
  ASSIGN_OR_RETURN(logprobs_, device_->AllocatePinned(rows * 4));
  ASSIGN_OR_RETURN(top_tokens_, device_->AllocatePinned(rows * kMaxTopLogprobs * 4));
  ASSIGN_OR_RETURN(top_logprobs_, device_->AllocatePinned(rows * kMaxTopLogprobs * 4));
  return absl::OkStatus();
}

absl::StatusOr<HomeResult> Worker::Execute(const HomePlan& plan) {
  RETURN_IF_ERROR(plan.Validate(options_.limits));
  const int64_t plan_bytes = static_cast<int64_t>(plan.words().size()) * 4;
  if (plan_bytes > plan_.bytes()) {
    ASSIGN_OR_RETURN(plan_, device_->Allocate(2 * plan_bytes));
  }
  const auto sampling = plan.sampling();
  const bool wants_logits =
      std::any_of(sampling.begin(), sampling.end(), [](const SamplingRow& row) { return row.return_logits != 0; });
  const bool wants_top =
      std::any_of(sampling.begin(), sampling.end(), [](const SamplingRow& row) { return row.num_top_logprobs > 0; });
  if (wants_logits && raw_logits_.bytes() == 0) {
    ASSIGN_OR_RETURN(raw_logits_,
                     device_->AllocatePinned(int64_t{options_.limits.max_sequences} * config_.vocab_size * 4));
  }
  device_->Copy(plan_.data(), plan.words().data(), plan_bytes, *stream_);
  const int32_t* words = static_cast<const int32_t*>(plan_.data());
  const int32_t* previous = static_cast<const int32_t*>(tokens_[current_tokens_].data());
  current_tokens_ = 1 - current_tokens_;
  int32_t* tokens = static_cast<int32_t*>(tokens_[current_tokens_].data());

  const int rows = plan.num_logit_rows();
  RETURN_IF_ERROR(transformer_->Forward({.num_tokens = plan.num_tokens(),
                                         .max_home_tokens = plan.max_home_tokens(),
                                         .num_sequences = plan.num_sequences(),
                                         .max_blocks = plan.max_blocks(),
                                         .num_logit_rows = rows,
                                         .token_ids = words + plan.Offset(0),
                                         .previous_tokens = previous,
                                         .positions = words + plan.Offset(1),
                                         .slot_mapping = words + plan.Offset(2),
                                         .query_starts = words + plan.Offset(3),
                                         .seq_lens = words + plan.Offset(4),
                                         .block_tables = words + plan.Offset(5),
                                         .logit_rows = words + plan.Offset(6)},
                                        kv_.layers(), *stream_));
  device_->ops().Sample({.logits = transformer_->logits(rows),
                         .params = reinterpret_cast<const SamplingRow*>(words + plan.Offset(7)),
                         .bias = reinterpret_cast<const LogitBias*>(words + plan.Offset(8)),
                         .history = reinterpret_cast<const TokenHistory*>(words + plan.Offset(9)),
                         .num_bias = plan.num_bias(),
                         .num_history = plan.num_history(),
                         .previous_tokens = previous,
                         .tokens = tokens,
                         .logprobs = static_cast<float*>(logprobs_.data()),
                         .top_tokens = static_cast<int32_t*>(top_tokens_.data()),
                         .top_logprobs = static_cast<float*>(top_logprobs_.data()),
                         .raw_logits = wants_logits ? static_cast<float*>(raw_logits_.data()) : nullptr},
                        *stream_);
  const int64_t choices = int64_t{plan.num_tokens()} * config_.experts_per_token;
  int32_t* routed = static_cast<int32_t*>(routed_.data());
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const int32_t* experts = transformer_->routed_experts().row<int32_t>(layer * int64_t{options_.limits.max_tokens});
    device_->Copy(routed + layer * choices, experts, choices * 4, *stream_);
  }
  RETURN_IF_ERROR(stream_->Synchronize());
  RETURN_IF_ERROR(comm_->error());

  HomeResult result;
  result.tokens.assign(tokens, tokens + rows);
  const float* logprobs = static_cast<const float*>(logprobs_.data());
  result.logprobs.assign(logprobs, logprobs + rows);
  if (wants_top) {
    const int64_t n = int64_t{rows} * kMaxTopLogprobs;
    const int32_t* ids = static_cast<const int32_t*>(top_tokens_.data());
    const float* values = static_cast<const float*>(top_logprobs_.data());
    result.top_tokens.assign(ids, ids + n);
    result.top_logprobs.assign(values, values + n);
  }
  if (wants_logits) {
    result.raw_logits.assign(int64_t{rows} * config_.vocab_size, 0.0f);
    const float* logits = static_cast<const float*>(raw_logits_.data());
    for (int r = 0; r < rows; ++r) {
      if (sampling[r].return_logits == 0) continue;
      const int64_t begin = int64_t{r} * config_.vocab_size;
      std::copy_n(logits + begin, config_.vocab_size, result.raw_logits.begin() + begin);
    }
  }
  result.expert_rows.assign(config_.num_layers * config_.num_experts, 0);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    int64_t* counts = result.expert_rows.data() + layer * config_.num_experts;
    for (int64_t i = 0; i < choices; ++i) ++counts[routed[layer * choices + i]];
  }
  return result;
}

}  // namespace soloist
