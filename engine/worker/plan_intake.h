// PlanIntake: what every engine over ranks checks of a StepPlan before its ranks see it.
#ifndef SOLOIST_ENGINE_WORKER_PLAN_INTAKE_H_
#define SOLOIST_ENGINE_WORKER_PLAN_INTAKE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/engine.h"
#include "engine/step.h"

namespace soloist {

class PlanIntake {
 public:
  // `info` must outlive it.
  explicit PlanIntake(const EngineInfo& info) : info_(info), previous_rows_(info.num_homes, 0) {}

  // The plan by itself: number of homes, each home's contents, and what they say of each other. INVALID_ARGUMENT.
  absl::Status CheckContents(const StepPlan& plan) const;
  // The plan after those before it, `in_flight` of which are not awaited: step number (INVALID_ARGUMENT), room
  // (FAILED_PRECONDITION), references to the previous result (INVALID_ARGUMENT). With OK it counts as submitted.
  absl::Status Accept(const StepPlan& plan, int in_flight);

  int64_t last_step() const { return last_step_; }
  // The results of what was submitted are gone: the next plan may not refer to them.
  void ForgetResults() { previous_rows_.assign(previous_rows_.size(), 0); }

 private:
  const EngineInfo& info_;
  int64_t last_step_ = 0;
  std::vector<int32_t> previous_rows_;  // [num_homes] of the last plan
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_PLAN_INTAKE_H_
