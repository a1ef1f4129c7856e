#include "engine/worker/worker.h"

#include <algorithm>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "kernels/ops.h"

namespace soloist {
namespace {

// Rows that decode graphs are captured for; the largest is max_sequences. GEMMs work in tiles of 8 rows.
constexpr int64_t kBuckets[] = {1, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512};
// Room of a graph's plan for penalties and biases of all rows together; a step with more runs without a graph.
constexpr int64_t kGraphBias = 16384, kGraphHistory = 65536;

// Byte offsets in the results of a step, for `rows` logit rows at most; the first two are read after every step.
struct ResultLayout {
  explicit ResultLayout(int64_t rows)
      : logprobs(rows * 4),
        top_tokens(rows * 8),
        top_logprobs(top_tokens + rows * kMaxTopLogprobs * 4),
        bytes(top_logprobs + rows * kMaxTopLogprobs * 4) {}
  int64_t tokens = 0, logprobs, top_tokens, top_logprobs, bytes;
};

template <typename T>
T* At(const Buffer& buffer, int64_t byte_offset) {
  return reinterpret_cast<T*>(static_cast<char*>(buffer.data()) + byte_offset);
}

// Allocates at least `bytes` unless the buffer has them.
absl::Status Grow(Buffer& buffer, int64_t bytes, absl::StatusOr<Buffer> (Device::*allocate)(int64_t), Device& device) {
  if (buffer.bytes() >= bytes) return absl::OkStatus();
  ASSIGN_OR_RETURN(buffer, (device.*allocate)(bytes + bytes / 2));
  return absl::OkStatus();
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
  RETURN_IF_ERROR(dev.BindThread());
  ASSIGN_OR_RETURN(worker->stream_, dev.CreateStream());
  ASSIGN_OR_RETURN(worker->dispatcher_, CreateTokenDispatcher({.hidden_size = static_cast<int>(config.hidden_size),
                                                               .num_experts = static_cast<int>(config.num_experts),
                                                               .top_k = static_cast<int>(config.experts_per_token),
                                                               .max_tokens_per_rank = options.limits.max_tokens,
                                                               .dtype = dev.activation_dtype(),
                                                               .expert_rank = options.expert_rank,
                                                               .masked_max_tokens = options.masked_max_tokens,
                                                               .loopback_ranks = options.loopback_ranks,
                                                               .loopback_experts = options.loopback_experts},
                                                              dev, *worker->comm_));
  RETURN_IF_ERROR(dev.Prepare({.max_tokens = options.limits.max_tokens,
                               .max_expert_rows = worker->dispatcher_->max_expert_rows(),
                               .max_logit_rows = options.limits.max_sequences,
                               .max_sequences = options.limits.max_sequences,
                               .max_model_len = options.limits.max_model_len,
                               .hidden_size = config.hidden_size,
                               .expert_hidden_size = config.expert_hidden_size,
                               .gated_experts = config.activation == Activation::kSiluGated,
                               .vocab_size = config.vocab_size,
                               .num_heads = static_cast<int>(config.num_heads),
                               .num_kv_heads = static_cast<int>(config.num_kv_heads),
                               .head_dim = static_cast<int>(config.head_dim),
                               .kv_block_size = options.limits.block_size,
                               .fp8_kv = options.kv_dtype == DType::kF8E4M3,
                               .sliding_window = static_cast<int>(config.sliding_window),
                               .num_experts = static_cast<int>(config.num_experts),
                               .local_experts = static_cast<int>(worker->experts_.layers.front().w_in.size()),
                               .top_k = static_cast<int>(config.experts_per_token)}));
  ASSIGN_OR_RETURN(worker->transformer_, Transformer::Create(config,
                                                             {.max_tokens = options.limits.max_tokens,
                                                              .max_logit_rows = options.limits.max_sequences},
                                                             shared, worker->experts_, dev, *worker->dispatcher_));
  RETURN_IF_ERROR(worker->Allocate());
  if (options.limits.num_blocks > 0) RETURN_IF_ERROR(worker->AllocateKv(options.limits.num_blocks));
  return worker;
}

absl::Status Worker::AllocateKv(int32_t num_blocks) {
  options_.limits.num_blocks = num_blocks;
  ASSIGN_OR_RETURN(kv_, KvArena::Create(config_, options_.limits, options_.kv_dtype, *device_));
  return absl::OkStatus();
}

absl::Status Worker::Allocate() {
  const int64_t rows = options_.limits.max_sequences;
  const ResultLayout layout(rows);
  const int64_t counts_bytes = config_.num_layers * config_.num_experts * 4;
  ASSIGN_OR_RETURN(previous_, device_->Allocate(rows * 4));
  ASSIGN_OR_RETURN(results_, device_->Allocate(layout.bytes));
  for (Slot& slot : slots_) {
    ASSIGN_OR_RETURN(slot.results, device_->AllocatePinned(layout.bytes + counts_bytes));
  }
  for (StepEvents& events : events_) {
    ASSIGN_OR_RETURN(events.start, device_->CreateEvent());
    ASSIGN_OR_RETURN(events.end, device_->CreateEvent());
  }
  if (!device_->can_capture()) return absl::OkStatus();
  for (const int64_t bucket : kBuckets) {
    if (bucket < rows) buckets_.push_back(bucket);
  }
  buckets_.push_back(rows);
  std::erase_if(buckets_, [this](int64_t bucket) { return dispatcher_->WaitsOnHost(bucket); });
  return absl::OkStatus();
}

int64_t Worker::CapacityOf(int64_t max_home_tokens) const {
  const auto bucket = std::ranges::lower_bound(buckets_, max_home_tokens);
  return bucket == buckets_.end() ? max_home_tokens : *bucket;
}

PlanRoom Worker::GraphRoom(int64_t rows) const {
  return {.tokens = rows,
          .sequences = rows,
          .max_blocks = (options_.limits.max_model_len + options_.limits.block_size - 1) / options_.limits.block_size,
          .logit_rows = rows,
          .bias = kGraphBias,
          .history = kGraphHistory};
}

absl::Status Worker::WarmUp(const std::function<void(int, int)>& on_progress) {
  RETURN_IF_ERROR(device_->BindThread());
  if (buckets_.empty()) return absl::OkStatus();
  const int64_t plan_bytes = StagedPlan::Layout(GraphRoom(buckets_.back())).words * 4;
  ASSIGN_OR_RETURN(graph_plan_, device_->Allocate(plan_bytes));
  for (Slot& slot : slots_) RETURN_IF_ERROR(Grow(slot.plan, plan_bytes, &Device::AllocatePinned, *device_));

  RETURN_IF_ERROR(WarmUpChunk());
  int done = 0;
  for (const int64_t bucket : buckets_) {
    // A plan of padding alone: the ops run once, so that what they load or build on first use is there.
    StagedPlan staged = StagedPlan::Layout(GraphRoom(bucket));
    Stage(HomePlan(), staged, static_cast<int32_t*>(slots_[0].plan.data()));
    staged.num_decodes = static_cast<int>(bucket);
    staged.max_query_rows = 1;
    staged.max_seq_len = options_.limits.max_model_len;
    staged.capacity = bucket;
    const auto* plan = static_cast<const int32_t*>(graph_plan_.data());
    device_->Copy(graph_plan_.data(), slots_[0].plan.data(), staged.words * 4, *stream_);
    RETURN_IF_ERROR(EnqueueOps(staged, plan, nullptr));
    RETURN_IF_ERROR(stream_->Synchronize());
    ASSIGN_OR_RETURN(graphs_[bucket], device_->Capture(*stream_, [&] { return EnqueueOps(staged, plan, nullptr); }));
    if (on_progress) on_progress(++done, static_cast<int>(buckets_.size()));
  }
  return stream_->Synchronize();
}

// A chunk of two rows that is kept nowhere: what prompts load or build on first use is there then.
absl::Status Worker::WarmUpChunk() {
  if (options_.limits.max_tokens < 2 || options_.limits.max_model_len < 2) return absl::OkStatus();
  HomePlanParts parts;
  parts.token_ids = {0, 0};
  parts.positions = {0, 1};
  parts.slot_mapping = {-1, -1};
  parts.query_starts = {0, 2};
  parts.seq_lens = {2};
  parts.max_blocks = options_.limits.block_size == 1 ? 2 : 1;
  parts.block_tables.assign(parts.max_blocks, 0);
  parts.logit_rows = {1};
  parts.sampling = {SamplingRow()};
  const HomePlan plan(parts, 0, 2, 0);
  StagedPlan staged = StagedPlan::Layout(RoomOf(plan));
  staged.capacity = CapacityOf(2);
  Stage(plan, staged, static_cast<int32_t*>(slots_[0].plan.data()));
  device_->Copy(graph_plan_.data(), slots_[0].plan.data(), staged.words * 4, *stream_);
  RETURN_IF_ERROR(EnqueueOps(staged, static_cast<const int32_t*>(graph_plan_.data()), nullptr));
  return stream_->Synchronize();
}

absl::Status Worker::Submit(const HomePlan& plan) {
  RETURN_IF_ERROR(plan.Validate(options_.limits));
  CHECK_LT(submitted_ - finished_, kMaxInFlight);
  Slot& slot = slots_[submitted_ % kMaxInFlight];
  const int64_t start_ns = Clock::Real().NowNs();
  RETURN_IF_ERROR(Enqueue(slot, plan));
  slot.enqueue_ns = Clock::Real().NowNs() - start_ns;
  ++submitted_;
  return absl::OkStatus();
}

absl::Status Worker::Enqueue(Slot& slot, const HomePlan& plan) {
  const auto sampling = plan.sampling();
  slot.wants_top = std::ranges::any_of(sampling, [](const SamplingRow& row) { return row.num_top_logprobs > 0; });
  slot.return_logits.clear();
  for (int r = 0; r < plan.num_logit_rows(); ++r) {
    if (sampling[r].return_logits != 0) slot.return_logits.push_back(r);
  }
  slot.groups.clear();

  PlanRoom room = RoomOf(plan);
  const int64_t capacity = CapacityOf(plan.max_home_tokens());
  const auto found = graphs_.find(capacity);
  const bool profiled = options_.profile_every > 0 && (submitted_ + 1) % options_.profile_every == 0;
  const bool decodes_only = plan.num_tokens() == plan.num_sequences();
  const bool as_graph = found != graphs_.end() && decodes_only && slot.return_logits.empty() && !profiled &&
                        room.bias <= kGraphBias && room.history <= kGraphHistory;
  if (as_graph) room = GraphRoom(capacity);
  slot.staged = StagedPlan::Layout(room);
  slot.staged.capacity = capacity;
  const int64_t layout_bytes = slot.staged.words * 4;
  RETURN_IF_ERROR(Grow(slot.plan, layout_bytes, &Device::AllocatePinned, *device_));
  if (!as_graph) RETURN_IF_ERROR(Grow(eager_plan_, layout_bytes, &Device::Allocate, *device_));
  float* raw_logits = nullptr;
  if (!slot.return_logits.empty()) {
    const int64_t bytes = int64_t{options_.limits.max_sequences} * config_.vocab_size * 4;
    if (raw_logits_.bytes() == 0) {
      ASSIGN_OR_RETURN(raw_logits_, device_->Allocate(bytes));
    }
    if (slot.raw_logits.bytes() == 0) {
      ASSIGN_OR_RETURN(slot.raw_logits, device_->AllocatePinned(bytes));
    }
    raw_logits = static_cast<float*>(raw_logits_.data());
  }

  Stage(plan, slot.staged, static_cast<int32_t*>(slot.plan.data()));
  // What follows the last entries of bias and history in a graph's room is never read.
  const int64_t used_words =
      plan.num_history() > 0 ? slot.staged.history + 2 * plan.num_history() : slot.staged.bias + 2 * plan.num_bias();
  const Buffer& target = as_graph ? graph_plan_ : eager_plan_;
  const StepEvents& events = EventsOf(submitted_);
  device_->Record(*events.start, *stream_);
  device_->Copy(target.data(), slot.plan.data(), used_words * 4, *stream_);
  if (as_graph) {
    RETURN_IF_ERROR(device_->Launch(*found->second, *stream_));
  } else {
    if (profiled) transformer_->set_group_hook([this, &slot](const char* group) { MarkGroup(slot, group); });
    RETURN_IF_ERROR(EnqueueOps(slot.staged, static_cast<const int32_t*>(target.data()), raw_logits));
    if (profiled) {
      MarkGroup(slot, "sample");
      transformer_->set_group_hook(nullptr);
    }
  }

  const ResultLayout layout(options_.limits.max_sequences);
  device_->Copy(slot.results.data(), results_.data(), slot.wants_top ? layout.bytes : layout.top_tokens, *stream_);
  const Tensor counts = transformer_->expert_counts();
  device_->Copy(At<char>(slot.results, layout.bytes), counts.data, counts.bytes(), *stream_);
  for (const int32_t r : slot.return_logits) {
    const int64_t at = r * config_.vocab_size * 4;
    device_->Copy(At<char>(slot.raw_logits, at), At<char>(raw_logits_, at), config_.vocab_size * 4, *stream_);
  }
  device_->Record(*events.end, *stream_);
  return absl::OkStatus();
}

absl::Status Worker::EnqueueOps(const StagedPlan& staged, const int32_t* plan, float* raw_logits) {
  const ResultLayout layout(options_.limits.max_sequences);
  const int rows = static_cast<int>(staged.room.logit_rows);
  const auto* previous = static_cast<const int32_t*>(previous_.data());
  device_->Copy(previous_.data(), results_.data(), previous_.bytes(), *stream_);
  RETURN_IF_ERROR(transformer_->Forward({.num_tokens = staged.room.tokens,
                                         .capacity = staged.capacity,
                                         .num_sequences = static_cast<int>(staged.room.sequences),
                                         .num_decodes = staged.num_decodes,
                                         .max_query_rows = staged.max_query_rows,
                                         .max_seq_len = staged.max_seq_len,
                                         .max_blocks = static_cast<int>(staged.room.max_blocks),
                                         .num_logit_rows = rows,
                                         .num_rows = plan + staged.num_rows,
                                         .token_ids = plan + staged.token_ids,
                                         .previous_tokens = previous,
                                         .positions = plan + staged.positions,
                                         .slot_mapping = plan + staged.slot_mapping,
                                         .query_starts = plan + staged.query_starts,
                                         .seq_lens = plan + staged.seq_lens,
                                         .block_tables = plan + staged.block_tables,
                                         .logit_rows = plan + staged.logit_rows},
                                        kv_.layers(), *stream_));
  device_->ops().Sample({.logits = transformer_->logits(rows),
                         .params = reinterpret_cast<const SamplingRow*>(plan + staged.sampling),
                         .bias = reinterpret_cast<const LogitBias*>(plan + staged.bias),
                         .history = reinterpret_cast<const TokenHistory*>(plan + staged.history),
                         .previous_tokens = previous,
                         .tokens = At<int32_t>(results_, layout.tokens),
                         .logprobs = At<float>(results_, layout.logprobs),
                         .top_tokens = At<int32_t>(results_, layout.top_tokens),
                         .top_logprobs = At<float>(results_, layout.top_logprobs),
                         .raw_logits = raw_logits},
                        *stream_);
  return absl::OkStatus();
}

void Worker::MarkGroup(Slot& slot, const char* group) {
  slot.groups.push_back(group);
  if (slot.group_ends.size() < slot.groups.size()) {
    auto event = device_->CreateEvent();
    CHECK_OK(event.status());
    slot.group_ends.push_back(*std::move(event));
  }
  device_->Record(*slot.group_ends[slot.groups.size() - 1], *stream_);
}

absl::StatusOr<HomeResult> Worker::Finish() {
  Slot& slot = slots_[finished_ % kMaxInFlight];
  RETURN_IF_ERROR(EventsOf(finished_).end->Wait());
  RETURN_IF_ERROR(comm_->error());
  HomeResult result = ReadResult(slot);
  ++finished_;
  return result;
}

absl::StatusOr<HomeResult> Worker::Execute(const HomePlan& plan) {
  RETURN_IF_ERROR(Submit(plan));
  return Finish();
}

HomeResult Worker::ReadResult(const Slot& slot) const {
  const ResultLayout layout(options_.limits.max_sequences);
  const int64_t rows = slot.staged.rows;
  HomeResult result;
  result.tokens.assign(At<int32_t>(slot.results, layout.tokens), At<int32_t>(slot.results, layout.tokens) + rows);
  result.logprobs.assign(At<float>(slot.results, layout.logprobs), At<float>(slot.results, layout.logprobs) + rows);
  if (slot.wants_top) {
    const int64_t n = rows * kMaxTopLogprobs;
    const auto* ids = At<int32_t>(slot.results, layout.top_tokens);
    const auto* values = At<float>(slot.results, layout.top_logprobs);
    result.top_tokens.assign(ids, ids + n);
    result.top_logprobs.assign(values, values + n);
  }
  if (!slot.return_logits.empty()) {
    result.raw_logits.assign(rows * config_.vocab_size, 0.0f);
    for (const int32_t r : slot.return_logits) {
      const int64_t begin = r * config_.vocab_size;
      std::copy_n(At<float>(slot.raw_logits, begin * 4), config_.vocab_size, result.raw_logits.begin() + begin);
    }
  }
  const auto* counts = At<int32_t>(slot.results, layout.bytes);
  result.expert_rows.assign(counts, counts + config_.num_layers * config_.num_experts);

  const StepEvents& events = EventsOf(finished_);
  result.device_ns = events.end->NsSince(*events.start);
  if (finished_ > 0) result.idle_ns = events.start->NsSince(*EventsOf(finished_ - 1).end);
  result.enqueue_ns = slot.enqueue_ns;
  const Event* from = events.start.get();
  for (size_t i = 0; i < slot.groups.size(); ++i) {
    const int64_t ns = slot.group_ends[i]->NsSince(*from);
    from = slot.group_ends[i].get();
    const auto it = std::ranges::find(result.groups, slot.groups[i], &GroupTime::group);
    if (it != result.groups.end()) {
      it->ns += ns;
    } else {
      result.groups.push_back({slot.groups[i], ns});
    }
  }
  return result;
}

}  // namespace soloist
