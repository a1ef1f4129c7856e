#include "scheduler/step_loop.h"

#include <algorithm>
#include <optional>
#include <thread>
#include <utility>
#include <variant>

#include "base/check.h"
#include "base/logging.h"
#include "base/status.h"
#include "scheduler/inbox.h"
#include "scheduler/scheduler.h"

namespace soloist {
namespace {

int64_t LastStep(const Engine& engine) {
  int64_t last = 0;
  for (const RankStatus& rank : engine.Ranks()) last = std::max(last, rank.last_step);
  return last;
}

class ThreadedStepLoop final : public StepLoop {
 public:
  ThreadedStepLoop(const SchedulerOptions& options, Engine& engine, const Clock& clock)
      : options_(options),
        engine_(engine),
        clock_(clock),
        limits_(engine.Info().limits),
        scheduler_(options, engine.Info(), LastStep(engine) + 1),
        inbox_(options.max_queue, scheduler_.Load()),
        thread_([this] { Run(); }) {}

  ~ThreadedStepLoop() override {
    inbox_.Stop();
    thread_.join();
  }

  absl::Status Add(Request request) override {
    RETURN_IF_ERROR(CheckRequest(request, limits_));
    return inbox_.Add(std::move(request), clock_.NowNs());
  }
  void Cancel(const std::string& request_id, int32_t output_index, FinishReason reason) override {
    inbox_.Cancel({request_id, output_index, reason});
  }
  void Drain() override { inbox_.Drain(); }
  bool draining() const override { return inbox_.draining(); }
  absl::Status AwaitIdle(absl::Duration timeout) override { return inbox_.AwaitIdle(timeout); }
  LoadSnapshot Load() const override { return inbox_.Load(); }
  absl::Status health() const override { return inbox_.health(); }

 private:
  // One turn: what has arrived, then submit the next plan if there is one, then await the oldest if nothing else is
  // left to do before it.
  void Run() {
    bool idle = false;
    for (;;) {
      Inbox::Batch batch = inbox_.Take(/*wait=*/idle);
      if (batch.stop) {
        Accept(batch);
        break;
      }
      Accept(batch);
      const bool submitted = healthy_ && scheduler_.plans_in_flight() < Engine::kMaxInFlight && SubmitNext();
      const int32_t in_flight = scheduler_.plans_in_flight();
      if (in_flight == Engine::kMaxInFlight || (!submitted && in_flight > 0)) AwaitOldest();
      Deliver();
      idle = !submitted && in_flight == 0 && scheduler_.num_requests() == 0;
      if (idle && options_.check_integrity_when_idle && healthy_) CHECK_OK(scheduler_.CheckIntegrity(/*idle=*/true));
    }
    scheduler_.FinishAll(FinishReason::kCancelled, absl::OkStatus(), /*lost=*/!healthy_);
    Deliver();
    // Leave the engine with nothing in flight.
    while (scheduler_.plans_in_flight() > 0) AwaitOldest();
    Deliver();
  }

  void Accept(Inbox::Batch& batch) {
    for (Inbox::Arrival& arrival : batch.arrivals) scheduler_.Add(std::move(arrival.request), arrival.arrival_ns);
    for (const Inbox::Cancellation& c : batch.cancellations) {
      scheduler_.Cancel(c.request_id, c.output_index, c.reason);
    }
    if (!healthy_) scheduler_.FinishAll(FinishReason::kError, failure_, /*lost=*/true);
    if (!batch.arrivals.empty() || !batch.cancellations.empty()) Deliver();
  }

  bool SubmitNext() {
    const int64_t start = clock_.NowNs();
    std::optional<StepPlan> plan = scheduler_.Schedule(start);
    schedule_ns_ += clock_.NowNs() - start;
    if (!plan.has_value()) return false;
    if (absl::Status status = engine_.Submit(*std::move(plan)); !status.ok()) Fail(status);
    return true;
  }

  void AwaitOldest() {
    absl::StatusOr<StepResult> result = engine_.Await();
    if (!result.ok()) return Fail(result.status());
    const int64_t start = clock_.NowNs();
    if (absl::Status status = scheduler_.Commit(*result, start); !status.ok()) return Fail(status);
    schedule_ns_ += clock_.NowNs() - start;
    if (scheduler_.num_requests() > 0) Publish();  // else Deliver does, before the last OnFinish counts
  }

  void Fail(const absl::Status& status) {
    spdlog::error("engine failed: {}", status.ToString());
    healthy_ = false;
    failure_ = status;
    inbox_.Fail(status);
    scheduler_.FinishAll(FinishReason::kError, status, /*lost=*/true);
  }

  void Publish() {
    LoadSnapshot load = scheduler_.Load();
    load.schedule_ns = schedule_ns_;
    inbox_.Publish(std::move(load));
  }

  // A refusing sink cancels its output, which may make more events.
  void Deliver() {
    for (std::vector<OutputEvent> events; !(events = scheduler_.TakeEvents()).empty();) {
      // Whoever is woken by the end of a request finds the load without it.
      if (std::ranges::any_of(events, &OutputEvent::last)) Publish();
      for (OutputEvent& event : events) {
        if (auto* token = std::get_if<TokenEvent>(&event.what)) {
          const int32_t output = token->output_index;
          if (!event.request->sink->OnToken(std::move(*token))) {
            scheduler_.Cancel(event.request->id, output, FinishReason::kCancelled);
          }
          continue;
        }
        event.request->sink->OnFinish(std::get<FinishEvent>(event.what));
        if (!event.last) continue;
        const std::string id = event.request->id;
        event.request.reset();
        inbox_.Finished(id);
      }
    }
  }

  const SchedulerOptions options_;
  Engine& engine_;
  const Clock& clock_;
  const PlanLimits limits_;
  // The thread's.
  Scheduler scheduler_;
  bool healthy_ = true;
  absl::Status failure_;
  int64_t schedule_ns_ = 0;

  Inbox inbox_;
  std::thread thread_;  // last: sees all of the above
};

}  // namespace

absl::StatusOr<std::unique_ptr<StepLoop>> StepLoop::Create(const SchedulerOptions& options, Engine& engine,
                                                           const Clock& clock) {
  const PlanLimits& limits = engine.Info().limits;
  if (options.max_tokens_per_step < 1 || options.max_sequences < 1 || options.max_queue < 1) {
    return InvalidArgument("max_tokens_per_step {}, max_sequences {}, max_queue {}: each must be at least 1",
                           options.max_tokens_per_step, options.max_sequences, options.max_queue);
  }
  if (engine.Info().num_homes < 1 || limits.num_blocks < 1 || limits.block_size < 1 || limits.max_tokens < 1 ||
      limits.max_sequences < 1) {
    return FailedPrecondition("the engine has {} homes of {} KV blocks of {} tokens, {} tokens and {} sequences a step",
                              engine.Info().num_homes, limits.num_blocks, limits.block_size, limits.max_tokens,
                              limits.max_sequences);
  }
  return std::make_unique<ThreadedStepLoop>(options, engine, clock);
}

}  // namespace soloist
