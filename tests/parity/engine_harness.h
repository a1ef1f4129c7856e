// Runs requests through the real engine, scheduler and step loop in this process, for the parity tests.
#ifndef SOLOIST_TESTS_PARITY_ENGINE_HARNESS_H_
#define SOLOIST_TESTS_PARITY_ENGINE_HARNESS_H_

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/clock.h"
#include "engine/worker/in_process_engine.h"
#include "gtest/gtest.h"
#include "scheduler/step_loop.h"

namespace soloist {

// What one output produced.
struct Output {
  std::vector<int32_t> tokens;
  std::vector<std::vector<float>> logits;  // per token, if asked for
  std::vector<float> logprobs;             // per token
  std::vector<std::vector<std::pair<int32_t, float>>> top;
  PromptLogprobs prompt;  // of the request, with its first output
  FinishEvent finish;
};

class OutputSink final : public TokenSink {
 public:
  explicit OutputSink(int outputs) : outputs_(outputs), left_(outputs) {}
  bool OnToken(TokenEvent event) override {
    std::lock_guard lock(mutex_);
    Output& out = outputs_[event.output_index];
    out.tokens.push_back(event.token);
    out.logprobs.push_back(event.logprob);
    out.top.push_back(std::move(event.top_logprobs));
    if (!event.logits.empty()) out.logits.push_back(std::move(event.logits));
    return true;
  }
  bool OnPromptLogprobs(const PromptLogprobs& event) override {
    std::lock_guard lock(mutex_);
    PromptLogprobs& all = outputs_[0].prompt;
    EXPECT_EQ(event.first, all.size() + 1);
    all.num_top = event.num_top;
    const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
    append(all.tokens, event.tokens);
    append(all.logprobs, event.logprobs);
    append(all.top_tokens, event.top_tokens);
    append(all.top_logprobs, event.top_logprobs);
    return true;
  }
  void OnFinish(const FinishEvent& event) override {
    std::lock_guard lock(mutex_);
    outputs_[event.output_index].finish = event;
    if (--left_ == 0) done_.notify_all();
  }
  std::vector<Output> Wait() {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
    return outputs_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  std::vector<Output> outputs_;
  int left_;
};

// One configuration of engine and scheduler.
class Harness {
 public:
  Harness(const EngineOptions& engine_options, const SchedulerOptions& scheduler_options)
      : Harness(CreateInProcessEngine(engine_options, Clock::Real(), nullptr), scheduler_options) {}
  Harness(absl::StatusOr<std::unique_ptr<Engine>> engine, SchedulerOptions scheduler_options) {
    if (!engine.ok()) {
      ADD_FAILURE() << engine.status().ToString();
      return;
    }
    engine_ = *std::move(engine);
    scheduler_options.max_tokens_per_step = engine_->Info().limits.max_tokens;
    scheduler_options.max_sequences = engine_->Info().limits.max_sequences;
    scheduler_options.check_integrity_when_idle = true;
    auto loop = StepLoop::Create(scheduler_options, *engine_, Clock::Real());
    if (!loop.ok()) {
      ADD_FAILURE() << loop.status().ToString();
      return;
    }
    loop_ = *std::move(loop);
  }

  bool ok() const { return loop_ != nullptr; }
  StepLoop& loop() { return *loop_; }

  // Adds all at once and waits for all; [request][output].
  std::vector<std::vector<Output>> Run(const std::vector<Request>& requests) {
    std::vector<std::shared_ptr<OutputSink>> sinks;
    for (Request request : requests) {
      sinks.push_back(std::make_shared<OutputSink>(request.num_outputs));
      request.sink = sinks.back();
      const absl::Status added = loop_->Add(std::move(request));
      if (!added.ok()) {
        ADD_FAILURE() << added.ToString();
        return {};
      }
    }
    std::vector<std::vector<Output>> outputs;
    for (auto& sink : sinks) outputs.push_back(sink->Wait());
    return outputs;
  }

 private:
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<StepLoop> loop_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_PARITY_ENGINE_HARNESS_H_
