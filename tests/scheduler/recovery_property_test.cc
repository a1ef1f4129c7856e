// Random loads while random ranks are lost at random moments, against the unbatched reference.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

struct Totals {
  int64_t worlds = 0, requests = 0, tokens = 0, preemptions = 0, cancels = 0, hits = 0, losses = 0, requeued = 0;
  int64_t while_recovering = 0;                             // arrivals and cancellations
  int64_t homes_lost = 0, homes_kept = 0, whole = 0;        // whole: losses that kept every home
  int64_t absent = 0, back = 0;                             // homes that went without a rank, and that got one again
  int64_t in_flight[Engine::kMaxInFlight + 1] = {0, 0, 0};  // losses with so many plans submitted, the failing one too
};

// `blocks_low`..`blocks_high` per home decide how tight it is.
void RunWorld(uint64_t seed, int blocks_low, int blocks_high, Totals& totals) {
  std::mt19937_64 random(seed);
  const auto below = [&random](int n) { return static_cast<int32_t>(random() % static_cast<uint64_t>(n)); };
  const int32_t block_size = 1 << below(4);
  const int32_t num_blocks = (blocks_low + below(blocks_high - blocks_low + 1)) * 8 / block_size + 1;
  SimulatedOptions engine;
  engine.num_homes = 1 << below(4);
  engine.limits = TestLimits(num_blocks, block_size);
  std::mt19937_64 chance(seed + 7);
  const uint64_t one_in = 3 + random() % 40;
  const bool shrinks = random() % 2 == 0;  // lost homes may be absent for a while
  int64_t losses_left = 1 + below(12), losses = 0;
  engine.lose = [&](int64_t step, bool) -> std::optional<SimulatedLoss> {
    if (losses_left == 0 || chance() % one_in != 0) return std::nullopt;
    --losses_left;
    ++losses;
    SimulatedLoss loss;
    const uint64_t kind = chance() % 4;  // none, about a half, one, all
    for (int h = 0; h < engine.num_homes; ++h) {
      if (kind == 3 || (kind == 1 && chance() % 2 == 0)) loss.homes.push_back(h);
    }
    if (kind == 2) loss.homes.push_back(static_cast<int>(chance() % engine.num_homes));
    for (int h = 0; shrinks && h < engine.num_homes; ++h) {
      if (chance() % 3 == 0 && std::ssize(loss.absent) + 1 < engine.num_homes) loss.absent.push_back(h);
    }
    loss.late_recovers = static_cast<int>(chance() % 3);
    // The numbers go on, skip some, or begin again.
    const uint64_t numbers = chance() % 3;
    if (numbers == 1) loss.next_step = step + 1 + static_cast<int64_t>(chance() % 4);
    if (numbers == 2) loss.next_step = 1 + static_cast<int64_t>(chance() % 4);
    return loss;
  };
  SchedulerOptions options;
  options.max_tokens_per_step = 1 + below(40);
  options.max_sequences = 1 + below(16);
  options.prefix_cache = below(4) != 0;
  options.eos_token_ids = {3, 50};
  options.force_preempt_every = below(2) == 0 ? 1 + below(7) : 0;
  const int depth = below(4) == 0 ? 1 : 2;
  Driver driver(options, engine);
  std::vector<bool> usable(engine.num_homes, true);
  driver.recovery_observer = [&](const Recovery& recovery) {
    ++totals.in_flight[driver.scheduler().plans_in_flight()];
    const int64_t kept = std::ranges::count(recovery.home_kept, true);
    totals.homes_kept += kept;
    totals.homes_lost += engine.num_homes - kept;
    for (int h = 0; h < engine.num_homes; ++h) {
      totals.absent += usable[h] && !recovery.home_usable[h] ? 1 : 0;
      totals.back += !usable[h] && recovery.home_usable[h] ? 1 : 0;
    }
    usable = recovery.home_usable;
    totals.whole += kept == engine.num_homes ? 1 : 0;
  };

  const int32_t capacity = std::min(num_blocks * block_size, 80);
  const int num_requests = 10 + below(30);
  int64_t work = 0;
  std::vector<std::string> ids;
  while (static_cast<int>(ids.size()) < num_requests) {
    for (int burst = below(4); burst > 0; --burst) {
      Request request = RandomRequest(random, "r" + std::to_string(ids.size()), engine.limits, capacity);
      work += static_cast<int64_t>(request.num_outputs) *
              (static_cast<int64_t>(request.prompt.size()) + request.sampling.max_tokens);
      ids.push_back(request.id);
      ASSERT_TRUE(driver.Add(std::move(request)).ok());
      totals.while_recovering += driver.recovering() ? 1 : 0;
    }
    if (!ids.empty() && below(5) == 0) {
      driver.Cancel(ids[below(static_cast<int>(ids.size()))], below(2) == 0 ? -1 : below(3));
      ++totals.cancels;
      totals.while_recovering += driver.recovering() ? 1 : 0;
    }
    for (int turns = below(6); turns > 0; --turns) driver.Turn(depth);
    const absl::Status status = driver.scheduler().CheckIntegrity(false);
    ASSERT_TRUE(status.ok()) << status << " seed " << seed;
  }
  // Alone each token takes one step; a preempted one is computed again, at most once per token that it has gained. Each
  // loss may take all of that back.
  driver.RunToEnd((1 + losses + losses_left) * (100 + 60 * work), depth);
  totals.tokens += driver.ExpectReference();
  const LoadSnapshot load = driver.scheduler().Load();
  EXPECT_EQ(load.finished_requests, static_cast<int64_t>(ids.size()));
  EXPECT_EQ(load.running_requests, 0);
  EXPECT_EQ(load.waiting_requests, 0);
  EXPECT_EQ(load.steps, driver.steps());
  EXPECT_EQ(load.recoveries, losses);
  totals.worlds += 1;
  totals.requests += static_cast<int64_t>(ids.size());
  totals.preemptions += load.preemptions;
  totals.hits += load.prefix_cache_hits;
  totals.losses += losses;
  totals.requeued += load.requeued_sequences;
}

void RunWorlds(const char* name, int count, int blocks_low, int blocks_high) {
  Totals t;
  for (int i = 0; i < count; ++i) {
    SCOPED_TRACE("world " + std::to_string(i));
    RunWorld(5000 + i, blocks_low, blocks_high, t);
    if (testing::Test::HasFailure()) break;
  }
  std::printf(
      "%s: %ld worlds, %ld requests, %ld tokens equal the reference, %ld preemptions, %ld cancels, %ld cached prompt "
      "tokens; %ld losses (%ld with 1 plan in flight, %ld with 2; %ld kept all homes; %ld homes kept, %ld lost, %ld "
      "went absent, %ld came back), %ld sequences started again, %ld arrivals and cancellations meanwhile\n",
      name, t.worlds, t.requests, t.tokens, t.preemptions, t.cancels, t.hits, t.losses, t.in_flight[1], t.in_flight[2],
      t.whole, t.homes_kept, t.homes_lost, t.absent, t.back, t.requeued, t.while_recovering);
  for (const int64_t seen : {t.in_flight[1], t.in_flight[2], t.whole, t.homes_kept, t.homes_lost, t.absent, t.back,
                             t.requeued, t.while_recovering, t.preemptions, t.hits}) {
    EXPECT_GT(seen, 0);
  }
}

TEST(RecoveryProperty, TinyPools) { RunWorlds("tiny pools", 2000, 1, 12); }
TEST(RecoveryProperty, RoomyPools) { RunWorlds("roomy pools", 1000, 30, 200); }

}  // namespace
}  // namespace soloist
