// Which steps run as two micro-batches, where their rows are divided, and what an engine checks of it.
#include "engine/micro_batches.h"

#include <string>
#include <vector>

#include "engine/worker/plan_intake.h"
#include "gtest/gtest.h"

namespace soloist {
namespace {

constexpr int32_t kBlockSize = 16;
constexpr PlanLimits kLimits = {.vocab_size = 100,
                                .max_model_len = 1024,
                                .num_blocks = 256,
                                .block_size = kBlockSize,
                                .max_tokens = 512,
                                .max_sequences = 8};

struct Chunk {
  int32_t rows, keys;  // after the step
};

HomePlan MakePlan(const std::vector<Chunk>& chunks, int32_t max_home_tokens = 0, int64_t step = 1) {
  HomePlanParts parts;
  parts.max_blocks = kLimits.max_model_len / kBlockSize;
  parts.query_starts = {0};
  for (size_t s = 0; s < chunks.size(); ++s) {
    const auto first_block = static_cast<int32_t>(s) * parts.max_blocks;
    for (int32_t p = chunks[s].keys - chunks[s].rows; p < chunks[s].keys; ++p) {
      parts.token_ids.push_back(1);
      parts.positions.push_back(p);
      parts.slot_mapping.push_back(first_block * kBlockSize + p);
    }
    parts.query_starts.push_back(static_cast<int32_t>(parts.token_ids.size()));
    parts.seq_lens.push_back(chunks[s].keys);
    for (int32_t b = 0; b < parts.max_blocks; ++b) parts.block_tables.push_back(first_block + b);
  }
  const auto tokens = static_cast<int32_t>(parts.token_ids.size());
  return {parts, step, max_home_tokens > 0 ? max_home_tokens : tokens, 0};
}

EngineInfo Info(int ranks) {
  EngineInfo info;
  info.num_ranks = info.num_homes = ranks;
  info.limits = kLimits;
  info.masked_max_tokens = 16;
  info.row_cost = {.linear_flops = 1000, .key_flops = 1};
  return info;
}

TEST(MicroBatchesTest, TheFlag) {
  EXPECT_EQ(ParseMicroBatches("auto").value(), MicroBatches::kAuto);
  EXPECT_EQ(ParseMicroBatches("1").value(), MicroBatches::kOne);
  EXPECT_EQ(ParseMicroBatches("2").value(), MicroBatches::kTwo);
  for (const char* text : {"", "0", "3", "two"}) {
    const auto refused = ParseMicroBatches(text);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(refused.status().message(), "micro-batches is '" + std::string(text) + "', allowed: auto, 1, 2");
  }
}

TEST(MicroBatchesTest, HalfOfTheCostNotOfTheRows) {
  const RowCost linear = {.linear_flops = 7}, keys = {.key_flops = 1};
  EXPECT_EQ(HalfOfCost(MakePlan({{100, 100}}), linear), 50);
  // Keys grow along the chunk: rows of 1 + 2 + ... + 71 = 2556 of 5050 keys, the half and a little more.
  EXPECT_EQ(HalfOfCost(MakePlan({{100, 100}}), keys), 71);
  EXPECT_EQ(HalfOfCost(MakePlan({{100, 100}}), {.linear_flops = 0, .key_flops = 1, .window = 1}), 50);
  // A long past makes rows alike again.
  EXPECT_EQ(HalfOfCost(MakePlan({{100, 1000}}), keys), 51);
  // A decode with many keys is worth a chunk with few.
  EXPECT_EQ(HalfOfCost(MakePlan({{1, 900}, {40, 40}}), keys), 1);
  EXPECT_EQ(HalfOfCost(MakePlan({{1, 900}, {40, 40}}), linear), 20);
}

// Whatever the plan: the sides differ by less than the dearest row and a border's allowance.
TEST(MicroBatchesTest, TheSidesCostAboutTheSame) {
  const RowCost cost = {.linear_flops = 300, .key_flops = 5};
  for (int32_t a = 1; a < 60; a += 7) {
    for (int32_t b = 1; b < 200; b += 23) {
      const HomePlan plan = MakePlan({{1, 7 * a}, {a, a + 100}, {b, 2 * b}});
      const int32_t second = HalfOfCost(plan, cost);
      ASSERT_GE(second, 1);
      ASSERT_LT(second, plan.num_tokens());
      int64_t sides[2] = {}, dearest = 0;
      for (int32_t row = 0; row < plan.num_tokens(); ++row) {
        const int64_t flops = cost.linear_flops + cost.key_flops * (plan.positions()[row] + 1);
        sides[row < second ? 0 : 1] += flops;
        dearest = std::max(dearest, flops);
      }
      EXPECT_LE(std::abs(sides[0] - sides[1]), dearest + (sides[0] + sides[1]) / 8) << a << " " << b;
    }
  }
}

TEST(MicroBatchesTest, ABorderThatIsNearGoesFirst) {
  const RowCost linear = {.linear_flops = 1};
  EXPECT_EQ(HalfOfCost(MakePlan({{47, 47}, {53, 53}}), linear), 47);
  EXPECT_EQ(HalfOfCost(MakePlan({{55, 55}, {45, 45}}), linear), 55);
  EXPECT_EQ(HalfOfCost(MakePlan({{40, 40}, {60, 60}}), linear), 50);
  EXPECT_EQ(HalfOfCost(MakePlan({{30, 30}, {22, 22}, {48, 48}}), linear), 52);
}

TEST(MicroBatchesTest, FewRows) {
  const RowCost cost = {.linear_flops = 1, .key_flops = 1};
  EXPECT_EQ(HalfOfCost(HomePlan(), cost), 0);
  EXPECT_EQ(HalfOfCost(MakePlan({{1, 500}}), cost), 1);
  EXPECT_EQ(HalfOfCost(MakePlan({{2, 2}}), cost), 1);
  EXPECT_EQ(HalfOfCost(MakePlan({{1, 1}, {1, 1000}}), cost), 1);
  EXPECT_EQ(HalfOfCost(MakePlan({{1, 1000}, {1, 1}}), cost), 1);
  // An engine that says nothing of costs: rows count alike.
  EXPECT_EQ(HalfOfCost(MakePlan({{10, 10}}), RowCost()), 5);
}

TEST(MicroBatchesTest, WhichSteps) {
  EngineInfo info = Info(4);
  EXPECT_FALSE(MicroBatchPolicy(MicroBatches::kAuto, info).WantsTwo(512)) << "not known to gain";
  info.overlap_min_tokens = 100;
  EXPECT_FALSE(MicroBatchPolicy(MicroBatches::kAuto, info).WantsTwo(99));
  EXPECT_TRUE(MicroBatchPolicy(MicroBatches::kAuto, info).WantsTwo(100));
  EXPECT_FALSE(MicroBatchPolicy(MicroBatches::kOne, info).WantsTwo(512));
  EXPECT_TRUE(MicroBatchPolicy(MicroBatches::kTwo, info).WantsTwo(2));
  EXPECT_FALSE(MicroBatchPolicy(MicroBatches::kTwo, info).WantsTwo(1));
  info.masked_max_tokens = 128;
  EXPECT_FALSE(MicroBatchPolicy(MicroBatches::kAuto, info).WantsTwo(128)) << "masked";
  EXPECT_TRUE(MicroBatchPolicy(MicroBatches::kAuto, info).WantsTwo(129));
  info.num_ranks = 1;
  EXPECT_FALSE(MicroBatchPolicy(MicroBatches::kAuto, info).WantsTwo(512)) << "nothing travels";
}

TEST(MicroBatchesTest, AllHomesOrNone) {
  const MicroBatchPolicy policy(MicroBatches::kTwo, Info(3));
  StepPlan step{.step = 1, .homes = {MakePlan({}, 20), MakePlan({{1, 30}}, 20), MakePlan({{20, 20}}, 20)}};
  policy.Apply(step);
  EXPECT_EQ(step.homes[0].second_begin(), 0);
  EXPECT_EQ(step.homes[1].second_begin(), 1);
  EXPECT_EQ(step.homes[2].second_begin(), 10);
  StepPlan small{.step = 1, .homes = {MakePlan({}, 1), MakePlan({{1, 30}}, 1), MakePlan({}, 1)}};
  policy.Apply(small);
  for (const HomePlan& home : small.homes) EXPECT_EQ(home.second_begin(), -1);
}

TEST(MicroBatchesTest, WhatAnEngineRefuses) {
  const EngineInfo info = Info(2);
  const PlanIntake intake(info);
  StepPlan step{.step = 1, .homes = {MakePlan({{20, 20}}), MakePlan({{3, 3}}, 20)}};
  MicroBatchPolicy(MicroBatches::kTwo, info).Apply(step);
  EXPECT_EQ(intake.CheckContents(step), absl::OkStatus());
  step.homes[1] = MakePlan({{3, 3}}, 20);
  EXPECT_EQ(intake.CheckContents(step).message(), "plan: home 1 has 1 micro-batches, home 0 has 2");

  std::vector<int32_t> words(step.homes[0].words().begin(), step.homes[0].words().end());
  words[15] = 21;  // behind the last row: an empty second micro-batch
  EXPECT_EQ(HomePlan::Parse(words)->Validate(kLimits), absl::OkStatus());
  words[15] = 22;
  EXPECT_EQ(HomePlan::Parse(words)->Validate(kLimits).message(),
            "plan: 21 as first row of the second micro-batch, limit 20");
  words[15] = -1;
  EXPECT_EQ(HomePlan::Parse(words).status().message(), "plan: header word 15 is -1, allowed: 0 to 268435456");
}

// The same plan after a recovery or a replay.
TEST(MicroBatchesTest, StaysWithThePlan) {
  HomePlan plan = MakePlan({{20, 20}});
  plan.Split(7);
  plan.Renumber(9, 3);
  EXPECT_EQ(plan.second_begin(), 7);
  EXPECT_EQ(HomePlan::Parse({plan.words().begin(), plan.words().end()})->second_begin(), 7);
}

}  // namespace
}  // namespace soloist
