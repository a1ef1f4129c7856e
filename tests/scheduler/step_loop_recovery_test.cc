// The step loop while ranks are lost: no request ends for it, arrivals and cancellations go on.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "scheduler/step_loop.h"
#include "tests/scheduler/step_loop_testing.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

using State = EngineCondition::State;

Request Long(const std::string& id, int32_t max_tokens = 20) {
  Request request = MakeRequest(id, {1, 2, id[0] % 97, 4, 5}, max_tokens);
  request.sampling.ignore_eos = true;
  return request;
}

// A rank that comes back when it is told to.
class Absence {
 public:
  bool Wait(absl::Duration timeout) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [this] { return over_; });
  }
  void End() {
    const std::lock_guard lock(mutex_);
    over_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
};

template <typename Condition>
bool Within10s(const Condition& condition) {
  for (int i = 0; i < 10'000 && !condition(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return condition();
}

auto LoseOnce(int64_t step, bool awaiting, SimulatedLoss loss) {
  return [=, done = false](int64_t at, bool at_await) mutable -> std::optional<SimulatedLoss> {
    if (done || at != step || at_await != awaiting) return std::nullopt;
    done = true;
    return loss;
  };
}

void ExpectWhole(const Asked& asked, const std::vector<int32_t>& eos) {
  const auto outputs = asked.sink->outputs();
  for (int i = 0; i < asked.request.num_outputs; ++i) {
    const Reference reference = ReferenceRun(asked.request, i, eos, 97);
    EXPECT_EQ(outputs[i].num_finishes, 1) << asked.request.id;
    EXPECT_EQ(outputs[i].finish.reason, reference.reason) << asked.request.id;
    EXPECT_EQ(outputs[i].tokens, reference.tokens) << asked.request.id;
    EXPECT_FALSE(outputs[i].after_finish) << asked.request.id;
  }
}

TEST(StepLoopRecovery, ManyThreads) {
  for (const int homes : {1, 4, 16}) {
    SimulatedOptions simulated = Simulated(homes);
    simulated.lose = [homes, random = std::mt19937_64(homes)](int64_t step,
                                                              bool) mutable -> std::optional<SimulatedLoss> {
      if (random() % 25 != 0) return std::nullopt;
      SimulatedLoss loss{.late_recovers = static_cast<int>(random() % 4)};
      if (random() % 2 == 0) loss.next_step = step + 3;
      if (random() % 3 != 0) loss.homes.push_back(static_cast<int>(random() % homes));
      return loss;
    };
    // Long enough for others to come in between.
    simulated.whole = [](absl::Duration) {
      std::this_thread::sleep_for(std::chrono::microseconds(300));
      return true;
    };
    SimulatedEngine engine(simulated);
    SchedulerOptions options = Checked();
    options.max_tokens_per_step = 24;
    options.force_preempt_every = 5;
    auto loop = StepLoop::Create(options, engine, Clock::Real());
    ASSERT_TRUE(loop.ok());
    constexpr int kThreads = 4, kEach = 60;
    std::vector<std::vector<Asked>> asked(kThreads);
    std::atomic<bool> done = false;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937_64 random(100 + t);
        for (int i = 0; i < kEach; ++i) {
          const std::string id = std::to_string(t) + "-" + std::to_string(i);
          asked[t].push_back(Ask(RandomRequest(random, id, engine.Info().limits, 60)));
          ASSERT_TRUE((*loop)->Add(asked[t].back().request).ok());
          if (i % 6 == 0) (*loop)->Cancel(id, random() % 2 == 0 ? -1 : 0, FinishReason::kCancelled);
        }
      });
    }
    int64_t seen_recovering = 0;
    std::thread watcher([&] {
      while (!done) {
        ASSERT_TRUE((*loop)->health().ok());
        const EngineCondition condition = (*loop)->condition();
        ASSERT_NE(condition.state, State::kFailed);
        ASSERT_EQ(condition.message.empty(), condition.state == State::kRunning);
        seen_recovering += condition.state == State::kRecovering ? 1 : 0;
        for (const auto& home : (*loop)->Load().homes)
          ASSERT_LE(home.used_blocks + home.cached_blocks, home.total_blocks);
      }
    });
    for (std::thread& thread : threads) thread.join();
    const absl::Status idle = (*loop)->AwaitIdle(absl::Seconds(120));
    EXPECT_TRUE(idle.ok()) << idle;
    done = true;
    watcher.join();
    int64_t tokens = 0;
    for (int t = 0; t < kThreads; ++t) {
      for (int i = 0; i < kEach; ++i) {
        const Asked& one = asked[t][i];
        if (i % 6 != 0) ExpectWhole(one, options.eos_token_ids);
        for (const auto& output : one.sink->outputs()) {
          EXPECT_EQ(output.num_finishes, 1);
          EXPECT_NE(output.finish.reason, FinishReason::kError) << output.finish.error;
          tokens += static_cast<int64_t>(output.tokens.size());
        }
      }
    }
    const LoadSnapshot load = (*loop)->Load();
    EXPECT_EQ(load.finished_requests, kThreads * kEach);
    EXPECT_EQ(load.running_requests + load.waiting_requests, 0);
    EXPECT_GT(load.recoveries, 3);
    for (const auto& home : load.homes) EXPECT_EQ(home.used_blocks, 0);
    std::printf("%d homes: %ld tokens, %ld steps, %ld losses, %ld sequences started again, seen recovering %ld times\n",
                homes, tokens, load.steps, load.recoveries, load.requeued_sequences, seen_recovering);
  }
}

TEST(StepLoopRecovery, ArrivalsAndCancellationsGoOnMeanwhile) {
  for (const bool awaiting : {false, true}) {
    Absence absence;
    SimulatedOptions simulated = Simulated(2);
    simulated.lose = LoseOnce(4, awaiting, {.homes = {1}, .late_recovers = 2});
    simulated.whole = [&absence](absl::Duration timeout) { return absence.Wait(timeout); };
    SimulatedEngine engine(simulated);
    SchedulerOptions options = Checked();
    options.max_queue = 3;
    auto loop = StepLoop::Create(options, engine, Clock::Real());
    ASSERT_TRUE(loop.ok());
    EXPECT_EQ((*loop)->condition().state, State::kRunning);
    const auto recovering = [&] { return (*loop)->condition().state == State::kRecovering; };
    Asked a = Ask(Long("a")), b = Ask(Long("b"));
    ASSERT_TRUE((*loop)->Add(a.request).ok());
    ASSERT_TRUE((*loop)->Add(b.request).ok());
    ASSERT_TRUE(Within10s(recovering));
    const EngineCondition condition = (*loop)->condition();
    EXPECT_EQ(condition.message, "step 4: ranks 1 are lost");
    EXPECT_LE(condition.since_ns, Clock::Real().NowNs());
    EXPECT_TRUE((*loop)->health().ok());
    EXPECT_EQ(engine.Ranks()[0].state, RankState::kReady);
    EXPECT_EQ(engine.Ranks()[1].state, RankState::kLost);

    Asked c = Ask(Long("c")), d = Ask(Long("d")), e = Ask(Long("e")), f = Ask(Long("f"));
    for (Asked* one : {&c, &d, &e}) EXPECT_TRUE((*loop)->Add(one->request).ok());
    EXPECT_EQ((*loop)->Add(f.request).code(), absl::StatusCode::kResourceExhausted);
    (*loop)->Cancel("a", -1, FinishReason::kCancelled);
    (*loop)->Cancel("c", -1, FinishReason::kCancelled);
    EXPECT_TRUE(Within10s([&] { return a.sink->num_finished() == 1 && c.sink->num_finished() == 1; }));
    EXPECT_TRUE((*loop)->Add(f.request).ok());  // in c's place
    EXPECT_EQ((*loop)->Load().waiting_requests, 3);
    EXPECT_EQ((*loop)->AwaitIdle(absl::Milliseconds(1)).code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_TRUE(recovering());
    EXPECT_EQ(b.sink->num_finished(), 0);

    absence.End();
    ASSERT_TRUE((*loop)->AwaitIdle(absl::Seconds(60)).ok());
    for (const Asked* one : {&b, &d, &e, &f}) ExpectWhole(*one, options.eos_token_ids);
    EXPECT_EQ(a.sink->outputs()[0].finish.reason, FinishReason::kCancelled);
    EXPECT_EQ((*loop)->condition().state, State::kRunning);
    EXPECT_GE((*loop)->condition().since_ns, condition.since_ns);
    EXPECT_EQ(engine.Ranks()[1].state, RankState::kReady);
    EXPECT_EQ((*loop)->Load().recoveries, 1);
    EXPECT_EQ((*loop)->Load().requeued_sequences, 1);
  }
  std::printf("while a rank was gone: 2 cancelled, 4 accepted, 1 refused for a full queue; then all end whole\n");
}

TEST(StepLoopRecovery, AnErrorOfRecoverEndsAll) {
  SimulatedOptions simulated = Simulated(2);
  simulated.lose = LoseOnce(4, true, {.homes = {0}, .never = absl::InternalError("no worker came back")});
  SimulatedEngine engine(simulated);
  auto loop = StepLoop::Create(Checked(), engine, Clock::Real());
  ASSERT_TRUE(loop.ok());
  const Asked a = Ask(Long("a"));
  ASSERT_TRUE((*loop)->Add(a.request).ok());
  ASSERT_TRUE((*loop)->AwaitIdle(absl::Seconds(60)).ok());
  const FinishEvent finish = a.sink->outputs()[0].finish;
  EXPECT_EQ(finish.reason, FinishReason::kError);
  EXPECT_TRUE(finish.retryable);
  EXPECT_EQ(finish.error.message(), "recovery after 'step 4: ranks 0 are lost': no worker came back");
  EXPECT_EQ((*loop)->health(), finish.error);
  EXPECT_EQ((*loop)->condition().state, State::kFailed);
  EXPECT_EQ((*loop)->Add(Ask(Long("b")).request).code(), absl::StatusCode::kUnavailable);
  std::printf("%s\n", finish.error.ToString().c_str());
}

TEST(StepLoopRecovery, DestructionMeanwhileEndsAll) {
  Absence absence;
  SimulatedOptions simulated = Simulated(2);
  simulated.lose = LoseOnce(4, true, {.homes = {0}});
  simulated.whole = [&absence](absl::Duration timeout) { return absence.Wait(timeout); };
  SimulatedEngine engine(simulated);
  const Asked a = Ask(Long("a")), b = Ask(Long("b"));
  {
    auto loop = StepLoop::Create(Checked(), engine, Clock::Real());
    ASSERT_TRUE(loop.ok());
    ASSERT_TRUE((*loop)->Add(a.request).ok());
    ASSERT_TRUE(Within10s([&] { return (*loop)->condition().state == State::kRecovering; }));
  }
  EXPECT_EQ(a.sink->outputs()[0].num_finishes, 1);
  EXPECT_EQ(a.sink->outputs()[0].finish.reason, FinishReason::kCancelled);
  // The next loop finds the loss, and recovers.
  absence.End();
  auto loop = StepLoop::Create(Checked(), engine, Clock::Real());
  ASSERT_TRUE(loop.ok());
  ASSERT_TRUE((*loop)->Add(b.request).ok());
  ASSERT_TRUE((*loop)->AwaitIdle(absl::Seconds(60)).ok());
  ExpectWhole(b, {3});
  EXPECT_EQ((*loop)->Load().recoveries, 1);
  std::printf("a loop ended while a rank was lost; the next one recovered it\n");
}

}  // namespace
}  // namespace soloist
