// What the scheduler's tests share: a sink that remembers, the unbatched reference, and a driver without threads.
#ifndef SOLOIST_TESTS_SCHEDULER_TESTING_H_
#define SOLOIST_TESTS_SCHEDULER_TESTING_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "engine/simulated_engine.h"
#include "scheduler/scheduler.h"
#include "scheduler/step_loop.h"

namespace soloist {

// Checks the contract of TokenSink while it records. Thread-safe.
class RecordingSink final : public TokenSink {
 public:
  struct Output {
    std::vector<int32_t> tokens;
    std::vector<float> logprobs;
    std::vector<size_t> num_top;  // entries of top_logprobs
    std::vector<int64_t> steps;   // of the driver, at each token
    int num_finishes = 0;
    FinishEvent finish;
    bool after_finish = false;
  };

  // Refuses tokens of every output after `accept`; -1: never.
  explicit RecordingSink(int num_outputs, int accept = -1) : accept_(accept), outputs_(num_outputs) {}
  bool OnToken(TokenEvent event) override;
  bool OnPromptLogprobs(const PromptLogprobs& event) override;
  void OnFinish(const FinishEvent& event) override;

  std::vector<Output> outputs() const;
  // All that came, as one.
  PromptLogprobs scores() const;
  int num_finished() const;
  void set_step(const int64_t* step) { step_ = step; }

 private:
  const int accept_;
  const int64_t* step_ = nullptr;
  mutable std::mutex mutex_;
  std::vector<Output> outputs_;
  PromptLogprobs scores_;
};

// To the request's sink; what the sink says.
bool Deliver(OutputEvent event);

// How an output that has `made` tokens samples the next: without what bans end tokens.
SamplingRow RowOf(const Request& request, int32_t output_index, int32_t made);
std::vector<LogitBias> BiasOf(const SamplingParams& params);

// What one output must be, computed with no batch, no blocks and no plan.
struct Reference {
  std::vector<int32_t> tokens;
  FinishReason reason = FinishReason::kNone;
  int32_t stop_token = -1;
};
Reference ReferenceRun(const Request& request, int32_t output_index, const std::vector<int32_t>& eos_token_ids,
                       int32_t vocab_size);

// The log-probabilities of the request's prompt that came are right, and all there unless it was cancelled.
void ExpectScores(const Request& request, const RecordingSink& sink, int32_t vocab_size);

// Small limits; `num_blocks` of `block_size`.
PlanLimits TestLimits(int32_t num_blocks, int32_t block_size);
// A request with a sink of its own.
Request MakeRequest(const std::string& id, std::vector<int32_t> prompt, int32_t max_tokens);

// Scheduler and SimulatedEngine, stepped by hand. A lost rank is recovered as the step loop does.
class Driver {
 public:
  Driver(const SchedulerOptions& options, const SimulatedOptions& engine);

  // Keeps a copy for the reference. INVALID_ARGUMENT as CheckRequest.
  absl::Status Add(Request request);
  void Cancel(const std::string& id, int32_t output_index);
  // Schedules if it can and awaits if `depth` plans are in flight or there is nothing to schedule. False: nothing done.
  // After a loss: one try to recover.
  bool Turn(int depth = 2);
  // Until nothing is left; EXPECTs that it takes at most `max_turns`.
  void RunToEnd(int64_t max_turns, int depth = 2);
  // Every output of every request against its reference; returns the number of tokens compared.
  int64_t ExpectReference() const;

  Scheduler& scheduler() { return scheduler_; }
  SimulatedEngine& engine() { return engine_; }
  bool recovering() const { return recovering_; }
  int64_t steps() const { return steps_; }
  const RecordingSink& sink(const std::string& id) const { return *sinks_.at(id); }
  size_t num_requests() const { return requests_.size(); }
  // Looks at every plan before it is submitted.
  std::function<void(const StepPlan&)> observer;
  // Looks at every recovery before the scheduler does.
  std::function<void(const Recovery&)> recovery_observer;

 private:
  struct Known {
    Request request;
    std::vector<bool> cancelled;
  };
  void Deliver();
  // True if a rank was lost.
  bool Lost(const absl::Status& status);
  void TryRecover();

  const SchedulerOptions options_;
  SimulatedEngine engine_;
  Scheduler scheduler_;
  int64_t steps_ = 0;
  int64_t now_ns_ = 1;
  bool recovering_ = false;
  std::map<std::string, Known> requests_;
  std::map<std::string, std::shared_ptr<RecordingSink>> sinks_;
};

// Random requests over a small vocabulary with shared prefixes, salts, penalties, stops, n > 1, some that ask for
// log-probabilities of the prompt, and of those some for nothing else.
Request RandomRequest(std::mt19937_64& random, const std::string& id, const PlanLimits& limits, int32_t max_length);

}  // namespace soloist

#endif  // SOLOIST_TESTS_SCHEDULER_TESTING_H_
