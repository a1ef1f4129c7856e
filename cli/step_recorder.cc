#include "cli/step_recorder.h"

#include <algorithm>

namespace soloist::cli {

absl::Status StepRecorder::Submit(StepPlan plan) {
  StepRecord record;
  for (const HomePlan& home : plan.homes) {
    record.split = home.is_split();
    record.tokens += home.num_tokens();
    record.sequences += home.num_sequences();
    record.logit_rows += home.num_logit_rows();
    for (int s = 0; s < home.num_sequences(); ++s) {
      const int64_t rows = home.query_starts()[s + 1] - home.query_starts()[s], keys = home.seq_lens()[s];
      record.max_rows = std::max(record.max_rows, rows);
      record.kv_tokens += keys;
      record.attended_pairs += rows * (keys - rows) + rows * (rows + 1) / 2;
    }
  }
  in_flight_.push_back(record);
  return engine_.Submit(std::move(plan));
}

absl::StatusOr<StepResult> StepRecorder::Await() {
  auto result = engine_.Await();
  if (!result.ok()) return result;
  StepRecord record = std::move(in_flight_.front());
  in_flight_.pop_front();
  record.device_ns = result->device_ns;
  record.experts_read = ExpertsRead(*result);
  record.idle_ns = result->homes.front().idle_ns;
  record.enqueue_ns = result->homes.front().enqueue_ns;
  for (const HomeResult& home : result->homes) {
    record.comm_ns += home.comm_ns / std::ssize(result->homes);
    record.comm_wait_ns += home.comm_wait_ns / std::ssize(result->homes);
  }
  record.groups = result->homes.front().groups;
  std::lock_guard lock(mutex_);
  records_.push_back(std::move(record));
  return result;
}

absl::StatusOr<Recovery> StepRecorder::Recover(absl::Duration timeout) {
  absl::StatusOr<Recovery> recovery = engine_.Recover(timeout);
  if (recovery.ok()) in_flight_.clear();
  return recovery;
}

std::vector<StepRecord> StepRecorder::TakeRecords() {
  std::lock_guard lock(mutex_);
  return std::exchange(records_, {});
}

int64_t StepRecorder::ExpertsRead(const StepResult& result) const {
  std::vector<int64_t> rows(result.homes.front().expert_rows.size(), 0);
  for (const HomeResult& home : result.homes) {
    for (size_t i = 0; i < rows.size(); ++i) rows[i] += home.expert_rows[i];
  }
  if (slice_ranks_ > 0) {
    // The one rank's local expert l serves the rows for every rank's local expert l.
    const int64_t experts = Info().num_experts, local = experts / slice_ranks_;
    std::vector<int64_t> served(Info().num_layers * local, 0);
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto layer = static_cast<int64_t>(i) / experts, expert = static_cast<int64_t>(i) % experts;
      served[layer * local + expert % local] += rows[i];
    }
    rows = std::move(served);
  }
  return std::ranges::count_if(rows, [](int64_t n) { return n > 0; });
}

Work WorkOf(const StepRecord& step, const ModelConfig& c, const EngineInfo& info) {
  const double q = static_cast<double>(c.num_heads * c.head_dim), kv = static_cast<double>(c.num_kv_heads * c.head_dim);
  const double hidden = static_cast<double>(c.hidden_size), layers = static_cast<double>(c.num_layers);
  const double attention = layers * hidden * (2 * q + 2 * kv) + layers * hidden * static_cast<double>(c.num_experts);
  const double expert =
      hidden * static_cast<double>(c.expert_hidden_size) * (c.activation == Activation::kSiluGated ? 3 : 2);
  const double head = hidden * static_cast<double>(c.vocab_size);
  const double tokens = static_cast<double>(step.tokens);
  return {.attention_bytes = 2 * attention * info.num_ranks,
          .expert_bytes = 2 * expert * static_cast<double>(step.experts_read),
          .kv_bytes = static_cast<double>(step.kv_tokens * info.kv_bytes_per_token),
          .head_bytes = step.logit_rows > 0 ? 2 * head : 0,
          .flops = 2 * (tokens * (attention + layers * static_cast<double>(c.experts_per_token) * expert) +
                        static_cast<double>(step.logit_rows) * head) +
                   4 * layers * q * static_cast<double>(step.attended_pairs)};
}

}  // namespace soloist::cli
