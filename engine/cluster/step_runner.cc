#include "engine/cluster/step_runner.h"

#include <utility>

#include "base/status.h"

namespace soloist {

StepRunner::StepRunner(Worker& worker, OnResult on_result, OnFailure on_failure)
    : worker_(worker), on_result_(std::move(on_result)), on_failure_(std::move(on_failure)) {
  if (!worker_.device().host_accessible()) finisher_ = std::thread([this] { FinishSteps(); });
}

StepRunner::~StepRunner() {
  if (!finisher_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  finisher_.join();
}

void StepRunner::Run(int64_t epoch, const HomePlan& plan) {
  const InFlight step{epoch, plan.step()};
  size_t waiting = 0;
  {
    const std::lock_guard lock(mutex_);
    if (failed_) return;
    waiting = in_flight_.size() + (finishing_ ? 1 : 0);
  }
  const absl::Status status = waiting < Worker::kMaxInFlight ? worker_.Submit(plan)
                                                             : FailedPrecondition("{} steps are in flight, limit {}",
                                                                                  waiting, Worker::kMaxInFlight);
  if (!status.ok()) {
    {
      const std::lock_guard lock(mutex_);
      if (std::exchange(failed_, true)) return;
    }
    return on_failure_(epoch, step.step, status);
  }
  if (!finisher_.joinable()) {
    Finish(step);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    in_flight_.push_back(step);
  }
  changed_.notify_all();
}

void StepRunner::Finish(const InFlight& step) {
  const absl::StatusOr<HomeResult> result = worker_.Finish();
  {
    // Before the result is told: with it, another step may come.
    const std::lock_guard lock(mutex_);
    finishing_ = false;
    if (!result.ok() && std::exchange(failed_, true)) return;
  }
  changed_.notify_all();
  if (result.ok()) {
    on_result_(step.epoch, step.step, *result);
  } else {
    on_failure_(step.epoch, step.step, result.status());
  }
}

void StepRunner::FinishSteps() {
  const absl::Status bound = worker_.device().BindThread();
  for (;;) {
    InFlight step;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stopping_ || (!in_flight_.empty() && !failed_); });
      if (stopping_) return;
      step = in_flight_.front();
      in_flight_.pop_front();
      failed_ = !bound.ok();
      finishing_ = bound.ok();
    }
    if (!bound.ok()) {
      on_failure_(step.epoch, step.step, bound);
      continue;
    }
    Finish(step);
  }
}

void StepRunner::WaitIdle() {
  std::unique_lock lock(mutex_);
  in_flight_.clear();
  changed_.wait(lock, [&] { return !finishing_; });
  failed_ = false;
}

}  // namespace soloist
