#include "scheduler/step_loop.h"

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/scheduler/step_loop_testing.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

// Lets the engine finish steps one by one.
class Gate {
 public:
  void Wait(int64_t step) {
    std::unique_lock lock(mutex_);
    reached_ = step;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_ >= step; });
  }
  void Open(int64_t step) {
    const std::lock_guard lock(mutex_);
    open_ = step;
    changed_.notify_all();
  }
  void AwaitReached(int64_t step) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return reached_ >= step; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t open_ = 0, reached_ = 0;
};

TEST(StepLoop, ManyThreads) {
  for (const int homes : {1, 4, 16}) {
    SimulatedEngine engine(Simulated(homes));
    SchedulerOptions options = Checked();
    options.max_tokens_per_step = 24;
    options.force_preempt_every = 5;
    auto loop = StepLoop::Create(options, engine, Clock::Real());
    ASSERT_TRUE(loop.ok());
    constexpr int kThreads = 6, kEach = 60;
    std::vector<std::vector<Asked>> asked(kThreads);
    std::atomic<bool> done = false;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937_64 random(t);
        for (int i = 0; i < kEach; ++i) {
          const std::string id = std::to_string(t) + "-" + std::to_string(i);
          asked[t].push_back(Ask(RandomRequest(random, id, engine.Info().limits, 60), random() % 8 == 0 ? 3 : -1));
          ASSERT_TRUE((*loop)->Add(asked[t].back().request).ok());
          if (random() % 4 == 0) (*loop)->Cancel(id, random() % 2 == 0 ? -1 : 0, FinishReason::kCancelled);
          if (random() % 4 == 0) (*loop)->Cancel("0-" + std::to_string(random() % kEach), -1, FinishReason::kStop);
        }
      });
    }
    std::thread watcher([&] {
      int64_t steps = 0;
      while (!done) {
        const LoadSnapshot load = (*loop)->Load();
        ASSERT_GE(load.steps, steps);
        steps = load.steps;
        for (const auto& home : load.homes) ASSERT_LE(home.used_blocks + home.cached_blocks, home.total_blocks);
        ASSERT_TRUE((*loop)->health().ok());
      }
    });
    for (std::thread& thread : threads) thread.join();
    const absl::Status idle = (*loop)->AwaitIdle(absl::Seconds(120));
    EXPECT_TRUE(idle.ok()) << idle;
    done = true;
    watcher.join();
    const LoadSnapshot load = (*loop)->Load();
    int64_t whole = 0, part = 0;
    for (const auto& list : asked) {
      for (const Asked& one : list) {
        const auto outputs = one.sink->outputs();
        for (int i = 0; i < one.request.num_outputs; ++i) {
          const Reference reference = ReferenceRun(one.request, i, options.eos_token_ids, 97);
          ASSERT_EQ(outputs[i].num_finishes, 1);
          ASSERT_FALSE(outputs[i].after_finish);
          const std::vector<int32_t>& tokens = outputs[i].tokens;
          ASSERT_LE(tokens.size(), reference.tokens.size());
          ASSERT_TRUE(std::equal(tokens.begin(), tokens.end(), reference.tokens.begin()));
          ++(tokens.size() == reference.tokens.size() ? whole : part);
        }
      }
    }
    EXPECT_EQ(load.finished_requests, kThreads * kEach);
    EXPECT_EQ(load.running_requests + load.waiting_requests, 0);
    for (const auto& home : load.homes) EXPECT_EQ(home.used_blocks, 0);
    std::printf("%d homes: %ld outputs whole, %ld cut short, %ld steps, %ld preemptions\n", homes, whole, part,
                load.steps, load.preemptions);
  }
}

TEST(StepLoop, CancelTakesTwoSteps) {
  Gate gate;
  SimulatedOptions simulated = Simulated(1);
  simulated.delay = [&gate](int64_t step, int64_t) { gate.Wait(step); };
  SimulatedEngine engine(simulated);
  auto loop = StepLoop::Create(Checked(), engine, Clock::Real());
  ASSERT_TRUE(loop.ok());
  Request request = MakeRequest("a", {1, 2, 3}, 50);
  request.sampling.ignore_eos = true;
  const Asked a = Ask(request);
  ASSERT_TRUE((*loop)->Add(a.request).ok());
  gate.Open(4);
  gate.AwaitReached(5);  // step 5 is in work, 6 may be submitted
  (*loop)->Cancel("a", -1, FinishReason::kStop);
  gate.Open(6);
  ASSERT_TRUE((*loop)->AwaitIdle(absl::Seconds(60)).ok());
  const auto output = a.sink->outputs()[0];
  EXPECT_EQ(output.finish.reason, FinishReason::kStop);
  EXPECT_LE(output.tokens.size(), 6u);
  EXPECT_EQ((*loop)->Load().homes[0].used_blocks, 0);
  std::printf("cancelled in step 5, %zu tokens delivered, no step after 6 was needed\n", output.tokens.size());
}

TEST(StepLoop, QueueLimitDuplicatesAndDrain) {
  Gate gate;
  SimulatedOptions simulated = Simulated(1);
  simulated.delay = [&gate](int64_t step, int64_t) { gate.Wait(step); };
  SimulatedEngine engine(simulated);
  SchedulerOptions options = Checked();
  options.max_sequences = 1;
  options.max_queue = 2;
  auto loop = StepLoop::Create(options, engine, Clock::Real());
  ASSERT_TRUE(loop.ok());
  std::vector<Asked> asked;
  const auto add = [&](const std::string& id) {
    asked.push_back(Ask(MakeRequest(id, {1, 2, 3}, 4)));
    return (*loop)->Add(asked.back().request);
  };
  ASSERT_TRUE(add("a").ok());
  gate.AwaitReached(1);
  gate.Open(1);
  gate.AwaitReached(2);  // the load after step 1 is published: a runs
  ASSERT_TRUE(add("b").ok());
  EXPECT_EQ(add("b").code(), absl::StatusCode::kAlreadyExists);
  ASSERT_TRUE(add("c").ok());
  const absl::Status full = add("d");
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ((*loop)->AwaitIdle(absl::Milliseconds(1)).code(), absl::StatusCode::kDeadlineExceeded);
  (*loop)->Drain();
  EXPECT_TRUE((*loop)->draining());
  EXPECT_EQ(add("e").code(), absl::StatusCode::kUnavailable);
  gate.Open(1000);
  ASSERT_TRUE((*loop)->AwaitIdle(absl::Seconds(60)).ok());
  int finished = 0;
  for (const Asked& one : asked) finished += one.sink->num_finished();
  EXPECT_EQ(finished, 3);
  std::printf("%s; drain let 3 finish\n", std::string(full.message()).c_str());
}

// Sends the next request under the same id as soon as the last one says that it has ended.
class Resender final : public TokenSink {
 public:
  Resender(StepLoop*& loop, int times) : loop_(loop), left_(times) {}
  bool OnToken(TokenEvent) override { return true; }
  void OnFinish(const FinishEvent&) override {
    if (left_-- > 0) Send();
  }
  void Send() {
    Request request = MakeRequest("again", {1, 2, 3}, 2);
    request.num_outputs = 1;
    request.sink = std::shared_ptr<TokenSink>(this, [](TokenSink*) {});
    status_.Update(loop_->Add(std::move(request)));
  }
  absl::Status status() const { return status_; }
  int left() const { return left_; }

 private:
  StepLoop*& loop_;
  int left_;
  absl::Status status_;
};

TEST(StepLoop, AnIdIsFreeWhenItsRequestEnds) {
  SimulatedEngine engine(Simulated(2));
  StepLoop* loop_pointer = nullptr;
  Resender resender(loop_pointer, 20);
  auto loop = StepLoop::Create(Checked(), engine, Clock::Real());
  ASSERT_TRUE(loop.ok());
  loop_pointer = loop->get();
  resender.Send();
  ASSERT_TRUE((*loop)->AwaitIdle(absl::Seconds(60)).ok());
  EXPECT_TRUE(resender.status().ok()) << resender.status();
  EXPECT_EQ(resender.left(), -1);
}

TEST(StepLoop, EngineFailureEndsAll) {
  SimulatedOptions simulated = Simulated(2);
  simulated.fail_at_step = 7;
  SimulatedEngine engine(simulated);
  SchedulerOptions options = Checked();
  options.max_sequences = 2;
  auto loop = StepLoop::Create(options, engine, Clock::Real());
  ASSERT_TRUE(loop.ok());
  std::vector<Asked> asked;
  int accepted = 0, refused = 0;
  for (int i = 0; i < 40; ++i) {
    Request request = MakeRequest(std::to_string(i), {1, 2, 3}, 20);
    request.sampling.ignore_eos = true;
    const Asked one = Ask(request);
    const absl::Status status = (*loop)->Add(one.request);
    if (!status.ok()) {
      EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
      ++refused;
      continue;
    }
    ++accepted;
    asked.push_back(one);
  }
  ASSERT_TRUE((*loop)->AwaitIdle(absl::Seconds(60)).ok());
  for (const Asked& one : asked) {
    const auto output = one.sink->outputs()[0];
    EXPECT_EQ(output.num_finishes, 1);
    EXPECT_EQ(output.finish.reason, FinishReason::kError);
    EXPECT_TRUE(output.finish.retryable);
    EXPECT_EQ(output.finish.error.code(), absl::StatusCode::kUnavailable);
  }
  EXPECT_FALSE((*loop)->health().ok());
  EXPECT_EQ((*loop)->Add(Ask(MakeRequest("late", {1}, 1)).request).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ((*loop)->Load().homes[0].used_blocks, 0);
  std::printf("%d requests ended with a retryable error, %d refused\n", accepted, refused);
}

TEST(StepLoop, DestructionUnderLoadEndsAll) {
  int64_t cancelled = 0, finished = 0;
  SimulatedEngine engine(Simulated(4));  // outlives the loops, which go on where the last one ended
  for (int round = 0; round < 30; ++round) {
    std::vector<Asked> asked;
    std::mt19937_64 random(round);
    {
      auto loop = StepLoop::Create(Checked(), engine, Clock::Real());
      ASSERT_TRUE(loop.ok());
      for (int i = 0; i < 20; ++i) {
        asked.push_back(Ask(RandomRequest(random, std::to_string(i), engine.Info().limits, 60)));
        ASSERT_TRUE((*loop)->Add(asked.back().request).ok());
      }
    }
    for (const Asked& one : asked) {
      for (const auto& output : one.sink->outputs()) {
        ASSERT_EQ(output.num_finishes, 1);
        ASSERT_FALSE(output.after_finish);
        ASSERT_NE(output.finish.reason, FinishReason::kError) << output.finish.error;
        ++(output.finish.reason == FinishReason::kCancelled ? cancelled : finished);
      }
      EXPECT_EQ(one.sink.use_count(), 2);  // ours and one.request's
    }
  }
  std::printf("30 loops destroyed under load on one engine: %ld outputs cancelled, %ld finished before\n", cancelled,
              finished);
}

TEST(StepLoop, RefusesUselessOptions) {
  SimulatedEngine engine(Simulated(1));
  SchedulerOptions options;
  options.max_queue = 0;
  EXPECT_EQ(StepLoop::Create(options, engine, Clock::Real()).status().code(), absl::StatusCode::kInvalidArgument);
  auto loop = StepLoop::Create({}, engine, Clock::Real());
  ASSERT_TRUE(loop.ok());
  EXPECT_EQ((*loop)->Add(Ask(MakeRequest("a", {}, 1)).request).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE((*loop)->AwaitIdle(absl::InfiniteDuration()).ok());
  std::printf("a queue of 0 and an empty prompt are refused\n");
}

}  // namespace
}  // namespace soloist
