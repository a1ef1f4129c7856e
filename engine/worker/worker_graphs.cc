// The worker's graphs: which there are, and how they are captured.
#include <algorithm>

#include "base/status.h"
#include "engine/worker/worker.h"

namespace soloist {
namespace {

// Graphs of less dispatch room than the worst case, beyond which such steps run without a graph.
constexpr int64_t kMaxRoomGraphs = 64;

}  // namespace

absl::Status Worker::Grow(Buffer& buffer, int64_t bytes, absl::StatusOr<Buffer> (Device::*allocate)(int64_t)) {
  if (buffer.bytes() >= bytes) return absl::OkStatus();
  ASSIGN_OR_RETURN(buffer, (*device_.*allocate)(bytes + bytes / 2));
  return absl::OkStatus();
}

PlanRoom Worker::GraphRoom(int64_t rows) const {
  const int64_t mask_words = TokenMaskWords(config_.vocab_size);
  return {.tokens = rows,
          .sequences = rows,
          .max_blocks = (options_.limits.max_model_len + options_.limits.block_size - 1) / options_.limits.block_size,
          .logit_rows = rows,
          .bias = kGraphBias,
          .history = kGraphHistory,
          .masks = std::min(rows, kGraphMaskWords / mask_words),
          .mask_words = mask_words};
}

// What a graph is captured with: its plan's sections and bounds.
StagedPlan Worker::GraphPlan(const DispatchCapacity& capacity) const {
  StagedPlan staged = StagedPlan::Layout(GraphRoom(capacity.max_tokens));
  StagedBatch& batch = staged.batches[0];
  batch.tokens = capacity.max_tokens;
  batch.num_decodes = static_cast<int>(capacity.max_tokens);
  batch.max_query_rows = 1;
  batch.max_seq_len = options_.limits.max_model_len;
  staged.capacity = capacity;
  return staged;
}

absl::StatusOr<const Graph*> Worker::GraphOf(const DispatchCapacity& capacity) {
  if (!graphs_.contains({capacity.max_tokens, 0})) return nullptr;
  const std::pair<int64_t, int64_t> key(capacity.max_tokens, capacity.masked_rows);
  if (!graphs_.contains(key)) {
    // The worst case has run: nothing is loaded or built on first use any more.
    if (std::ssize(graphs_) - std::ssize(buckets_) >= kMaxRoomGraphs) return nullptr;
    const StagedPlan staged = GraphPlan(capacity);
    const auto* plan = static_cast<const int32_t*>(graph_plan_.data());
    ASSIGN_OR_RETURN(graphs_[key],
                     device_->Capture(*stream_, [&] { return EnqueueOps(staged, plan, nullptr, nullptr); }));
  }
  return graphs_[key].get();
}

absl::Status Worker::WarmUp(const std::function<void(int, int)>& on_progress) {
  RETURN_IF_ERROR(device_->BindThread());
  if (buckets_.empty()) return absl::OkStatus();
  const int64_t plan_bytes = StagedPlan::Layout(GraphRoom(buckets_.back())).words * 4;
  ASSIGN_OR_RETURN(graph_plan_, device_->Allocate(plan_bytes));
  for (Slot& slot : slots_) RETURN_IF_ERROR(Grow(slot.plan, plan_bytes, &Device::AllocatePinned));

  RETURN_IF_ERROR(WarmUpChunk());
  int done = 0;
  for (const int64_t bucket : buckets_) {
    // A plan of padding alone: the ops run once, so that what they load or build on first use is there.
    StagedPlan padding = StagedPlan::Layout(GraphRoom(bucket));
    Stage(HomePlan(), padding, static_cast<int32_t*>(slots_[0].plan.data()));
    const StagedPlan staged = GraphPlan({.max_tokens = bucket});
    const auto* plan = static_cast<const int32_t*>(graph_plan_.data());
    device_->Copy(graph_plan_.data(), slots_[0].plan.data(), staged.words * 4, *stream_);
    RETURN_IF_ERROR(EnqueueOps(staged, plan, nullptr, nullptr));
    RETURN_IF_ERROR(stream_->Synchronize());
    ASSIGN_OR_RETURN((graphs_[{bucket, 0}]),
                     device_->Capture(*stream_, [&] { return EnqueueOps(staged, plan, nullptr, nullptr); }));
    if (on_progress) on_progress(++done, static_cast<int>(buckets_.size()));
  }
  return stream_->Synchronize();
}

// A chunk of two rows that is kept nowhere: what prompts load or build on first use is there then. Its keys are whole
// blocks (block 0, whatever it holds): after a recovery the cache has sequences in it, and attention may overwrite what
// is behind the last key.
absl::Status Worker::WarmUpChunk() {
  const int32_t blocks = options_.limits.block_size == 1 ? 2 : 1, keys = blocks * options_.limits.block_size;
  if (options_.limits.max_tokens < 2 || options_.limits.max_model_len < keys) return absl::OkStatus();
  HomePlanParts parts;
  parts.token_ids = {0, 0};
  parts.positions = {0, 1};
  parts.slot_mapping = {-1, -1};
  parts.query_starts = {0, 2};
  parts.seq_lens = {keys};
  parts.max_blocks = blocks;
  parts.block_tables.assign(parts.max_blocks, 0);
  parts.logit_rows = {1};
  parts.sampling = {SamplingRow()};
  const HomePlan plan(parts, 0, 2, 0);
  StagedPlan staged = StagedPlan::Layout(RoomOf(plan));
  staged.capacity = CapacityOf(2, 0);
  Stage(plan, staged, static_cast<int32_t*>(slots_[0].plan.data()));
  device_->Copy(graph_plan_.data(), slots_[0].plan.data(), staged.words * 4, *stream_);
  RETURN_IF_ERROR(EnqueueOps(staged, static_cast<const int32_t*>(graph_plan_.data()), nullptr, nullptr));
  return stream_->Synchronize();
}

}  // namespace soloist
