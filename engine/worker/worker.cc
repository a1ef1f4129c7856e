#include "engine/worker/worker.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "kernels/ops.h"

namespace soloist {
namespace {

// Rows that decode graphs are captured for; the largest is max_sequences. GEMMs work in tiles of 8 rows.
constexpr int64_t kBuckets[] = {1, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512};

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

}  // namespace

absl::StatusOr<std::unique_ptr<Worker>> Worker::Create(const ModelConfig& config, const WorkerOptions& options,
                                                       const SharedWeights& shared, ExpertWeights experts,
                                                       std::unique_ptr<Device> device,
                                                       std::unique_ptr<Communicator> comm) {
  std::unique_ptr<Worker> worker(new Worker);
  worker->config_ = config;
  worker->options_ = options;
  worker->device_ = std::move(device);
  worker->comm_ = std::move(comm);
  worker->CreateTrace();
  worker->shared_ = &shared;
  for (int e = 0; e < std::ssize(options.expert_rank); ++e) {
    if (options.expert_rank[e] == worker->comm_->rank()) worker->own_ids_.push_back(e);
  }
  worker->own_ = std::move(experts);
  worker->GatherExperts();
  Device& dev = *worker->device_;
  RETURN_IF_ERROR(dev.BindThread());
  ASSIGN_OR_RETURN(worker->stream_, dev.CreateStream());
  RETURN_IF_ERROR(worker->JoinGroup());
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
  const int64_t rows = options_.limits.max_logit_rows();
  const ResultLayout layout(rows);
  const int64_t counts_bytes = kMaxMicroBatches * config_.num_layers * config_.num_experts * 4;
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
    if (bucket < options_.limits.max_sequences) buckets_.push_back(bucket);
  }
  buckets_.push_back(options_.limits.max_sequences);
  std::erase_if(buckets_, [this](int64_t bucket) { return dispatcher_->WaitsOnHost(bucket); });
  return absl::OkStatus();
}

DispatchCapacity Worker::CapacityOf(int64_t max_home_tokens, int64_t dispatch_rows) const {
  const auto found = std::ranges::lower_bound(buckets_, max_home_tokens);
  const int64_t bucket = found == buckets_.end() ? max_home_tokens : *found;
  return {.max_tokens = bucket, .masked_rows = dispatch_rows < bucket ? dispatch_rows : 0};
}

absl::Status Worker::Submit(const HomePlan& plan) {
  RETURN_IF_ERROR(plan.Validate(options_.limits));
  CHECK_LT(submitted_ - finished_, kMaxInFlight);
  Slot& slot = slots_[submitted_ % kMaxInFlight];
  const int64_t start_ns = Clock::Real().NowNs();
  slot.step = plan.step();
  TraceSubmitBegins(slot.step, start_ns);
  RETURN_IF_ERROR(Enqueue(slot, plan));
  const int64_t end_ns = Clock::Real().NowNs();
  slot.enqueue_ns = end_ns - start_ns;
  TraceSubmitEnds(start_ns, end_ns);
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
  slot.comm_times.Clear();

  PlanRoom room = RoomOf(plan);
  const DispatchCapacity capacity = CapacityOf(plan.max_home_tokens(), plan.dispatch_rows());
  const bool profiled = options_.profile_every > 0 && (submitted_ + 1) % options_.profile_every == 0;
  const bool decodes_only = plan.num_tokens() == plan.num_sequences();
  const Graph* graph = nullptr;
  if (decodes_only && !plan.is_split() && slot.return_logits.empty() && !profiled && room.bias <= kGraphBias &&
      room.history <= kGraphHistory && room.masks * room.mask_words <= kGraphMaskWords) {
    ASSIGN_OR_RETURN(graph, GraphOf(capacity));
  }
  const bool as_graph = graph != nullptr;
  if (as_graph) room = GraphRoom(capacity.max_tokens);
  slot.staged = StagedPlan::Layout(room);
  slot.staged.capacity = capacity;
  const int64_t layout_bytes = slot.staged.words * 4;
  RETURN_IF_ERROR(Grow(slot.plan, layout_bytes, &Device::AllocatePinned));
  if (!as_graph) RETURN_IF_ERROR(Grow(eager_plan_, layout_bytes, &Device::Allocate));
  float* raw_logits = nullptr;
  if (!slot.return_logits.empty()) {
    const int64_t bytes = int64_t{options_.limits.max_logit_rows()} * config_.vocab_size * 4;
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
  if (plan.num_masks() > 0) {
    const int64_t at = slot.staged.masks * 4;
    device_->Copy(At<char>(target, at), At<char>(slot.plan, at), std::ssize(plan.masks()) * 4, *stream_);
  }
  if (as_graph) {
    RETURN_IF_ERROR(device_->Launch(*graph, *stream_));
  } else {
    const OpGroupHook group_ends = [this, &slot, profiled](const char* group, int micro_batch) {
      if (profiled) MarkGroup(slot, group);
      TraceGroup(group, micro_batch);
    };
    if (profiled || TracesGroups()) transformer_->set_group_hook(group_ends);
    // A device would have to note them for nothing where it does not work on two things at once.
    CommTimes* const times = plan.is_split() || device_->host_accessible() ? &slot.comm_times : nullptr;
    RETURN_IF_ERROR(EnqueueOps(slot.staged, static_cast<const int32_t*>(target.data()), raw_logits, times));
    if (profiled || TracesGroups()) group_ends("sample", -1);
    transformer_->set_group_hook(nullptr);
  }

  const ResultLayout layout(options_.limits.max_logit_rows());
  device_->Copy(slot.results.data(), results_.data(), slot.wants_top ? layout.bytes : layout.top_tokens, *stream_);
  const Tensor counts = transformer_->expert_counts();
  device_->Copy(At<char>(slot.results, layout.bytes), counts.data, slot.staged.num_batches * counts.bytes(), *stream_);
  for (const int32_t r : slot.return_logits) {
    const int64_t at = r * config_.vocab_size * 4;
    device_->Copy(At<char>(slot.raw_logits, at), At<char>(raw_logits_, at), config_.vocab_size * 4, *stream_);
  }
  device_->Record(*events.end, *stream_);
  return absl::OkStatus();
}

absl::Status Worker::EnqueueOps(const StagedPlan& staged, const int32_t* plan, float* raw_logits, CommTimes* times) {
  const ResultLayout layout(options_.limits.max_logit_rows());
  const int rows = static_cast<int>(staged.room.logit_rows);
  const auto* previous = static_cast<const int32_t*>(previous_.data());
  device_->Copy(previous_.data(), results_.data(), previous_.bytes(), *stream_);
  StepInputs in = {.capacity = staged.capacity,
                   .num_micro_batches = staged.num_batches,
                   .max_blocks = static_cast<int>(staged.room.max_blocks),
                   .num_logit_rows = rows,
                   .num_rows = staged.num_batches > 1 ? nullptr : plan + staged.num_rows,
                   .token_ids = plan + staged.token_ids,
                   .previous_tokens = previous,
                   .positions = plan + staged.positions,
                   .slot_mapping = plan + staged.slot_mapping,
                   .logit_rows = plan + staged.logit_rows};
  for (int i = 0; i < staged.num_batches; ++i) {
    const StagedBatch& batch = staged.batches[i];
    in.micro_batches[i] = {.num_tokens = batch.tokens,
                           .num_sequences = static_cast<int>(batch.sequences),
                           .num_decodes = batch.num_decodes,
                           .max_query_rows = batch.max_query_rows,
                           .max_seq_len = batch.max_seq_len,
                           .query_starts = plan + batch.query_starts,
                           .seq_lens = plan + batch.seq_lens,
                           .block_tables = plan + batch.block_tables};
  }
  RETURN_IF_ERROR(transformer_->Forward(in, kv_.layers(), times, *stream_));
  device_->ops().Sample({.logits = transformer_->logits(rows),
                         .params = reinterpret_cast<const SamplingRow*>(plan + staged.sampling),
                         .bias = reinterpret_cast<const LogitBias*>(plan + staged.bias),
                         .history = reinterpret_cast<const TokenHistory*>(plan + staged.history),
                         .previous_tokens = previous,
                         .mask_of_row = plan + staged.mask_of_row,
                         .masks = plan + staged.masks,
                         .targets = plan + staged.targets,
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
  const int64_t start_ns = Clock::Real().NowNs();
  RETURN_IF_ERROR(EventsOf(finished_).end->Wait());
  RETURN_IF_ERROR(comm_->error());
  TraceFinish(slot, start_ns);
  HomeResult result = ReadResult(slot);
  ++finished_;
  return result;
}

absl::StatusOr<HomeResult> Worker::Execute(const HomePlan& plan) {
  RETURN_IF_ERROR(Submit(plan));
  return Finish();
}

HomeResult Worker::ReadResult(const Slot& slot) const {
  const ResultLayout layout(options_.limits.max_logit_rows());
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
  const int64_t num_counts = config_.num_layers * config_.num_experts;
  result.expert_rows.assign(num_counts, 0);
  for (int i = 0; i < slot.staged.num_batches; ++i) {
    const std::span counts(At<const int32_t>(slot.results, layout.bytes) + i * num_counts,
                           static_cast<size_t>(num_counts));
    std::ranges::transform(counts, result.expert_rows, result.expert_rows.begin(), std::plus<int64_t>());
    result.overflow_rows = std::max(result.overflow_rows, dispatcher_->OverflowRows(counts, slot.staged.capacity));
  }

  const StepEvents& events = EventsOf(finished_);
  result.device_ns = events.end->NsSince(*events.start);
  if (finished_ > 0) result.idle_ns = events.start->NsSince(*EventsOf(finished_ - 1).end);
  result.enqueue_ns = slot.enqueue_ns;
  result.comm_ns = slot.comm_times.busy_ns();
  result.comm_wait_ns = slot.comm_times.wait_ns();
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
