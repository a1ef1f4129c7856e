// MicroBatchPolicy: which steps run as two micro-batches, so that the tokens of one travel between ranks while the
// other computes, and where each home's rows are divided: at half of their cost, not of their number.
#ifndef SOLOIST_ENGINE_MICRO_BATCHES_H_
#define SOLOIST_ENGINE_MICRO_BATCHES_H_

#include <cstdint>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/step.h"

namespace soloist {

enum class MicroBatches {
  kAuto,  // two where the dispatch is contiguous and at least EngineInfo::overlap_min_tokens are on the busiest home
  kOne,
  kTwo,  // wherever a home has two rows
};

// auto, 1 or 2; INVALID_ARGUMENT for anything else.
absl::StatusOr<MicroBatches> ParseMicroBatches(std::string_view text);

// The row, 0 to num_tokens, before which about half of the cost lies. Of two rows or more each side gets one. The
// border between two sequences goes before the exact half where it is off by no more than a sixteenth of the cost: a
// sequence on both sides has its keys read twice.
int32_t HalfOfCost(const HomePlan& plan, const RowCost& cost);

// One thread.
class MicroBatchPolicy {
 public:
  MicroBatchPolicy(MicroBatches wanted, const EngineInfo& info);

  // Whether a step with so many tokens on the busiest home runs as two.
  bool WantsTwo(int32_t max_home_tokens) const { return min_tokens_ > 0 && max_home_tokens >= min_tokens_; }
  // Splits all homes of the step, or none.
  void Apply(StepPlan& plan) const;

 private:
  const RowCost cost_;
  int64_t min_tokens_ = 0;  // 0: no step is split
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MICRO_BATCHES_H_
