// An engine whose steps overflow when the test says so: then it computes from wrong tokens, writes wrong keys and
// values, and returns wrong tokens, as a step without room does.
#ifndef SOLOIST_TESTS_REPLAY_OVERFLOWING_ENGINE_H_
#define SOLOIST_TESTS_REPLAY_OVERFLOWING_ENGINE_H_

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/engine.h"
#include "engine/replay.h"
#include "engine/simulated_engine.h"

namespace soloist {

// `plan` of other tokens; references stay.
inline HomePlan WithWrongTokens(const HomePlan& plan, int32_t vocab_size) {
  const auto copy = [](auto span) { return std::vector(span.begin(), span.end()); };
  HomePlanParts parts{.token_ids = copy(plan.token_ids()),
                      .positions = copy(plan.positions()),
                      .slot_mapping = copy(plan.slot_mapping()),
                      .query_starts = copy(plan.query_starts()),
                      .seq_lens = copy(plan.seq_lens()),
                      .block_tables = copy(plan.block_tables()),
                      .max_blocks = plan.max_blocks(),
                      .logit_rows = copy(plan.logit_rows()),
                      .sampling = copy(plan.sampling()),
                      .bias = copy(plan.bias()),
                      .history = copy(plan.history())};
  for (int32_t& id : parts.token_ids) {
    if (id >= 0) id = (id + 1) % vocab_size;
  }
  HomePlan wrong(parts, plan.step(), plan.max_home_tokens(), plan.previous_rows());
  wrong.Renumber(plan.step(), plan.dispatch_rows());
  return wrong;
}

class OverflowingEngine final : public Engine {
 public:
  // `overflows` is asked for each step with less room than the worst case.
  OverflowingEngine(SimulatedOptions options, std::function<bool(const StepPlan&)> overflows)
      : vocab_size_(options.limits.vocab_size), engine_(std::move(options)), overflows_(std::move(overflows)) {}

  const EngineInfo& Info() const override { return engine_.Info(); }
  absl::Status Submit(StepPlan plan) override {
    int64_t rows = 0;
    if (plan.homes[0].dispatch_rows() > 0 && overflows_(plan)) {
      rows = plan.homes[0].dispatch_rows() + 1;
      ++overflows;
      for (HomePlan& home : plan.homes) home = WithWrongTokens(home, vocab_size_);
    }
    RETURN_IF_ERROR(engine_.Submit(std::move(plan)));
    overflow_rows_.push_back(rows);
    return absl::OkStatus();
  }
  absl::StatusOr<StepResult> Await() override {
    ASSIGN_OR_RETURN(StepResult result, engine_.Await());
    const int64_t rows = overflow_rows_.front();
    overflow_rows_.pop_front();
    // Of one home only: the others' steps are void too.
    result.homes[result.step % std::ssize(result.homes)].overflow_rows = rows;
    return result;
  }
  absl::StatusOr<Recovery> Recover(absl::Duration timeout) override {
    ASSIGN_OR_RETURN(Recovery recovery, engine_.Recover(timeout));
    overflow_rows_.clear();
    return recovery;
  }
  std::vector<RankStatus> Ranks() const override { return engine_.Ranks(); }

  int64_t overflows = 0;

 private:
  const int32_t vocab_size_;
  SimulatedEngine engine_;
  const std::function<bool(const StepPlan&)> overflows_;
  std::deque<int64_t> overflow_rows_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_REPLAY_OVERFLOWING_ENGINE_H_
