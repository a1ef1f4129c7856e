// Each way in which a plan that is lost could have left a trace, one by one; and one small load, lost at every moment.
#include <cstdio>
#include <memory>
#include <numeric>
#include <optional>
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

// Lost once, when `step` is awaited or submitted.
SimulatedOptions Losing(int homes, int32_t num_blocks, int64_t step, bool awaiting, SimulatedLoss loss = {}) {
  SimulatedOptions options;
  options.num_homes = homes;
  options.limits = TestLimits(num_blocks, 4);
  options.lose = [step, awaiting, loss, done = false](int64_t at,
                                                      bool at_await) mutable -> std::optional<SimulatedLoss> {
    if (done || at != step || at_await != awaiting) return std::nullopt;
    done = true;
    return loss;
  };
  return options;
}

// A driver that keeps the plans submitted since the last recovery.
struct Watched {
  Watched(const SchedulerOptions& options, const SimulatedOptions& engine) : driver(options, engine) {
    driver.observer = [this](const StepPlan& plan) { plans.push_back(plan); };
    driver.recovery_observer = [this](const Recovery&) {
      lost_plans = driver.scheduler().plans_in_flight();
      plans.clear();
    };
  }
  // Up to and with the recovery.
  void RunToRecovery(int depth = 2) {
    for (int turns = 0; driver.scheduler().Load().recoveries == 0; ++turns) {
      ASSERT_LT(turns, 200);
      driver.Turn(depth);
    }
    EXPECT_TRUE(driver.scheduler().CheckIntegrity(false).ok()) << driver.scheduler().CheckIntegrity(false);
    EXPECT_EQ(driver.scheduler().plans_in_flight(), 0);
  }
  void Finish(int depth = 2) {
    driver.RunToEnd(2000, depth);
    driver.ExpectReference();
  }
  const HomePlan& first(int home = 0) const { return plans.front().homes[home]; }

  Driver driver;
  std::vector<StepPlan> plans;
  int lost_plans = 0;
};

TEST(Recovery, LostRowsArePlannedAgainWithNoReferenceToThePreviousResult) {
  struct Case {
    int depth;
    bool awaiting;
    int lost_plans;
    int32_t committed;  // tokens, when step 5 is lost
  };
  for (const Case& c : {Case{1, false, 1, 4}, {1, true, 1, 4}, {2, false, 2, 3}, {2, true, 2, 4}}) {
    for (const int64_t next_step : {0, 9, 1}) {
      Watched w({}, Losing(1, 16, 5, c.awaiting, {.next_step = next_step}));
      Request request = MakeRequest("a", Prompt(6), 12);
      request.sampling.presence_penalty = 1;  // refers to the pending token, too
      request.sampling.min_tokens = 12;
      ASSERT_TRUE(w.driver.Add(request).ok());
      w.RunToRecovery(c.depth);
      EXPECT_EQ(w.lost_plans, c.lost_plans);
      const std::vector<int32_t> delivered = w.driver.sink("a").outputs()[0].tokens;
      ASSERT_EQ(static_cast<int32_t>(delivered.size()), c.committed);
      w.Finish(c.depth);
      EXPECT_EQ(w.plans.front().step, next_step > 0 ? next_step : 1 + c.committed);
      EXPECT_EQ(w.first().previous_rows(), 0);
      ASSERT_EQ(w.first().num_tokens(), 1);  // nothing that was committed is computed again
      EXPECT_EQ(w.first().token_ids()[0], delivered.back());
      EXPECT_EQ(w.first().positions()[0], 6 + c.committed - 1);
      EXPECT_EQ(w.first().sampling()[0].pending_row, -1);
      EXPECT_EQ(w.driver.steps(), 12);
    }
  }
  std::printf("1 or 2 plans lost, at Submit or Await: the first row after is the first that was lost\n");
}

TEST(Recovery, EndByLengthInALostPlan) {
  Watched w({}, Losing(1, 16, 4, /*awaiting=*/true));
  ASSERT_TRUE(w.driver.Add(MakeRequest("a", Prompt(6), 4)).ok());
  w.RunToRecovery();
  EXPECT_EQ(w.lost_plans, 1);  // its last row: there was nothing more to submit
  EXPECT_EQ(w.driver.sink("a").num_finished(), 0);
  w.Finish();
  EXPECT_EQ(w.plans.size(), 1u);
  EXPECT_EQ(w.driver.sink("a").outputs()[0].finish.reason, FinishReason::kLength);
  std::printf("the last of 4 tokens was lost and is sampled again\n");
}

TEST(Recovery, SharedBlocksThatALostPlanWasToFill) {
  SchedulerOptions options;
  options.max_tokens_per_step = 8;
  // a: rows 0 to 7 in step 1, 8 to 15 in step 2, 16 to 17 in step 3; b finds a's blocks before a has written them.
  Watched w(options, Losing(1, 32, 2, /*awaiting=*/true));
  ASSERT_TRUE(w.driver.Add(MakeRequest("a", Prompt(18), 3)).ok());
  w.driver.Turn();
  w.driver.Turn();
  EXPECT_EQ(w.driver.steps(), 1);
  ASSERT_TRUE(w.driver.Add(MakeRequest("b", Prompt(20), 3)).ok());
  w.driver.Turn();  // submits step 3 with b on blocks 0 to 3 of a; step 2 is lost
  ASSERT_EQ(w.driver.scheduler().Load().homes[0].running_sequences, 2);
  ASSERT_TRUE(w.driver.recovering());
  const HomePlan& shared = w.plans.back().homes[0];
  ASSERT_EQ(shared.num_sequences(), 2);
  EXPECT_EQ(shared.positions()[shared.query_starts()[1]], 16);
  EXPECT_EQ(shared.block_tables()[3], shared.block_tables()[shared.max_blocks() + 3]);
  w.RunToRecovery();
  EXPECT_EQ(w.driver.scheduler().Load().homes[0].running_sequences, 1);
  EXPECT_EQ(w.driver.scheduler().Load().homes[0].waiting_sequences, 1);
  w.Finish();
  EXPECT_EQ(w.first().positions()[0], 8);  // a goes on behind what step 1 has written
  EXPECT_EQ(w.first().num_tokens(), 8);
  // b shares what was written before it came back: the 16 tokens that it shared before.
  EXPECT_EQ(w.plans[1].homes[0].positions()[w.plans[1].homes[0].query_starts()[1]], 16);
  std::printf("the writer goes on, the one that shared unwritten blocks waits and shares them once they are written\n");
}

TEST(Recovery, CancelledWithRowsInFlightLeavesNothingKnown) {
  for (const int outputs : {1, 2}) {
    for (const bool committed : {false, true}) {
      // Steps 1 and 2 are lost, or step 1 is committed, 2 and 3 are lost.
      Watched w({}, Losing(1, 32, committed ? 2 : 1, /*awaiting=*/true));
      Request request = MakeRequest("a", Prompt(16), 20);
      request.num_outputs = outputs;
      ASSERT_TRUE(w.driver.Add(request).ok());
      for (int i = 0; committed && i < 2; ++i) w.driver.Turn();
      while (w.driver.scheduler().plans_in_flight() < 2) w.driver.Turn(/*depth=*/3);  // only submits
      w.driver.Cancel("a", 0);
      w.RunToRecovery();
      EXPECT_EQ(w.lost_plans, 2);
      EXPECT_EQ(w.driver.sink("a").num_finished(), 1);
      w.driver.Cancel("a", -1);
      EXPECT_TRUE(w.driver.scheduler().CheckIntegrity(/*idle=*/true).ok());
      EXPECT_EQ(w.driver.scheduler().Load().homes[0].cached_blocks, committed ? 4 : 0);
      ASSERT_TRUE(w.driver.Add(MakeRequest("b", Prompt(16), 3)).ok());
      w.Finish();
      EXPECT_EQ(w.driver.sink("b").outputs()[0].finish.cached_prompt_tokens, committed ? 12 : 0);
    }
  }
  std::printf("a prompt whose only writer was lost is not in the prefix cache; a committed one is\n");
}

TEST(Recovery, BlocksGivenUpWhileALostPlanTouchedThem) {
  // a runs alone in a pool of 6 blocks; it is cancelled with a row in flight, b takes its blocks at once, both are
  // lost.
  Watched w({}, Losing(1, 6, 4, /*awaiting=*/true));
  ASSERT_TRUE(w.driver.Add(MakeRequest("a", Prompt(12), 12)).ok());
  for (int i = 0; i < 4; ++i) w.driver.Turn();
  EXPECT_EQ(w.driver.scheduler().plans_in_flight(), 1);  // step 4
  w.driver.Cancel("a", -1);
  ASSERT_TRUE(w.driver.Add(MakeRequest("b", Prompt(20, 50), 3)).ok());
  w.driver.Turn();
  ASSERT_TRUE(w.driver.recovering());
  EXPECT_EQ(w.plans.back().homes[0].num_tokens(), 20);
  w.RunToRecovery();
  EXPECT_EQ(w.lost_plans, 2);
  ASSERT_TRUE(w.driver.Add(MakeRequest("c", Prompt(12), 3)).ok());
  w.Finish();
  EXPECT_EQ(w.first().positions()[0], 0);
  EXPECT_LT(w.driver.sink("c").outputs()[0].finish.cached_prompt_tokens, 12);
  std::printf("blocks that went from one lost plan to the next are written again before they are read\n");
}

TEST(Recovery, PreemptedWithALostRowWaitsForItNoMore) {
  SchedulerOptions options;
  options.force_preempt_every = 5;
  Watched w(options, Losing(1, 32, 4, /*awaiting=*/true));
  ASSERT_TRUE(w.driver.Add(MakeRequest("a", Prompt(6), 12)).ok());
  ASSERT_TRUE(w.driver.Add(MakeRequest("b", Prompt(6, 30), 12)).ok());
  w.RunToRecovery();
  EXPECT_EQ(w.driver.scheduler().Load().homes[0].waiting_sequences, 1);
  w.Finish();
  EXPECT_EQ(w.first().num_sequences(), 2);  // at once
  std::printf("preempted with a row in flight that was lost: admitted by the next plan\n");
}

TEST(Recovery, LostHomeStartsAgainInOrder) {
  SchedulerOptions options;
  options.max_sequences = 3;
  options.eos_token_ids = {3, 50};
  // Step 8 is lost with home 0; home 1 is kept.
  Watched w(options, Losing(2, 64, 8, /*awaiting=*/true, {.homes = {0}}));
  Request first = MakeRequest("first", Prompt(9), 20);
  first.num_outputs = 2;
  first.sampling.repetition_penalty = 1.2f;
  first.sampling.min_tokens = 15;
  first.sampling.num_top_logprobs = 3;
  Request late = MakeRequest("late", Prompt(9, 40), 20), later = MakeRequest("later", Prompt(9, 60), 20);
  late.priority = later.priority = 1;
  Request other = MakeRequest("other", Prompt(60, 20), 60);
  other.sampling.ignore_eos = true;
  ASSERT_TRUE(w.driver.Add(first).ok());
  ASSERT_TRUE(w.driver.Add(other).ok());  // on home 1
  for (const Request& request : {late, later}) ASSERT_TRUE(w.driver.Add(request).ok());
  w.RunToRecovery();
  const std::vector<int32_t> before = w.driver.sink("first").outputs()[0].tokens;
  ASSERT_EQ(before.size(), 7u);
  const LoadSnapshot load = w.driver.scheduler().Load();
  EXPECT_EQ(load.homes[0].running_sequences, 0);
  EXPECT_EQ(load.homes[0].used_blocks + load.homes[0].cached_blocks, 0);
  EXPECT_EQ(load.homes[1].running_sequences, 1);
  EXPECT_EQ(load.requeued_sequences, 3);
  w.Finish();
  // The whole history of the first, from position 0; then its second output on the same prompt.
  std::vector<int32_t> tokens = Prompt(9);
  tokens.insert(tokens.end(), before.begin(), before.end());
  ASSERT_GE(w.first(0).num_tokens(), 16);
  EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), w.first(0).token_ids().begin()));
  EXPECT_EQ(w.first(1).query_starts()[1], 1);
  EXPECT_EQ(w.first(1).num_sequences(), 2);  // one of the four waits here now: home 1 has less to do
  EXPECT_LT(w.driver.sink("first").outputs()[0].steps.back(), w.driver.sink("later").outputs()[0].steps.back());
  EXPECT_LT(w.driver.sink("late").outputs()[0].steps.back(), w.driver.sink("later").outputs()[0].steps.back());
  for (const RecordingSink::Output& output : w.driver.sink("first").outputs()) {
    EXPECT_GE(output.tokens.size(), 15u);
    EXPECT_EQ(output.finish.num_preemptions, 0);
  }
  std::printf(
      "home 0 lost: 3 sequences start again as prompts of all their tokens, home 1 goes on with one row and takes one "
      "of them\n");
}

// Home 0 goes at step 6 and is back at step 12.
TEST(Recovery, AHomeThatIsAbsentHasNothing) {
  SimulatedOptions engine;
  engine.num_homes = 3;
  engine.limits = TestLimits(64, 4);
  engine.lose = [losses = 0](int64_t step, bool awaiting) mutable -> std::optional<SimulatedLoss> {
    if (!awaiting || losses == 2 || step != (losses == 0 ? 6 : 12)) return std::nullopt;
    return ++losses == 1 ? SimulatedLoss{.absent = {0}} : SimulatedLoss{};
  };
  SchedulerOptions options;
  options.max_sequences = 3;
  Watched w(options, engine);
  const auto add = [&](const std::string& id, int32_t first) {
    Request request = MakeRequest(id, Prompt(10, first), 30);
    request.sampling.ignore_eos = true;
    request.num_outputs = 2;
    ASSERT_TRUE(w.driver.Add(request).ok());
  };
  for (int i = 0; i < 6; ++i) add("r" + std::to_string(i), 10 * i);  // two on each home, of which one output waits
  w.RunToRecovery();
  LoadSnapshot load = w.driver.scheduler().Load();
  EXPECT_EQ(load.requeued_sequences, 3);
  EXPECT_EQ(load.homes[0].total_blocks, 0);
  EXPECT_EQ(load.homes[0].running_sequences + load.homes[0].waiting_sequences, 0);
  EXPECT_EQ(load.homes[1].running_sequences, 3);  // as they were
  EXPECT_EQ(load.homes[2].running_sequences, 3);
  // One of home 0's requests each, and the output that waited there.
  EXPECT_EQ(load.homes[1].waiting_sequences, 3);
  EXPECT_EQ(load.homes[2].waiting_sequences, 3);
  add("late", 70);
  while (w.driver.scheduler().Load().recoveries < 2) {
    EXPECT_EQ(w.driver.scheduler().Load().homes[0].waiting_sequences, 0);
    w.driver.Turn();
  }
  load = w.driver.scheduler().Load();
  EXPECT_EQ(load.requeued_sequences, 3);  // nobody starts again for a home that is back
  EXPECT_EQ(load.homes[0].total_blocks, 64);
  EXPECT_GT(load.homes[0].waiting_sequences, 0);  // of those that wait elsewhere
  for (int h = 1; h < 3; ++h) EXPECT_EQ(load.homes[h].running_sequences, 3);
  w.Finish();
  std::printf("home 0 of 3 goes: its 4 sequences wait at the other two; it comes back: it gets those that wait\n");
}

// What is remembered of a lost plan must not be taken for another one's of the same number.
TEST(Recovery, NumbersOfLostStepsComeAgain) {
  for (int variant = 0; variant < 4; ++variant) {
    const bool home_lost = (variant & 1) != 0;
    // Step 3 is lost twice; then the steps begin at 1 again, and step 2 is lost.
    SimulatedOptions engine;
    engine.limits = TestLimits(64, 4);
    engine.lose = [home_lost, losses = 0](int64_t step, bool) mutable -> std::optional<SimulatedLoss> {
      if (step != (losses < 2 ? 3 : 2) || losses == 3) return std::nullopt;
      ++losses;
      SimulatedLoss loss;
      if (losses == 1 && home_lost) loss.homes = {0};
      loss.next_step = losses == 1 ? 2 : losses == 2 ? 1 : 0;
      return loss;
    };
    SchedulerOptions options;
    options.max_tokens_per_step = 8;
    options.prefix_cache = (variant & 2) != 0;
    Watched w(options, engine);
    Request b = MakeRequest("b", Prompt(60), 3), a = MakeRequest("a", Prompt(30, 50), 3);
    b.priority = 1;
    ASSERT_TRUE(w.driver.Add(b).ok());
    const auto run_to = [&](int64_t recoveries) {
      while (w.driver.scheduler().Load().recoveries < recoveries) w.driver.Turn(/*depth=*/1);
    };
    run_to(1);
    w.driver.Turn(/*depth=*/1);  // step 2, the second of that number: 8 rows of b
    ASSERT_TRUE(w.driver.Add(a).ok());
    run_to(2);  // step 3, the second: rows of a only
    w.driver.Turn(/*depth=*/1);
    EXPECT_EQ(w.first().token_ids()[0], 50);
    run_to(3);
    w.driver.Turn(/*depth=*/1);
    EXPECT_EQ(w.first().positions()[0], 8);  // of a: step 1 was committed
    while (w.plans.back().homes[0].num_sequences() < 2) w.driver.Turn(/*depth=*/1);
    const HomePlan& both = w.plans.back().homes[0];
    EXPECT_EQ(both.positions()[both.query_starts()[1]], home_lost ? 8 : 24);  // b: behind its own second step 2
    w.Finish(/*depth=*/1);
  }
  std::printf(
      "three losses, steps 1 to 3 again and again: each sequence goes back to what was committed, no further\n");
}

TEST(Recovery, NothingInFlight) {
  for (const bool kept : {false, true}) {
    SimulatedOptions engine;
    engine.limits = TestLimits(32, 4);
    Watched w({}, engine);
    ASSERT_TRUE(w.driver.Add(MakeRequest("a", Prompt(9), 10)).ok());
    for (int i = 0; i < 4; ++i) w.driver.Turn(/*depth=*/1);
    ASSERT_EQ(w.driver.scheduler().plans_in_flight(), 0);
    ASSERT_TRUE(w.driver.scheduler().Recover({.next_step = 5, .home_kept = {kept}, .home_usable = {true}}).ok());
    w.plans.clear();
    w.Finish(/*depth=*/1);
    EXPECT_EQ(w.first().num_tokens(), kept ? 1 : 13);
  }
  std::printf("nothing in flight: a kept home goes on with one row, a lost one with 13\n");
}

TEST(Recovery, OfAnotherShapeIsAnError) {
  SimulatedOptions engine;
  engine.num_homes = 2;
  engine.limits = TestLimits(8, 4);
  Driver driver({}, engine);
  const std::vector<bool> both = {true, true}, one = {true}, none = {false, false};
  for (const Recovery& wrong : {Recovery{.next_step = 1, .home_kept = one, .home_usable = both},
                                Recovery{.next_step = 1, .home_kept = both, .home_usable = one},
                                Recovery{.next_step = 0, .home_kept = both, .home_usable = both},
                                Recovery{.next_step = 1, .home_kept = none, .home_usable = none}}) {
    EXPECT_EQ(driver.scheduler().Recover(wrong).code(), absl::StatusCode::kInternal);
  }
  std::printf("a recovery of 1 home of 2, that goes on at step 0, or that leaves no home, is refused\n");
}

// Every step of a small load, at Submit and at Await, with every subset of two homes, with and without preemptions.
TEST(Recovery, AtEveryMoment) {
  int64_t runs = 0, tokens = 0, losses = 0, steps = 0;
  for (int64_t before = -1; losses > before; ++steps) {
    before = losses;
    const int64_t step = steps + 1;
    for (int variant = 0; variant < 32; ++variant) {
      SimulatedLoss loss;
      if ((variant & 1) != 0) loss.homes.push_back(0);
      if ((variant & 2) != 0) loss.homes.push_back(1);
      if (variant % 3 > 0) loss.next_step = variant % 3 == 1 ? step + 2 : 1;
      SchedulerOptions options;
      options.max_tokens_per_step = 7;
      options.force_preempt_every = (variant & 8) != 0 ? 3 : 0;
      Driver driver(options, Losing(2, 11, step, (variant & 4) != 0, loss));
      const int depth = (variant & 16) != 0 ? 2 : 1;
      for (int i = 0; i < 7; ++i) {
        Request request = MakeRequest(std::to_string(i), Prompt(9 + i % 3, i % 3), 5 + i);
        request.num_outputs = i == 2 ? 3 : 1;
        if (i % 2 == 0) request.sampling.frequency_penalty = 0.5f;
        ASSERT_TRUE(driver.Add(std::move(request)).ok());
        driver.Turn(depth);
        if (i == 5) driver.Cancel("3", -1);
      }
      driver.RunToEnd(2000, depth);
      tokens += driver.ExpectReference();
      losses += driver.scheduler().Load().recoveries;
      ++runs;
      ASSERT_FALSE(HasFailure()) << "step " << step << " variant " << variant;
    }
  }
  EXPECT_GE(steps, 20);
  EXPECT_GT(losses, runs / 2);
  std::printf("%ld runs, %ld losses, %ld tokens equal the reference\n", runs, losses, tokens);
}

}  // namespace
}  // namespace soloist
