#include "scheduler/scheduler.h"

#include <cstdio>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

std::vector<int32_t> Prompt(int32_t length, int32_t first = 1) {
  std::vector<int32_t> prompt(length);
  for (int32_t i = 0; i < length; ++i) prompt[i] = (first + i) % 97;
  return prompt;
}

SimulatedOptions Simulated(int homes, int32_t num_blocks, int32_t block_size) {
  SimulatedOptions options;
  options.num_homes = homes;
  options.limits = TestLimits(num_blocks, block_size);
  return options;
}

TEST(Scheduler, EveryHomeIsInEveryStep) {
  Driver driver({}, Simulated(16, 32, 4));
  int plans = 0;
  driver.observer = [&plans](const StepPlan& plan) {
    ++plans;
    ASSERT_EQ(plan.homes.size(), 16u);
    int32_t busiest = 0;
    for (const HomePlan& home : plan.homes) busiest = std::max(busiest, home.num_tokens());
    for (const HomePlan& home : plan.homes) ASSERT_EQ(home.max_home_tokens(), busiest);
    ASSERT_GT(busiest, 0);
  };
  ASSERT_TRUE(driver.Add(MakeRequest("a", Prompt(9), 5)).ok());
  driver.RunToEnd(20);
  EXPECT_EQ(driver.ExpectReference(), 5);
  EXPECT_EQ(plans, 5);  // the end by length is known: no row is wasted
  EXPECT_FALSE(driver.Turn());
  std::printf("5 tokens in 5 plans of 16 homes\n");
}

TEST(Scheduler, DecodesGoOnBesideChunks) {
  SchedulerOptions options;
  options.max_tokens_per_step = 8;
  Driver driver(options, Simulated(1, 64, 4));
  std::vector<int32_t> tokens;
  driver.observer = [&tokens](const StepPlan& plan) { tokens.push_back(plan.homes[0].num_tokens()); };
  ASSERT_TRUE(driver.Add(MakeRequest("a", Prompt(3), 12)).ok());
  driver.Turn();
  ASSERT_TRUE(driver.Add(MakeRequest("b", Prompt(30, 40), 2)).ok());
  driver.RunToEnd(40);
  driver.ExpectReference();
  // a's prompt; a's row + 7 of b's 30; ...; a's row + the last 2.
  const std::vector<int32_t> expected = {3, 8, 8, 8, 8, 3, 2, 1, 1, 1, 1, 1};
  EXPECT_EQ(tokens, expected);
  std::printf("tokens per step: budget 8 = 1 decode + 7 of the prompt\n");
}

TEST(Scheduler, StopTokenWastesOneRow) {
  const Request request = MakeRequest("a", Prompt(5), 30);
  const Reference free_run = ReferenceRun(request, 0, {}, 97);
  SchedulerOptions options;
  options.eos_token_ids = {free_run.tokens[6]};
  const size_t length = ReferenceRun(request, 0, options.eos_token_ids, 97).tokens.size();
  Driver driver(options, Simulated(1, 64, 4));
  ASSERT_TRUE(driver.Add(request).ok());
  driver.RunToEnd(60);
  driver.ExpectReference();
  EXPECT_EQ(driver.steps(), static_cast<int64_t>(length) + 1);
  EXPECT_EQ(driver.sink("a").outputs()[0].finish.reason, FinishReason::kStop);
  std::printf("stopped after %zu tokens, one speculative row discarded\n", length);
}

TEST(Scheduler, WholePromptCachedComputesOneBlock) {
  Driver driver({}, Simulated(1, 64, 4));
  ASSERT_TRUE(driver.Add(MakeRequest("a", Prompt(16), 3)).ok());
  driver.RunToEnd(20);
  std::vector<int32_t> tokens;
  driver.observer = [&tokens](const StepPlan& plan) { tokens.push_back(plan.homes[0].num_tokens()); };
  ASSERT_TRUE(driver.Add(MakeRequest("b", Prompt(16), 3)).ok());
  ASSERT_TRUE(driver.Add(MakeRequest("c", Prompt(17), 1)).ok());
  driver.RunToEnd(20);
  driver.ExpectReference();
  EXPECT_EQ(driver.sink("b").outputs()[0].finish.cached_prompt_tokens, 12);
  EXPECT_EQ(driver.sink("c").outputs()[0].finish.cached_prompt_tokens, 16);
  EXPECT_EQ(tokens[0], 4 + 1);
  std::printf("16 of 16 known: 12 reused, 4 computed; 16 of 17 known: 1 computed\n");
}

TEST(Scheduler, OutputsShareThePrompt) {
  Driver driver({}, Simulated(1, 64, 4));
  int64_t tokens = 0;
  int32_t most_used = 0;
  driver.observer = [&](const StepPlan& plan) {
    tokens += plan.homes[0].num_tokens();
    most_used = std::max(most_used, driver.scheduler().Load().homes[0].used_blocks);
  };
  Request request = MakeRequest("a", Prompt(41), 4);
  request.num_outputs = 8;
  ASSERT_TRUE(driver.Add(request).ok());
  driver.RunToEnd(40);
  EXPECT_EQ(driver.ExpectReference(), 32);
  EXPECT_EQ(tokens, 41 + 7 + 8 * 3);
  EXPECT_LE(most_used, 10 + 8);
  std::printf("n = 8 of a prompt of 41: computed %ld tokens in %d blocks\n", static_cast<long>(tokens), most_used);
}

TEST(Scheduler, PrioritiesAreStrictAndFifoWithin) {
  SchedulerOptions options;
  options.max_sequences = 1;
  Driver driver(options, Simulated(1, 64, 4));
  for (const auto& [id, priority] : {std::pair{"late", 1}, {"first", 0}, {"second", 0}, {"urgent", -1}}) {
    Request request = MakeRequest(id, Prompt(4), 3);
    request.priority = priority;
    ASSERT_TRUE(driver.Add(std::move(request)).ok());
  }
  driver.RunToEnd(60);
  driver.ExpectReference();
  const auto start = [&driver](const char* id) { return driver.sink(id).outputs()[0].steps[0]; };
  EXPECT_LT(start("urgent"), start("first"));
  EXPECT_LT(start("first"), start("second"));
  EXPECT_LT(start("second"), start("late"));
  // A more urgent one takes the place of one that runs.
  Request background = MakeRequest("background", Prompt(4), 30), now = MakeRequest("now", Prompt(4), 2);
  background.priority = 5;
  ASSERT_TRUE(driver.Add(background).ok());
  for (int i = 0; i < 6; ++i) driver.Turn();
  ASSERT_TRUE(driver.Add(now).ok());
  driver.RunToEnd(100);
  driver.ExpectReference();
  EXPECT_EQ(driver.sink("background").outputs()[0].finish.num_preemptions, 1);
  EXPECT_LT(driver.sink("now").outputs()[0].steps.back(), driver.sink("background").outputs()[0].steps.back());
  std::printf("order urgent, first, second, late; one preemption for an urgent arrival\n");
}

TEST(Scheduler, PreemptsLastArrivalOfLargestNumber) {
  Driver driver({}, Simulated(1, 8, 4));  // 32 tokens
  for (const auto& [id, priority] : {std::pair{"a", 0}, {"b", 0}, {"c", 1}}) {
    Request request = MakeRequest(id, Prompt(4, id[0]), 16);
    request.priority = priority;
    request.sampling.presence_penalty = 1;
    ASSERT_TRUE(driver.Add(std::move(request)).ok());
  }
  driver.RunToEnd(200);
  EXPECT_EQ(driver.ExpectReference(), 48);
  EXPECT_EQ(driver.sink("a").outputs()[0].finish.num_preemptions, 0);
  EXPECT_GT(driver.sink("c").outputs()[0].finish.num_preemptions, 0);
  EXPECT_LT(driver.sink("a").outputs()[0].steps.back(), driver.sink("c").outputs()[0].steps.back());
  std::printf("3 x 20 tokens in a cache of 32: the first never preempted, all tokens equal the reference\n");
}

TEST(Scheduler, HomeOfLongestPrefixThenFewestTokens) {
  Driver driver({}, Simulated(4, 64, 4));
  const auto homes_running = [&driver] {
    std::vector<int> count;
    for (const auto& home : driver.scheduler().Load().homes)
      count.push_back(home.running_sequences + home.waiting_sequences);
    return count;
  };
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(driver.Add(MakeRequest(std::to_string(i), Prompt(20, 20 * i), 8)).ok());
  EXPECT_EQ(homes_running(), (std::vector<int>{1, 1, 1, 1}));
  driver.RunToEnd(100);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(driver.Add(MakeRequest("again" + std::to_string(i), Prompt(24, 40), 8)).ok());
  EXPECT_EQ(homes_running(), (std::vector<int>{0, 0, 3, 0}));
  driver.RunToEnd(100);
  driver.ExpectReference();
  std::printf("4 different prompts on 4 homes; 3 with a known prefix on its home\n");
}

TEST(Scheduler, AnIdleHomeTakesWhatIsBlockedElsewhere) {
  SchedulerOptions options;
  options.max_sequences = 1;
  Driver driver(options, Simulated(2, 64, 4));
  for (const auto& [id, tokens] : {std::pair{"a", 40}, {"b", 60}, {"c", 5}}) {
    ASSERT_TRUE(driver.Add(MakeRequest(id, Prompt(4, id[0]), tokens)).ok());
  }
  for (int i = 0; i < 4; ++i) driver.Turn();
  EXPECT_EQ(driver.scheduler().Load().homes[0].waiting_sequences, 1);  // c behind a
  driver.Cancel("b", -1);
  driver.RunToEnd(100);
  driver.ExpectReference();
  EXPECT_LT(driver.sink("c").outputs()[0].steps.back(), driver.sink("a").outputs()[0].steps.back());
  std::printf("the queue behind a long request moves to the home that falls idle\n");
}

TEST(Scheduler, CancelFreesAtOnceAndEndsOnce) {
  Driver driver({}, Simulated(1, 64, 4));
  Request request = MakeRequest("a", Prompt(20), 50);
  request.num_outputs = 3;
  ASSERT_TRUE(driver.Add(request).ok());
  for (int i = 0; i < 8; ++i) driver.Turn();
  driver.Cancel("a", 1);
  driver.Cancel("a", 1);
  driver.Cancel("nobody", -1);
  EXPECT_EQ(driver.sink("a").num_finished(), 1);
  driver.Turn();
  driver.Cancel("a", -1);
  EXPECT_EQ(driver.sink("a").num_finished(), 3);
  EXPECT_EQ(driver.scheduler().Load().homes[0].used_blocks, 0);
  driver.RunToEnd(4);
  driver.ExpectReference();
  std::printf("one output, twice, then all: 3 ends, no block left\n");
}

TEST(Scheduler, RefusesWhatCannotRun) {
  const PlanLimits limits = TestLimits(8, 4);
  const auto check = [&limits](auto change, const char* expected) {
    Request request = MakeRequest("a", Prompt(4), 4);
    request.sink = std::make_shared<RecordingSink>(1);
    change(request);
    const absl::Status status = CheckRequest(request, limits);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << expected;
    EXPECT_NE(std::string(status.message()).find(expected), std::string::npos) << status;
  };
  check([](Request& r) { r.prompt.clear(); }, "empty");
  check([](Request& r) { r.prompt = Prompt(30); },
        "prompt of 30 tokens + max_tokens 4 = 34, more than a rank's KV cache of 32");
  check([](Request& r) { r.sampling.max_tokens = 600; }, "= 604, more than the context limit of 512");
  check([](Request& r) { r.sampling.max_tokens = 0; }, "max_tokens is 0");
  check([](Request& r) { r.prompt[2] = 97; }, "prompt[2] is 97, allowed: 0 to 96");
  check([](Request& r) { r.sampling.temperature = -1; }, "temperature is -1");
  check([](Request& r) { r.sampling.top_p = 0; }, "top_p is 0");
  check([](Request& r) { r.sampling.min_p = 2; }, "min_p is 2");
  check([](Request& r) { r.sampling.top_k = -1; }, "top_k is -1");
  check([](Request& r) { r.sampling.repetition_penalty = 0; }, "repetition_penalty is 0");
  check([](Request& r) { r.sampling.presence_penalty = 3; }, "presence_penalty is 3");
  check([](Request& r) { r.sampling.min_tokens = 5; }, "min_tokens is 5");
  check([](Request& r) { r.sampling.num_top_logprobs = 21; }, "num_top_logprobs is 21");
  check([](Request& r) { r.sampling.logit_bias = {{99, 1.0f}}; }, "logit_bias[0] is 99");
  check([](Request& r) { r.sampling.stop_token_ids = {-4}; }, "stop_token_ids[0] is -4");
  check([](Request& r) { r.num_outputs = 0; }, "n is 0");
  check([](Request& r) { r.sink = nullptr; }, "no sink");
  std::printf("17 kinds of request refused with value and limit\n");
}

TEST(Scheduler, WrongResultIsAnError) {
  SimulatedEngine engine(Simulated(1, 8, 4));
  Scheduler scheduler({}, engine.Info());
  Request request = MakeRequest("a", Prompt(4), 4);
  auto sink = std::make_shared<RecordingSink>(1);
  request.sink = sink;
  scheduler.Add(std::move(request), 1);
  ASSERT_TRUE(scheduler.Schedule(1).has_value());
  StepResult result;
  result.step = 2;
  EXPECT_EQ(scheduler.Commit(result, 1).code(), absl::StatusCode::kInternal);
  result.step = 1;
  result.homes.resize(1);
  EXPECT_EQ(scheduler.Commit(result, 1).code(), absl::StatusCode::kInternal);
  result.homes[0].tokens = {97};
  result.homes[0].logprobs = {0};
  EXPECT_EQ(scheduler.Commit(result, 1).code(), absl::StatusCode::kInternal);
  scheduler.FinishAll(FinishReason::kError, absl::UnavailableError("gone"), /*lost=*/true);
  for (const OutputEvent& event : scheduler.TakeEvents()) sink->OnFinish(std::get<FinishEvent>(event.what));
  EXPECT_EQ(sink->outputs()[0].num_finishes, 1);
  EXPECT_TRUE(sink->outputs()[0].finish.retryable);
  EXPECT_TRUE(scheduler.CheckIntegrity(/*idle=*/true).ok());
  std::printf("results of another step, shape or vocabulary are refused\n");
}

}  // namespace
}  // namespace soloist
