// StepRunner: a rank's steps, from the plan to the result that is reported. The rank's thread enqueues; where the
// device works on its own, a second thread waits for what it does, so that the next step is enqueued meanwhile.
#ifndef SOLOIST_ENGINE_CLUSTER_STEP_RUNNER_H_
#define SOLOIST_ENGINE_CLUSTER_STEP_RUNNER_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "absl/status/status.h"
#include "engine/step.h"
#include "engine/worker/worker.h"

namespace soloist {

class StepRunner {
 public:
  // Either is called once per step that was submitted, from the rank's thread or the second one. After a failure the
  // steps behind it are dropped without a call until WaitIdle.
  using OnResult = std::function<void(int64_t epoch, int64_t step, const HomeResult& result)>;
  using OnFailure = std::function<void(int64_t epoch, int64_t step, const absl::Status& status)>;

  // `worker` must outlive it.
  StepRunner(Worker& worker, OnResult on_result, OnFailure on_failure);
  ~StepRunner();
  StepRunner(const StepRunner&) = delete;
  StepRunner& operator=(const StepRunner&) = delete;

  // The rank's thread.
  void Run(int64_t epoch, const HomePlan& plan);
  // Waits until the second thread is out of the worker. What was submitted and not finished is forgotten. The rank's
  // thread, with the communicator aborted or nothing in flight.
  void WaitIdle();

 private:
  struct InFlight {
    int64_t epoch = 0;
    int64_t step = 0;
  };
  void Finish(const InFlight& step);
  void FinishSteps();

  Worker& worker_;
  const OnResult on_result_;
  const OnFailure on_failure_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<InFlight> in_flight_;  // enqueued, for the second thread
  bool finishing_ = false;          // it is in the worker
  bool failed_ = false;             // since the last WaitIdle
  bool stopping_ = false;
  std::thread finisher_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_STEP_RUNNER_H_
