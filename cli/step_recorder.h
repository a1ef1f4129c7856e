// StepRecorder: an Engine that passes everything on and keeps what each step did, and the bytes and FLOPs that such a
// step must move: the floor that benchmarks divide by.
#ifndef SOLOIST_CLI_STEP_RECORDER_H_
#define SOLOIST_CLI_STEP_RECORDER_H_

#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/model/config.h"

namespace soloist::cli {

struct StepRecord {
  int64_t tokens = 0;
  int64_t sequences = 0;
  int64_t max_rows = 0;        // most rows of a sequence; 1: a pure decode step
  int64_t kv_tokens = 0;       // keys read: of each sequence once
  int64_t attended_pairs = 0;  // query-key pairs
  int64_t experts_read = 0;    // (layer, local expert) with at least one row
  int64_t logit_rows = 0;
  int64_t device_ns = 0;
  int64_t idle_ns = 0;
  int64_t enqueue_ns = 0;
  bool split = false;  // two micro-batches
  // Mean over the ranks; see HomeResult.
  int64_t comm_ns = 0;
  int64_t comm_wait_ns = 0;
  std::vector<GroupTime> groups;  // of a profiled step, of home 0
};

class StepRecorder final : public Engine {
 public:
  // `slice_ranks`: see EngineOptions. `engine` must outlive it.
  StepRecorder(Engine& engine, int slice_ranks) : engine_(engine), slice_ranks_(slice_ranks) {}
  const EngineInfo& Info() const override { return engine_.Info(); }
  std::vector<RankStatus> Ranks() const override { return engine_.Ranks(); }
  absl::Status Submit(StepPlan plan) override;
  absl::StatusOr<StepResult> Await() override;
  absl::StatusOr<Recovery> Recover(absl::Duration timeout) override;

  // Those since the last call.
  std::vector<StepRecord> TakeRecords();

 private:
  int64_t ExpertsRead(const StepResult& result) const;

  Engine& engine_;
  const int slice_ranks_;
  std::deque<StepRecord> in_flight_;
  std::mutex mutex_;
  std::vector<StepRecord> records_;
};

// Bytes by what they are, and FLOPs (two per weight and row). Weights once per step and rank (of experts those with
// rows), keys and values once per sequence. Activations are left out.
struct Work {
  double attention_bytes = 0;  // projections and routers
  double expert_bytes = 0;
  double kv_bytes = 0;
  double head_bytes = 0;
  double flops = 0;
  double bytes() const { return attention_bytes + expert_bytes + kv_bytes + head_bytes; }
};
Work WorkOf(const StepRecord& step, const ModelConfig& config, const EngineInfo& info);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_STEP_RECORDER_H_
