// SimulatedEngine: an Engine with no device. Remembers, per KV slot, which token of which prefix was written there, and
// samples tokens that are a function of the whole prefix as read through the block table, so that a block wrongly
// shared, freed or overwritten changes the tokens. SimulatedSequence is the same function with no blocks or batches.
//
// Ranks can be lost: then every slot of a lost home, and every slot that a lost step has written, is as if never
// written.
#ifndef SOLOIST_ENGINE_SIMULATED_ENGINE_H_
#define SOLOIST_ENGINE_SIMULATED_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"

namespace soloist {

// A loss of ranks.
struct SimulatedLoss {
  std::vector<int> homes;        // whose KV cache is gone; empty: a rank was only late
  std::vector<int> absent;       // homes without a rank from the recovery to the next one, and their KV cache gone
  int late_recovers = 0;         // calls of Recover that return DEADLINE_EXCEEDED before the one that succeeds
  int64_t next_step = 0;         // after the recovery; 0: goes on with the first lost step's number
  absl::Status never;            // not OK: what Recover returns for ever after
  std::vector<int> expert_rank;  // in force after the recovery; empty: as before
};

struct SimulatedOptions {
  int num_homes = 1;
  int num_layers = 1;
  int num_experts = 16;
  int experts_per_token = 2;
  PlanLimits limits;
  // Cost of a step in ns: base + per_token * (tokens of the busiest home) + per_kv_token * (keys that the busiest home
  // reads). Reported as device_ns.
  int64_t base_ns = 0;
  int64_t per_token_ns = 0;
  int64_t per_kv_token_ns = 0;
  // Called by Await with the step's number and cost before it returns; may block. Null: no delay.
  std::function<void(int64_t step, int64_t cost_ns)> delay;
  int64_t fail_at_step = 0;  // Await of that step returns UNAVAILABLE, and Recover cannot help; 0: never
  // Asked at the end of each Submit and Await with the step's number: a loss makes the call fail with UNAVAILABLE.
  // Null: no rank is ever lost. The number may come again after a recovery.
  std::function<std::optional<SimulatedLoss>(int64_t step, bool awaiting)> lose;
  // Asked by Recover after the late ones; may block for `timeout`. False: not yet, DEADLINE_EXCEEDED. Null: true.
  std::function<bool(absl::Duration timeout)> whole;
  // false: leaves the KV memory out and samples from (position, seed) alone; for timing schedulers.
  bool check_kv = true;
};

// The function that the engine computes, one token after another.
class SimulatedSequence {
 public:
  void Append(int32_t token);
  // What `row` samples as the next token. Tokens with a bias of -inf, and those that `mask` does not allow (empty: it
  // allows all), are never sampled unless nothing else is left; penalties make the result depend on the history.
  // `pending` is the token that row.pending_row stands for, or -1.
  int32_t Sample(const SamplingRow& row, std::span<const LogitBias> bias, std::span<const TokenHistory> history,
                 int32_t pending, int32_t vocab_size, std::span<const int32_t> mask = {}) const;

  // The log-probability of `token` as the next one, and the most likely one instead of it.
  float Logprob(int32_t token) const;
  int32_t MostLikely(int32_t vocab_size) const;

  // One KV slot.
  struct Slot {
    uint64_t value = 0;  // hash of (token, position, everything before)
    int64_t written_step = 0;
  };
  // The slot that Append(token) would write; and reading it back.
  uint64_t SlotValue(int32_t token) const;
  void Read(uint64_t slot_value);

 private:
  uint64_t prefix_ = 0;
  int32_t length_ = 0;
};

// Submit, Await and Recover: one thread. The rest: any.
class SimulatedEngine final : public Engine {
 public:
  explicit SimulatedEngine(SimulatedOptions options);

  const EngineInfo& Info() const override { return *info_.load(); }
  // Besides what Engine says: INTERNAL if a slot is written twice in a step, a sequence reads what is not its own, or a
  // plan has tokens of a home that is absent.
  absl::Status Submit(StepPlan plan) override;
  absl::StatusOr<StepResult> Await() override;
  absl::StatusOr<Recovery> Recover(absl::Duration timeout) override;
  std::vector<RankStatus> Ranks() const override;

 private:
  using Slots = std::vector<SimulatedSequence::Slot>;

  absl::Status RunHome(int home, const HomePlan& plan, HomeResult& result);
  void Sample(const HomePlan& plan, int row, const SimulatedSequence& sequence, std::span<const int32_t> previous,
              HomeResult& result) const;
  void Route(const HomePlan& plan, std::span<const int32_t> previous, HomeResult& result) const;
  int64_t CostNs(const StepPlan& plan) const;
  absl::Status Lose(int64_t step, SimulatedLoss loss);

  const SimulatedOptions options_;
  std::deque<EngineInfo> infos_;  // all that ever were in force
  std::atomic<const EngineInfo*> info_;
  std::vector<bool> present_;                      // [num_homes]
  std::vector<Slots> slots_;                       // [num_homes][num_blocks * block_size]
  std::vector<std::vector<int32_t>> last_tokens_;  // [num_homes] of the last step
  int64_t last_submitted_ = 0;
  int64_t last_awaited_ = 0;
  absl::Status failure_;
  std::optional<SimulatedLoss> loss_;  // until it is recovered
  std::deque<StepResult> results_;

  mutable std::mutex mutex_;
  int64_t last_finished_ = 0;            // mutex_
  RankState state_ = RankState::kReady;  // mutex_; of `affected_`
  std::vector<int> affected_;            // mutex_; ranks
  std::string message_;                  // mutex_
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_SIMULATED_ENGINE_H_
