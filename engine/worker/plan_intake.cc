#include "engine/worker/plan_intake.h"

#include <algorithm>

#include "base/status.h"

namespace soloist {

absl::Status PlanIntake::CheckContents(const StepPlan& plan) const {
  if (static_cast<int>(plan.homes.size()) != info_.num_homes) {
    return InvalidArgument("plan: {} homes, the engine has {}", plan.homes.size(), info_.num_homes);
  }
  int32_t largest = 0;
  for (const HomePlan& home : plan.homes) {
    RETURN_IF_ERROR(home.Validate(info_.limits));
    largest = std::max(largest, home.num_tokens());
  }
  for (int h = 0; h < info_.num_homes; ++h) {
    const HomePlan& home = plan.homes[h];
    if (home.max_home_tokens() != largest || home.step() != plan.step) {
      return InvalidArgument("plan: home {} says step {} and {} tokens on the busiest home, expected {} and {}", h,
                             home.step(), home.max_home_tokens(), plan.step, largest);
    }
    if (home.is_split() != plan.homes[0].is_split()) {
      return InvalidArgument("plan: home {} has {} micro-batches, home 0 has {}", h, home.is_split() ? 2 : 1,
                             plan.homes[0].is_split() ? 2 : 1);
    }
    if (home.dispatch_rows() != plan.homes[0].dispatch_rows()) {
      return InvalidArgument("plan: home {} has room for {} dispatch rows, home 0 for {}", h, home.dispatch_rows(),
                             plan.homes[0].dispatch_rows());
    }
  }
  return absl::OkStatus();
}

absl::Status PlanIntake::Accept(const StepPlan& plan, int in_flight) {
  if (plan.step != last_step_ + 1) return InvalidArgument("plan: step {} after step {}", plan.step, last_step_);
  if (in_flight >= Engine::kMaxInFlight) {
    return FailedPrecondition("{} steps are in flight, limit {}", in_flight, Engine::kMaxInFlight);
  }
  for (int h = 0; h < info_.num_homes; ++h) {
    if (plan.homes[h].previous_rows() > previous_rows_[h]) {
      return InvalidArgument("plan: home {} refers to {} rows of the previous step, which had {}", h,
                             plan.homes[h].previous_rows(), previous_rows_[h]);
    }
  }
  for (int h = 0; h < info_.num_homes; ++h) previous_rows_[h] = plan.homes[h].num_logit_rows();
  last_step_ = plan.step;
  return absl::OkStatus();
}

}  // namespace soloist
