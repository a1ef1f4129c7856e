#include "engine/worker/rank_threads.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "base/status.h"
#include "engine/worker/plan_intake.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

// A step on its way: every rank fills its own home; the last one to finish makes it ready.
struct PendingStep {
  StepPlan plan;
  StepResult result;
  int ranks_left = 0;
};

class RankThreads final : public Engine {
 public:
  RankThreads(EngineInfo info, std::unique_ptr<DeviceFactory> factory, std::unique_ptr<SharedWeights> shared,
              std::vector<std::unique_ptr<Worker>> workers, const Clock& clock)
      : info_(std::move(info)),
        clock_(clock),
        factory_(std::move(factory)),
        shared_(std::move(shared)),
        workers_(std::move(workers)),
        ranks_(workers_.size()) {
    for (int r = 0; r < info_.num_ranks; ++r) {
      ranks_[r] = {.rank = r, .state = RankState::kReady, .message = ""};
      threads_.emplace_back([this, r] { RunRank(r); });
      if (!workers_[r]->device().host_accessible()) threads_.emplace_back([this, r] { FinishSteps(r); });
    }
  }

  ~RankThreads() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (auto& worker : workers_) worker->comm().Abort(absl::CancelledError("the engine is stopping"));
    for (std::thread& thread : threads_) thread.join();
  }

  const EngineInfo& Info() const override { return info_; }

  absl::Status Submit(StepPlan plan) override {
    RETURN_IF_ERROR(intake_.CheckContents(plan));
    std::unique_lock lock(mutex_);
    if (!error_.ok()) return error_;
    RETURN_IF_ERROR(intake_.Accept(plan, static_cast<int>(pending_.size())));
    auto step = std::make_unique<PendingStep>();
    step->result.step = plan.step;
    step->result.homes.resize(info_.num_homes);
    step->ranks_left = info_.num_ranks;
    step->plan = std::move(plan);
    pending_.push_back(std::move(step));
    lock.unlock();
    changed_.notify_all();
    return absl::OkStatus();
  }

  absl::StatusOr<StepResult> Await() override {
    std::unique_lock lock(mutex_);
    if (pending_.empty() && error_.ok()) return absl::FailedPreconditionError("no step is in flight");
    done_.wait(lock, [this] { return !error_.ok() || pending_.front()->ranks_left == 0; });
    if (!error_.ok()) return error_;
    StepResult result = std::move(pending_.front()->result);
    pending_.pop_front();
    return result;
  }

  std::vector<RankStatus> Ranks() const override {
    std::lock_guard lock(mutex_);
    return ranks_;
  }

 private:
  // The rank's own thread: enqueues one step after the other. Where the device has done its work by then (a CPU), it
  // reports the result too; elsewhere FinishSteps does, so that the next step is enqueued while this one runs.
  void RunRank(int rank) {
    Worker& worker = *workers_[rank];
    if (const absl::Status bound = worker.device().BindThread(); !bound.ok()) return Fail(rank, 1, bound);
    for (int64_t next = 1;; ++next) {
      PendingStep* step = nullptr;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || !error_.ok() || intake_.last_step() >= next; });
        if (stopping_ || !error_.ok()) return;
        step = pending_[next - pending_.front()->plan.step].get();
        if (ranks_[rank].busy_since_ns == 0) ranks_[rank].busy_since_ns = clock_.NowNs();
      }
      if (const absl::Status status = worker.Submit(step->plan.homes[rank]); !status.ok()) {
        return Fail(rank, next, status);
      }
      if (worker.device().host_accessible()) {
        if (!FinishStep(rank, next)) return;
        continue;
      }
      {
        std::lock_guard lock(mutex_);
        enqueued_[rank] = next;
      }
      changed_.notify_all();
    }
  }

  void FinishSteps(int rank) {
    if (const absl::Status bound = workers_[rank]->device().BindThread(); !bound.ok()) return Fail(rank, 1, bound);
    for (int64_t next = 1;; ++next) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || !error_.ok() || enqueued_[rank] >= next; });
        if (stopping_ || !error_.ok()) return;
      }
      if (!FinishStep(rank, next)) return;
    }
  }

  // Waits for the rank's part of a step; false if it failed.
  bool FinishStep(int rank, int64_t number) {
    auto result = workers_[rank]->Finish();
    if (!result.ok()) {
      Fail(rank, number, result.status());
      return false;
    }
    const int64_t now = clock_.NowNs();
    std::unique_lock lock(mutex_);
    PendingStep& step = *pending_[number - pending_.front()->plan.step];
    ranks_[rank].busy_since_ns = intake_.last_step() > number ? now : 0;
    ranks_[rank].last_step = number;
    ranks_[rank].last_step_ns = now;
    step.result.device_ns = std::max(step.result.device_ns, result->device_ns);
    step.result.homes[rank] = *std::move(result);
    const bool last = --step.ranks_left == 0;
    lock.unlock();
    if (last) done_.notify_all();
    return true;
  }

  void Fail(int rank, int64_t step, const absl::Status& status) {
    {
      std::lock_guard lock(mutex_);
      ranks_[rank].busy_since_ns = 0;
      ranks_[rank].state = RankState::kFailed;
      ranks_[rank].message = status.ToString();
      if (error_.ok() && !stopping_) {
        error_ = Annotate(status, fmt::format("rank {}, step {}", rank, step));
        spdlog::error("engine: {}", error_.ToString());
      }
    }
    workers_[rank]->comm().Abort(status);
    changed_.notify_all();
    done_.notify_all();
  }

  const EngineInfo info_;
  const Clock& clock_;
  // Order of destruction: workers use the weights, both use the factory's devices.
  const std::unique_ptr<DeviceFactory> factory_;
  const std::unique_ptr<SharedWeights> shared_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<std::thread> threads_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;                   // a plan, an error or the end
  std::condition_variable done_;                      // a result or an error
  std::deque<std::unique_ptr<PendingStep>> pending_;  // submitted, not awaited
  PlanIntake intake_{info_};
  std::vector<RankStatus> ranks_;
  std::vector<int64_t> enqueued_ = std::vector<int64_t>(info_.num_ranks, 0);  // last step that the rank has enqueued
  absl::Status error_;
  bool stopping_ = false;
};

}  // namespace

std::unique_ptr<Engine> CreateRankThreads(EngineInfo info, std::unique_ptr<DeviceFactory> factory,
                                          std::unique_ptr<SharedWeights> shared,
                                          std::vector<std::unique_ptr<Worker>> workers, const Clock& clock) {
  return std::make_unique<RankThreads>(std::move(info), std::move(factory), std::move(shared), std::move(workers),
                                       clock);
}

}  // namespace soloist
