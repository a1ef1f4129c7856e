// Log-probabilities of prompts: how the rows are dealt out over steps, what of the prefix cache may be used, and that
// each token's comes once, through preemption, lost ranks and cancelled outputs.
#include <algorithm>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

std::vector<int32_t> Prompt(int32_t length, int32_t first = 1) {
  std::vector<int32_t> prompt(length);
  for (int32_t i = 0; i < length; ++i) prompt[i] = (first + 5 * i) % 97;
  return prompt;
}

Request Scored(const std::string& id, std::vector<int32_t> prompt, int32_t max_tokens, int32_t top = 2) {
  Request request = MakeRequest(id, std::move(prompt), max_tokens);
  request.sampling.num_prompt_logprobs = top;
  request.sampling.seed = 11;
  return request;
}

// At most `rows` sequences and logit rows a step.
SimulatedOptions Simulated(int32_t num_blocks, int32_t rows = 64) {
  SimulatedOptions options;
  options.limits = TestLimits(num_blocks, 4);
  options.limits.max_sequences = rows;
  return options;
}

// What the plans asked for, over all homes.
struct Watched {
  explicit Watched(Driver& driver, int32_t max_rows) {
    driver.observer = [this, max_rows](const StepPlan& plan) {
      for (const HomePlan& home : plan.homes) {
        EXPECT_LE(home.num_logit_rows(), max_rows);
        EXPECT_TRUE(home.num_targets() == 0 || home.num_targets() == home.num_logit_rows());
        scored += std::ranges::count_if(home.targets(), [](int32_t target) { return target >= 0; });
        tokens += home.num_tokens();
        rows.push_back(home.num_logit_rows());
      }
    };
  }
  int64_t scored = 0, tokens = 0;
  std::vector<int32_t> rows;  // of each plan
};

TEST(PromptLogprobs, ChunksFitTheLogitRows) {
  Driver driver({.max_tokens_per_step = 256}, Simulated(256));
  Watched plans(driver, 64);
  ASSERT_TRUE(driver.Add(Scored("a", Prompt(200), 3)).ok());
  driver.RunToEnd(100);
  driver.ExpectReference();
  EXPECT_EQ(plans.rows, std::vector<int32_t>({64, 64, 64, 8, 1, 1}));
  EXPECT_EQ(plans.scored, 199);
  EXPECT_EQ(plans.tokens, 202);
}

// Those that run have their rows first; chunks that need none are as large as ever.
TEST(PromptLogprobs, OthersRunBesideIt) {
  Driver driver({.max_tokens_per_step = 256}, Simulated(256, /*rows=*/64));
  Watched plans(driver, 64);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(driver.Add(MakeRequest("d" + std::to_string(i), Prompt(3, i), 12)).ok());
  driver.Turn();
  ASSERT_TRUE(driver.Add(Scored("scored", Prompt(150), 2)).ok());
  ASSERT_TRUE(driver.Add(MakeRequest("long", Prompt(300, 50), 2)).ok());
  driver.RunToEnd(100);
  driver.ExpectReference();
  // Four decodes and 60 rows of the prompt; then the same, with 192 tokens of the other prompt in each.
  EXPECT_EQ(std::vector<int32_t>(plans.rows.begin(), plans.rows.begin() + 3), std::vector<int32_t>({4, 64, 64}));
  for (int i = 0; i < 4; ++i) {
    const auto steps = driver.sink("d" + std::to_string(i)).outputs()[0].steps;
    EXPECT_EQ(steps.back() - steps.front(), 11) << "a decode waited";
  }
  // 300 tokens in two steps; only its sampling row came after the scored ones.
  EXPECT_LE(driver.sink("long").outputs()[0].steps.front(), driver.sink("scored").outputs()[0].steps.front() + 1);
}

// As many sequences as logit rows: the prompt still gets on, a row a step at least.
TEST(PromptLogprobs, NeverStarves) {
  SimulatedOptions simulated = Simulated(256, /*rows=*/3);
  simulated.limits.max_tokens = 3;
  Driver driver({.max_tokens_per_step = 3}, simulated);
  Watched plans(driver, 3);
  for (const char* id : {"d1", "d2"}) ASSERT_TRUE(driver.Add(MakeRequest(id, {1, 2}, 100)).ok());
  for (int i = 0; i < 6; ++i) driver.Turn();
  ASSERT_TRUE(driver.Add(Scored("scored", Prompt(20), 5)).ok());
  driver.RunToEnd(300);
  driver.ExpectReference();
  EXPECT_EQ(plans.scored, 19);
}

TEST(PromptLogprobs, ComputesWhatTheCacheHasAndPublishesIt) {
  Driver driver({}, Simulated(256));
  Watched plans(driver, 64);
  const std::vector<int32_t> prompt = Prompt(42);
  const auto run = [&](Request request) {
    request.cache_salt = "x";
    EXPECT_TRUE(driver.Add(request).ok());
    driver.RunToEnd(100);
    return driver.sink(request.id).outputs()[0].finish.cached_prompt_tokens;
  };
  EXPECT_EQ(run(Scored("first", prompt, 2)), 0);
  EXPECT_EQ(run(MakeRequest("uses what it published", prompt, 2)), 40);
  EXPECT_EQ(run(Scored("again", prompt, 2)), 0);
  EXPECT_EQ(plans.scored, 2 * 41);
  // The outputs behind the first share its blocks, and nobody scores twice.
  Request many = Scored("many", prompt, 6);
  many.num_outputs = 3;
  plans.tokens = 0;
  run(many);
  EXPECT_EQ(plans.scored, 3 * 41);
  EXPECT_EQ(plans.tokens, 42 + 2 * 2 + 3 * 5);
  driver.ExpectReference();
  const LoadSnapshot load = driver.scheduler().Load();
  EXPECT_EQ(load.prefix_cache_queries, 3 * 42);  // the plain request, and two outputs
  EXPECT_EQ(load.prefix_cache_hits, 3 * 40);
}

TEST(PromptLogprobs, ScoreOnly) {
  Driver driver({}, Simulated(256));
  Watched plans(driver, 64);
  Request many = Scored("many", Prompt(70), 0, /*top=*/0);
  many.num_outputs = 3;
  ASSERT_TRUE(driver.Add(Scored("one", Prompt(33), 0)).ok());
  ASSERT_TRUE(driver.Add(many).ok());
  ASSERT_TRUE(driver.Add(Scored("nothing to do", {5}, 0)).ok());
  ASSERT_TRUE(driver.Add(Scored("one token", {5}, 2)).ok());
  Request whole = Scored("the whole context", Prompt(512), 0);
  ASSERT_TRUE(driver.Add(whole).ok());
  driver.RunToEnd(100);
  driver.ExpectReference();
  EXPECT_EQ(driver.sink("many").num_finished(), 3);
  // The last row of a prompt predicts nothing that is asked for: it is not computed.
  EXPECT_EQ(plans.scored, 32 + 69 + 511);
  EXPECT_EQ(plans.tokens, 32 + 69 + 511 + 2);
  EXPECT_EQ(driver.sink("one").outputs()[0].finish.times.first_token_ns, 0);

  EXPECT_EQ(driver.Add(MakeRequest("refused", {1, 2}, 0)).message(),
            "max_tokens is 0, allowed: 1 or more (0 with num_prompt_logprobs)");
  EXPECT_EQ(driver.Add(Scored("refused", {1, 2}, -1)).message(), "max_tokens is -1, allowed: 0 or more");
  EXPECT_EQ(driver.Add(Scored("refused", {1, 2}, 1, 21)).message(),
            "num_prompt_logprobs is 21, allowed: -1 (none) to 20");
}

// Computed again after a preemption is what was scored before it, but without logits.
TEST(PromptLogprobs, PreemptedPromptsAreScoredOnce) {
  for (const bool prefix_cache : {false, true}) {
    for (int every = 1; every <= 4; ++every) {
      SchedulerOptions options = {.max_tokens_per_step = 8, .prefix_cache = prefix_cache};
      options.force_preempt_every = every;
      Driver driver(options, Simulated(256));
      Watched plans(driver, 64);
      ASSERT_TRUE(driver.Add(Scored("a", Prompt(50), 5)).ok());
      ASSERT_TRUE(driver.Add(Scored("b", Prompt(60, 3), 0)).ok());
      driver.RunToEnd(1000);
      driver.ExpectReference();
      EXPECT_EQ(plans.scored, 49 + 59);
      EXPECT_GT(driver.scheduler().Load().preemptions, 0);
      if (!prefix_cache) {
        EXPECT_GT(plans.tokens, 50 + 4 + 59) << "nothing was computed again";
      }
    }
  }
}

// A rank is lost at every step in turn, with one or two plans in flight: what was committed is not scored again, what
// was lost is, and all comes once.
TEST(PromptLogprobs, LostRanks) {
  int64_t again = 0;
  for (const bool home_lost : {false, true}) {
    for (const bool awaiting : {false, true}) {
      for (int64_t step = 1; step <= 8; ++step) {
        SimulatedOptions simulated = Simulated(64);
        simulated.lose = [=, done = false](int64_t at, bool at_await) mutable -> std::optional<SimulatedLoss> {
          if (done || at != step || at_await != awaiting) return std::nullopt;
          done = true;
          return SimulatedLoss{.homes = home_lost ? std::vector<int>{0} : std::vector<int>{}};
        };
        Driver driver({.max_tokens_per_step = 8}, simulated);
        int64_t scored = 0, committed = -1;
        driver.observer = [&](const StepPlan& plan) {
          scored += std::ranges::count_if(plan.homes[0].targets(), [](int32_t target) { return target >= 0; });
        };
        driver.recovery_observer = [&](const Recovery&) {
          committed = driver.sink("a").scores().size() + driver.sink("b").scores().size();
          again += scored - committed;
          scored = 0;
        };
        Request many = Scored("a", Prompt(30), 3);
        many.num_outputs = 2;
        ASSERT_TRUE(driver.Add(many).ok());
        ASSERT_TRUE(driver.Add(Scored("b", Prompt(25, 9), 0)).ok());
        driver.RunToEnd(1000);
        driver.ExpectReference();
        ASSERT_GE(committed, 0) << "step " << step << " never came";
        EXPECT_EQ(scored, 29 + 24 - committed) << "step " << step;
      }
    }
  }
  EXPECT_GT(again, 0);
  std::printf("%lld rows were lost and scored again\n", static_cast<long long>(again));
}

// The next output goes on where a cancelled one has stopped, and rows in flight still count.
TEST(PromptLogprobs, ACancelledOutputLeavesTheRestToTheNext) {
  for (const int32_t max_tokens : {0, 4}) {
    for (int turns = 1; turns <= 8; ++turns) {
      Driver driver({.max_tokens_per_step = 8}, Simulated(64));
      Watched plans(driver, 64);
      Request request = Scored("a", Prompt(40), max_tokens);
      request.num_outputs = 3;
      ASSERT_TRUE(driver.Add(request).ok());
      for (int i = 0; i < turns; ++i) driver.Turn();
      driver.Cancel("a", 0);
      driver.RunToEnd(200);
      driver.ExpectReference();
      EXPECT_EQ(driver.sink("a").scores().size(), 39);
      EXPECT_EQ(plans.scored, 39);
    }
  }
}

}  // namespace
}  // namespace soloist
