#include "engine/simulated_engine.h"

#include <cstdio>
#include <vector>

#include "gtest/gtest.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

SimulatedOptions Options() {
  SimulatedOptions options;
  options.limits = TestLimits(8, 4);
  options.base_ns = 1000;
  options.per_token_ns = 10;
  options.per_kv_token_ns = 1;
  return options;
}

// One sequence: `tokens` at positions [first, ...), its blocks, the last row sampled.
StepPlan Plan(int64_t step, std::vector<int32_t> tokens, int32_t first, std::vector<int32_t> blocks, int previous) {
  HomePlanParts parts;
  parts.token_ids = std::move(tokens);
  const int32_t rows = static_cast<int32_t>(parts.token_ids.size());
  for (int32_t p = first; p < first + rows; ++p) {
    parts.positions.push_back(p);
    parts.slot_mapping.push_back(blocks[p / 4] * 4 + p % 4);
  }
  parts.query_starts = {0, rows};
  parts.seq_lens = {first + rows};
  parts.max_blocks = static_cast<int32_t>(blocks.size());
  parts.block_tables = std::move(blocks);
  parts.logit_rows = {rows - 1};
  parts.sampling.resize(1);
  parts.sampling[0].position = first + rows;
  StepPlan plan;
  plan.step = step;
  plan.homes.emplace_back(parts, step, rows, previous);
  return plan;
}

int32_t Next(const std::vector<int32_t>& tokens) {
  SimulatedSequence sequence;
  for (const int32_t token : tokens) sequence.Append(token);
  SamplingRow row;
  row.position = static_cast<int32_t>(tokens.size());
  return sequence.Sample(row, {}, {}, -1, 97);
}

TEST(SimulatedEngine, TokensAreTheFunctionOfThePrefix) {
  SimulatedEngine engine(Options());
  ASSERT_TRUE(engine.Submit(Plan(1, {5, 6, 7, 8, 9}, 0, {3, 1}, 0)).ok());
  ASSERT_TRUE(engine.Submit(Plan(2, {-1}, 5, {3, 1}, 1)).ok());
  EXPECT_EQ(engine.Submit(Plan(3, {-1}, 6, {3, 1}, 1)).code(), absl::StatusCode::kFailedPrecondition);
  const auto first = engine.Await();
  ASSERT_TRUE(first.ok());
  const int32_t token = Next({5, 6, 7, 8, 9});
  EXPECT_EQ(first->homes[0].tokens, std::vector<int32_t>{token});
  EXPECT_EQ(first->device_ns, 1000 + 5 * 10 + 5);
  const auto second = engine.Await();
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->homes[0].tokens, std::vector<int32_t>{Next({5, 6, 7, 8, 9, token})});
  EXPECT_EQ(engine.Await().status().code(), absl::StatusCode::kFailedPrecondition);
  std::printf("two plans in flight, the second refers to the first's result\n");
}

TEST(SimulatedEngine, SeesAWrongBlock) {
  SimulatedEngine engine(Options());
  ASSERT_TRUE(engine.Submit(Plan(1, {5, 6, 7, 8}, 0, {0}, 0)).ok());
  ASSERT_TRUE(engine.Submit(Plan(2, {1, 2, 3, 4}, 0, {1}, 1)).ok());
  ASSERT_TRUE(engine.Await().ok() && engine.Await().ok());
  ASSERT_TRUE(engine.Submit(Plan(3, {9}, 4, {1, 2}, 1)).ok());  // another sequence's block
  const auto wrong = engine.Await();
  ASSERT_TRUE(wrong.ok());
  EXPECT_NE(wrong->homes[0].tokens[0], Next({5, 6, 7, 8, 9}));
  const absl::Status unwritten = engine.Submit(Plan(4, {9}, 4, {7, 2}, 1));
  EXPECT_EQ(unwritten.code(), absl::StatusCode::kInternal) << unwritten;
  EXPECT_EQ(engine.Await().status(), unwritten);
  std::printf("a foreign block changes the token, an unwritten one is an error: %s\n",
              std::string(unwritten.message()).c_str());
}

TEST(SimulatedEngine, RefusesBadPlans) {
  SimulatedEngine engine(Options());
  EXPECT_EQ(engine.Submit(Plan(2, {1}, 0, {0}, 0)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine.Submit(Plan(1, {1}, 0, {0}, 1)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine.Submit(Plan(1, {97}, 0, {0}, 0)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(engine.Submit(Plan(1, {1}, 0, {8}, 0)).code(), absl::StatusCode::kInvalidArgument);
  StepPlan two = Plan(1, {1}, 0, {0}, 0);
  two.homes.push_back(two.homes[0]);
  EXPECT_EQ(engine.Submit(std::move(two)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(engine.Submit(Plan(1, {1}, 0, {0}, 0)).ok());
  std::printf("wrong step, previous rows, token, block, number of homes: refused, then a good one taken\n");
}

TEST(SimulatedEngine, FailsWhenAsked) {
  SimulatedOptions options = Options();
  options.fail_at_step = 2;
  SimulatedEngine engine(options);
  ASSERT_TRUE(engine.Submit(Plan(1, {1}, 0, {0}, 0)).ok());
  ASSERT_TRUE(engine.Submit(Plan(2, {-1}, 1, {0}, 1)).ok());
  EXPECT_TRUE(engine.Await().ok());
  EXPECT_EQ(engine.Ranks()[0].state, RankState::kReady);
  EXPECT_EQ(engine.Await().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(engine.Submit(Plan(3, {1}, 0, {0}, 1)).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(engine.Ranks()[0].state, RankState::kFailed);
  EXPECT_EQ(engine.Ranks()[0].last_step, 1);
  EXPECT_EQ(engine.Recover(absl::ZeroDuration()).status().code(), absl::StatusCode::kFailedPrecondition);
  std::printf("failure is final\n");
}

// Two homes with the same part.
StepPlan Twice(StepPlan plan) {
  plan.homes.push_back(plan.homes[0]);
  return plan;
}

TEST(SimulatedEngine, LosesWhatLostHomesAndLostStepsHaveWritten) {
  for (const bool awaiting : {false, true}) {
    SimulatedOptions options = Options();
    options.num_homes = 2;
    options.lose = [awaiting](int64_t step, bool at_await) -> std::optional<SimulatedLoss> {
      if (step != 2 || at_await != awaiting) return std::nullopt;
      return SimulatedLoss{.homes = {1}, .late_recovers = 2, .next_step = 6, .expert_rank = std::vector<int>(16, 0)};
    };
    SimulatedEngine engine(options);
    EXPECT_EQ(engine.Recover(absl::ZeroDuration()).status().code(), absl::StatusCode::kFailedPrecondition);
    const EngineInfo& before = engine.Info();
    ASSERT_TRUE(engine.Submit(Twice(Plan(1, {5, 6, 7, 8}, 0, {0}, 0))).ok());
    ASSERT_TRUE(engine.Await().ok());
    absl::Status lost = engine.Submit(Twice(Plan(2, {-1}, 4, {0, 1}, 1)));
    if (awaiting) {
      ASSERT_TRUE(lost.ok());
      ASSERT_TRUE(engine.Submit(Twice(Plan(3, {-1}, 5, {0, 1}, 1))).ok());
      lost = engine.Await().status();
    }
    EXPECT_EQ(lost.code(), absl::StatusCode::kUnavailable);
    EXPECT_EQ(engine.Await().status(), lost);
    EXPECT_EQ(engine.Submit(Twice(Plan(3, {1}, 0, {2}, 0))), lost);
    EXPECT_EQ(engine.Ranks()[0].state, RankState::kReady);
    EXPECT_EQ(engine.Ranks()[1].state, RankState::kLost);
    EXPECT_NE(engine.Ranks()[1].message, "");
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(engine.Recover(absl::ZeroDuration()).status().code(), absl::StatusCode::kDeadlineExceeded);
    }
    const auto recovery = engine.Recover(absl::ZeroDuration());
    ASSERT_TRUE(recovery.ok());
    EXPECT_EQ(recovery->next_step, 6);
    EXPECT_EQ(recovery->home_kept, (std::vector<bool>{true, false}));
    EXPECT_EQ(recovery->home_usable, (std::vector<bool>{true, true}));
    EXPECT_EQ(engine.Ranks()[1].state, RankState::kReady);
    EXPECT_EQ(before.expert_rank[15], 1);
    EXPECT_EQ(engine.Info().expert_rank, std::vector<int>(16, 0));
    EXPECT_EQ(engine.Info().num_homes, 2);

    // Home 0 has positions 0 to 3; position 4 is to be written again. Home 1 has nothing.
    const int32_t token = Next({5, 6, 7, 8});
    StepPlan plan = Plan(6, {token}, 4, {0, 1}, 0);
    plan.homes.push_back(Plan(6, {9}, 0, {0}, 0).homes[0]);
    ASSERT_TRUE(engine.Submit(std::move(plan)).ok());
    const auto result = engine.Await();
    ASSERT_TRUE(result.ok());
    EXPECT_EQ(result->homes[0].tokens, std::vector<int32_t>{Next({5, 6, 7, 8, token})});
    StepPlan reads_lost = Plan(7, {9}, 0, {3}, 0);
    const bool lost_home = awaiting;
    if (lost_home) {
      reads_lost.homes.push_back(Plan(7, {9}, 3, {0}, 0).homes[0]);  // positions 1 and 2 were the lost home's
    } else {
      reads_lost.homes[0] = Plan(7, {9}, 6, {0, 1}, 0).homes[0];  // position 5 was a lost step's
      reads_lost.homes.push_back(Plan(7, {9}, 0, {3}, 0).homes[0]);
    }
    const absl::Status refused = engine.Submit(std::move(reads_lost));
    EXPECT_EQ(refused.code(), absl::StatusCode::kInternal) << refused;
    EXPECT_EQ(engine.Recover(absl::ZeroDuration()).status().code(), absl::StatusCode::kFailedPrecondition);
  }
  std::printf("after a loss, slots of the lost home and of the lost steps are unwritten, the others are whole\n");
}

}  // namespace
}  // namespace soloist
