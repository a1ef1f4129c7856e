// ReplayEngine step by step.
#include "engine/replay.h"

#include <memory>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/replay/overflowing_engine.h"

namespace soloist {
namespace {

constexpr PlanLimits kLimits{
    .vocab_size = 97, .max_model_len = 64, .num_blocks = 16, .block_size = 4, .max_tokens = 16, .max_sequences = 8};

// Tokens of one sequence from `position` on, in the blocks from `block` on, with a logit row for the last.
void AddSequence(HomePlanParts& parts, int32_t block, int32_t position, const std::vector<int32_t>& tokens) {
  if (parts.query_starts.empty()) parts.query_starts = {0};
  parts.max_blocks = 4;
  for (const int32_t token : tokens) {
    parts.token_ids.push_back(token);
    parts.positions.push_back(position);
    parts.slot_mapping.push_back((block + position / 4) * 4 + position % 4);
    ++position;
  }
  parts.query_starts.push_back(static_cast<int32_t>(parts.token_ids.size()));
  parts.seq_lens.push_back(position);
  for (int32_t b = 0; b < 4; ++b) parts.block_tables.push_back(b * 4 < position ? block + b : 0);
  parts.logit_rows.push_back(static_cast<int32_t>(parts.token_ids.size()) - 1);
  SamplingRow row;
  row.position = position;
  row.history_begin = static_cast<int32_t>(parts.history.size());
  parts.sampling.push_back(row);
}

StepPlan Plan(int64_t step, const HomePlanParts& parts, int32_t previous_rows) {
  StepPlan plan{.step = step, .homes = {}};
  const auto tokens = static_cast<int32_t>(parts.token_ids.size());
  for (int h = 0; h < 2; ++h) plan.homes.emplace_back(parts, step, tokens, previous_rows);
  return plan;
}

SimulatedOptions Simulated() {
  SimulatedOptions options;
  options.num_homes = 2;
  options.limits = kLimits;
  return options;
}

struct Engines {
  explicit Engines(std::function<bool(const StepPlan&)> overflows) {
    auto made = std::make_unique<OverflowingEngine>(Simulated(), std::move(overflows));
    inner = made.get();
    outer = std::make_unique<ReplayEngine>(std::move(made),
                                           DispatchRoomOptions{.kind = DispatchRoomOptions::Kind::kFixed, .rows = 1});
  }
  OverflowingEngine* inner;
  std::unique_ptr<ReplayEngine> outer;
};

std::vector<StepPlan> ThreeSteps() {
  HomePlanParts first, second, third;
  AddSequence(first, 0, 0, {1, 2, 3});
  AddSequence(first, 4, 0, {5, 6});
  AddSequence(second, 4, 2, {-2});
  AddSequence(second, 0, 3, {-1});
  AddSequence(third, 4, 3, {-1});
  AddSequence(third, 0, 4, {-2});
  third.sampling[1].presence_penalty = 1;
  third.sampling[1].pending_row = 1;
  return {Plan(1, first, 0), Plan(2, second, 2), Plan(3, third, 2)};
}

std::vector<StepResult> RunThree(Engine& engine) {
  std::vector<StepResult> results;
  std::vector<StepPlan> plans = ThreeSteps();
  CHECK_OK(engine.Submit(plans[0]));
  CHECK_OK(engine.Submit(plans[1]));
  results.push_back(engine.Await().value());
  CHECK_OK(engine.Submit(plans[2]));
  results.push_back(engine.Await().value());
  results.push_back(engine.Await().value());
  return results;
}

TEST(ReplayTest, EverySetOfOverflowsGivesTheSameTokens) {
  SimulatedEngine plain(Simulated());
  const std::vector<StepResult> expected = RunThree(plain);
  for (int set = 0; set < 8; ++set) {
    int asked = 0;
    // Each step is asked for once: what is run again has room for all.
    Engines engines([&](const StepPlan&) { return (set >> asked++) % 2 == 1; });
    const std::vector<StepResult> results = RunThree(*engines.outer);
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(results[i].step, i + 1);
      for (int h = 0; h < 2; ++h) EXPECT_EQ(results[i].homes[h].tokens, expected[i].homes[h].tokens) << set << " " << i;
    }
    if (set == 1) {
      // The second was in flight behind the first.
      EXPECT_EQ(results[0].replays, 1);
      EXPECT_EQ(results[1].replays, 1);
      EXPECT_EQ(results[2].replays, 0);
      EXPECT_EQ(asked, 3);
    }
    EXPECT_EQ(engines.outer->Ranks()[0].last_step, 3);
  }
}

TEST(ReplayTest, RefusesWhatEnginesRefuse) {
  Engines engines([](const StepPlan&) { return true; });
  std::vector<StepPlan> plans = ThreeSteps();
  EXPECT_EQ(engines.outer->Await().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(engines.outer->Submit(plans[1]).code(), absl::StatusCode::kInvalidArgument) << "step 2 first";
  StepPlan other = plans[0];
  for (HomePlan& home : other.homes) home.Renumber(1, 7);
  EXPECT_EQ(engines.outer->Submit(other).code(), absl::StatusCode::kInvalidArgument) << "room is ours to choose";
  other = plans[0];
  other.homes[1].Renumber(9, 0);
  EXPECT_EQ(engines.outer->Submit(other).code(), absl::StatusCode::kInvalidArgument) << "a home of another step";
  EXPECT_EQ(engines.outer->Submit(plans[0]), absl::OkStatus()) << "nothing was submitted before";
  EXPECT_EQ(engines.outer->Submit(plans[1]), absl::OkStatus());
  EXPECT_EQ(engines.outer->Submit(plans[2]).code(), absl::StatusCode::kFailedPrecondition) << "two are in flight";
  EXPECT_EQ(engines.outer->Await()->step, 1);
}

// What the device reads of a result becomes part of the plan.
TEST(ReplayTest, WithoutReferences) {
  HomePlanParts parts;
  AddSequence(parts, 0, 5, {-3});
  parts.history = {{10, 2}, {20, 0}};
  AddSequence(parts, 4, 5, {44});
  parts.history.push_back({10, 1});
  AddSequence(parts, 8, 5, {-1});
  for (SamplingRow& row : parts.sampling) row.frequency_penalty = 1;
  parts.sampling[0].pending_row = 2;  // token 20: one more of the second entry
  parts.sampling[2].pending_row = 0;  // token 7: an entry of its own
  parts.targets = {-1, 17, -1};
  const HomePlan plan(parts, 12, 9, 3);
  const std::vector<int32_t> previous = {7, 8, 20};
  const HomePlan resolved = WithoutReferences(plan, previous);
  ASSERT_EQ(resolved.Validate(kLimits), absl::OkStatus());
  EXPECT_EQ(std::vector(resolved.token_ids().begin(), resolved.token_ids().end()), std::vector<int32_t>({20, 44, 7}));
  EXPECT_EQ(std::vector(resolved.targets().begin(), resolved.targets().end()), parts.targets);
  EXPECT_EQ(resolved.previous_rows(), 0);
  EXPECT_EQ(resolved.max_home_tokens(), 9);
  EXPECT_EQ(resolved.step(), 12);
  ASSERT_EQ(resolved.num_history(), 4);
  const std::vector<std::pair<int32_t, int32_t>> expected = {{10, 2}, {20, 1}, {10, 1}, {7, 1}};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(resolved.history()[i].token, expected[i].first);
    EXPECT_EQ(resolved.history()[i].output_count, expected[i].second);
  }
  EXPECT_EQ(resolved.sampling()[1].history_begin, 2);
  EXPECT_EQ(resolved.sampling()[2].history_begin, 3);
  for (const SamplingRow& row : resolved.sampling()) EXPECT_EQ(row.pending_row, -1);
}

TEST(ReplayTest, OverwritesReadsOf) {
  std::vector<int32_t> read(kLimits.num_blocks, 0);
  HomePlanParts plan;
  AddSequence(plan, 2, 4, {1, 2});  // block 2 whole, two slots of block 3
  const auto overwrites = [&](int32_t block, int32_t position) {
    HomePlanParts next;
    AddSequence(next, block, position, {9});
    const bool result = OverwritesReadsOf(HomePlan(next, 2, 1, 0), HomePlan(plan, 1, 2, 0), 4, read);
    EXPECT_EQ(read, std::vector<int32_t>(kLimits.num_blocks, 0));
    return result;
  };
  EXPECT_TRUE(overwrites(2, 0));
  EXPECT_TRUE(overwrites(2, 3));
  EXPECT_TRUE(overwrites(3, 1));
  EXPECT_FALSE(overwrites(3, 2)) << "the next token of the same sequence";
  EXPECT_FALSE(overwrites(1, 0));
  EXPECT_FALSE(overwrites(0, 0)) << "padding of the table";
  EXPECT_FALSE(overwrites(4, 0));
}

}  // namespace
}  // namespace soloist
