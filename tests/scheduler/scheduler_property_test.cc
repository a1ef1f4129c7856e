// Random loads against the unbatched reference: the same tokens, every block back, nobody starves.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

struct Totals {
  int64_t worlds = 0, requests = 0, tokens = 0, steps = 0, preemptions = 0, cancels = 0, hits = 0,
          mixed = 0;  // plans of one home with decodes and chunks
};

// `blocks_low`..`blocks_high` per home decide how tight it is.
void RunWorld(uint64_t seed, int blocks_low, int blocks_high, Totals& totals) {
  std::mt19937_64 random(seed);
  const auto below = [&random](int n) { return static_cast<int32_t>(random() % static_cast<uint64_t>(n)); };
  const int32_t block_size = 1 << below(4);
  const int32_t num_blocks = (blocks_low + below(blocks_high - blocks_low + 1)) * 8 / block_size + 1;
  SimulatedOptions engine;
  engine.num_homes = 1 << below(5);
  engine.limits = TestLimits(num_blocks, block_size);
  SchedulerOptions options;
  options.max_tokens_per_step = 1 + below(40);
  options.max_sequences = 1 + below(16);
  options.prefix_cache = below(3) != 0;
  options.eos_token_ids = {3, 50};
  options.force_preempt_every = below(2) == 0 ? 1 + below(7) : 0;
  const int depth = below(4) == 0 ? 1 : 2;
  Driver driver(options, engine);
  driver.observer = [&totals](const StepPlan& plan) {
    for (const HomePlan& home : plan.homes) {
      int decodes = 0;
      while (decodes < home.num_sequences() && home.query_starts()[decodes + 1] == decodes + 1) ++decodes;
      for (int s = decodes; s < home.num_sequences(); ++s) {
        ASSERT_GT(home.query_starts()[s + 1] - home.query_starts()[s], 1) << "sequences of one row come first";
      }
      if (decodes > 0 && decodes < home.num_sequences()) ++totals.mixed;
    }
  };

  const int32_t capacity = std::min(num_blocks * block_size, 80);
  const int num_requests = 10 + below(40);
  int64_t work = 0;
  std::vector<std::string> ids;
  while (static_cast<int>(ids.size()) < num_requests) {
    for (int burst = below(4); burst > 0; --burst) {
      Request request = RandomRequest(random, "r" + std::to_string(ids.size()), engine.limits, capacity);
      work += static_cast<int64_t>(request.num_outputs) *
              (static_cast<int64_t>(request.prompt.size()) + request.sampling.max_tokens);
      ids.push_back(request.id);
      ASSERT_TRUE(driver.Add(std::move(request)).ok());
    }
    if (!ids.empty() && below(6) == 0) {
      driver.Cancel(ids[below(static_cast<int>(ids.size()))], below(2) == 0 ? -1 : below(3));
      ++totals.cancels;
    }
    for (int turns = below(6); turns > 0; --turns) driver.Turn(depth);
    const absl::Status status = driver.scheduler().CheckIntegrity(false);
    ASSERT_TRUE(status.ok()) << status << " seed " << seed;
  }
  // Alone each token takes one step. A preempted one is computed again, at most once per token that it has gained.
  driver.RunToEnd(100 + 60 * work, depth);
  totals.tokens += driver.ExpectReference();
  const LoadSnapshot load = driver.scheduler().Load();
  EXPECT_EQ(load.finished_requests, static_cast<int64_t>(ids.size()));
  EXPECT_EQ(load.running_requests, 0);
  EXPECT_EQ(load.waiting_requests, 0);
  EXPECT_EQ(load.steps, driver.steps());
  totals.worlds += 1;
  totals.requests += static_cast<int64_t>(ids.size());
  totals.steps += load.steps;
  totals.preemptions += load.preemptions;
  totals.hits += load.prefix_cache_hits;
}

void RunWorlds(const char* name, int count, int blocks_low, int blocks_high) {
  Totals t;
  for (int i = 0; i < count; ++i) {
    SCOPED_TRACE("world " + std::to_string(i));
    RunWorld(1000 + i, blocks_low, blocks_high, t);
    if (testing::Test::HasFailure()) break;
  }
  std::printf(
      "%s: %ld worlds, %ld requests, %ld tokens equal the reference, %ld steps, %ld preemptions, %ld cancels, "
      "%ld prompt tokens from the prefix cache\n",
      name, t.worlds, t.requests, t.tokens, t.steps, t.preemptions, t.cancels, t.hits);
  EXPECT_GT(t.mixed, 0);
  EXPECT_GT(t.preemptions, 0);
  EXPECT_GT(t.hits, 0);
}

TEST(SchedulerProperty, TinyPools) { RunWorlds("tiny pools", 600, 1, 12); }
TEST(SchedulerProperty, RoomyPools) { RunWorlds("roomy pools", 300, 30, 200); }

TEST(SchedulerProperty, DecodesNeverWaitForPrefill) {
  int64_t gaps = 0;
  for (uint64_t seed = 0; seed < 30; ++seed) {
    std::mt19937_64 random(seed);
    SimulatedOptions engine;
    engine.num_homes = 1 + static_cast<int>(seed % 4);
    engine.limits = TestLimits(4096, 8);
    SchedulerOptions options;
    options.max_tokens_per_step = 12;
    options.max_sequences = 12;
    Driver driver(options, engine);
    std::vector<std::string> ids;
    for (int i = 0; i < 60; ++i) {
      ids.push_back("r" + std::to_string(i));
      Request request = RandomRequest(random, ids.back(), engine.limits, 200);
      request.priority = 0;
      ASSERT_TRUE(driver.Add(std::move(request)).ok());
      for (uint64_t turns = random() % 8; turns > 0; --turns) driver.Turn();
    }
    driver.RunToEnd(100000);
    driver.ExpectReference();
    ASSERT_EQ(driver.scheduler().Load().preemptions, 0);
    for (const std::string& id : ids) {
      for (const RecordingSink::Output& output : driver.sink(id).outputs()) {
        for (size_t t = 1; t < output.steps.size(); ++t, ++gaps) {
          ASSERT_EQ(output.steps[t], output.steps[t - 1] + 1) << id << " token " << t << " seed " << seed;
        }
      }
    }
  }
  std::printf("%ld gaps between tokens, each exactly one step, with prefill chunks in the same steps\n", gaps);
}

}  // namespace
}  // namespace soloist
