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

// Of one call of Recover: cancellations and the end of the loop wait for it.
constexpr absl::Duration kRecoverTimeout = absl::Milliseconds(50);

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
        scheduler_(options, engine.Info(), LastStep(engine) + 1, [this] { inbox_.Wake(); }),
        inbox_(options.max_queue, scheduler_.Load(), clock.NowNs()),
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
  EngineCondition condition() const override { return inbox_.condition(); }

 private:
  void Run() {
    bool idle = false, awaits_masks = false;
    for (;;) {
      Inbox::Batch batch = inbox_.Take(/*wait=*/idle || awaits_masks);
      Accept(batch);
      if (batch.stop) break;
      bool worked = true;
      if (recovering_) {
        TryRecover();
      } else {
        worked = Turn();
      }
      // With nothing in flight, they are all that there is to wait for.
      awaits_masks = !worked && scheduler_.AwaitsMasks();
      Deliver();
      idle = !worked && scheduler_.num_requests() == 0;
      if (idle && options_.check_integrity_when_idle && healthy_) CHECK_OK(scheduler_.CheckIntegrity(/*idle=*/true));
    }
    scheduler_.FinishAll(FinishReason::kCancelled, absl::OkStatus(), /*lost=*/!healthy_ || recovering_);
    Deliver();
    // Leave the engine with nothing in flight. A rank that is lost now is the next loop's to recover.
    while (scheduler_.plans_in_flight() > 0 && !recovering_) AwaitOldest();
    Deliver();
  }

  // Submits the next plan if there is one, then awaits the oldest if nothing else is left to do before it. False:
  // nothing was in flight and nothing could be submitted.
  bool Turn() {
    AwaitMasks();
    const bool submitted = healthy_ && scheduler_.plans_in_flight() < Engine::kMaxInFlight && SubmitNext();
    if (recovering_) return true;
    Deliver();  // the ends of outputs that were found complete
    const int32_t in_flight = scheduler_.plans_in_flight();
    if (in_flight == Engine::kMaxInFlight || (!submitted && in_flight > 0)) AwaitOldest();
    return submitted || in_flight > 0;
  }

  // While a step is in flight, the next plan is in no hurry: outputs that got their token from the last one still come
  // into it if their masks are there soon. Half a step leaves the rest of it for the plan.
  void AwaitMasks() {
    if (scheduler_.plans_in_flight() == 0 || !scheduler_.AwaitsMasks()) return;
    const int64_t deadline = clock_.NowNs() + scheduler_.last_step_device_ns() / 2;
    while (scheduler_.AwaitsMasks()) {
      const int64_t left = deadline - clock_.NowNs();
      if (left <= 0 || !inbox_.AwaitWake(absl::Nanoseconds(left))) return;
    }
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
    if (absl::Status status = engine_.Submit(*std::move(plan)); !status.ok()) Lose(status);
    return true;
  }

  void AwaitOldest() {
    absl::StatusOr<StepResult> result = engine_.Await();
    if (!result.ok()) return Lose(result.status());
    const int64_t start = clock_.NowNs();
    if (absl::Status status = scheduler_.Commit(*result, start); !status.ok()) return Fail(status);
    schedule_ns_ += clock_.NowNs() - start;
    if (scheduler_.num_requests() > 0) Publish();  // else Deliver does, before the last OnFinish counts
  }

  // The plans in flight stay as they are until the engine says what it has kept.
  void Lose(const absl::Status& status) {
    if (!absl::IsUnavailable(status)) return Fail(status);
    spdlog::warn("recovering: {}", status.message());
    recovering_ = true;
    loss_ = status;
    loss_ns_ = clock_.NowNs();
    inbox_.Recovering(status, loss_ns_);
  }

  void TryRecover() {
    const absl::StatusOr<Recovery> recovery = engine_.Recover(kRecoverTimeout);
    if (absl::IsDeadlineExceeded(recovery.status())) return;
    recovering_ = false;
    // It never could: then the loss is the reason.
    if (absl::IsFailedPrecondition(recovery.status())) return Fail(loss_);
    if (!recovery.ok()) return Fail(Annotate(recovery.status(), fmt::format("recovery after '{}'", loss_.message())));
    const int64_t requeued = scheduler_.Load().requeued_sequences;
    if (absl::Status status = scheduler_.Recover(*recovery); !status.ok()) return Fail(status);
    spdlog::info("recovered after {} ms: {} of {} homes kept, {} usable, {} sequences start again",
                 (clock_.NowNs() - loss_ns_) / 1'000'000, std::ranges::count(recovery->home_kept, true),
                 recovery->home_kept.size(), std::ranges::count(recovery->home_usable, true),
                 scheduler_.Load().requeued_sequences - requeued);
    Publish();
    inbox_.Recovered(clock_.NowNs());
  }

  void Fail(const absl::Status& status) {
    spdlog::error("engine failed: {}", status.ToString());
    healthy_ = false;
    failure_ = status;
    inbox_.Fail(status, clock_.NowNs());
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
        if (const auto* scores = std::get_if<PromptLogprobs>(&event.what)) {
          if (!event.request->sink->OnPromptLogprobs(*scores)) {
            scheduler_.Cancel(event.request->id, -1, FinishReason::kCancelled);
          }
          continue;
        }
        // Whoever is woken by the end of a request may use its id again.
        if (event.last) inbox_.Release(event.request->id);
        event.request->sink->OnFinish(std::get<FinishEvent>(event.what));
        if (!event.last) continue;
        event.request.reset();
        inbox_.Finished();
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
  bool recovering_ = false;  // from loss_, since loss_ns_
  absl::Status loss_;
  int64_t loss_ns_ = 0;
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
