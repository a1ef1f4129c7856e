// Ranks that are lost and not replaced: the others take their experts, tokens stay what they are, and who comes back
// gets them back.
#include <algorithm>
#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "tests/cluster/recovery_fixture.h"

namespace soloist {
namespace {

// Fails in the call number `at` of a group of `size` ranks.
Misbehaviour FailsInGroupOf(int size, std::atomic<int>& calls, int at) {
  return {.before_all_to_all = [size, &calls, at](Communicator& comm) {
    return comm.size() == size && ++calls == at ? absl::InternalError("the device has failed") : absl::OkStatus();
  }};
}

class ShrinkTest : public RecoveryTest {
 protected:
  ShrinkTest() {
    options_.on_loss = OnLoss::kShrink;
    options_.replace_timeout = absl::Milliseconds(100);
  }
  // Of the recovery: which homes are usable, and how many experts each rank has.
  void ExpectShares(size_t recovery, const std::vector<bool>& usable, const std::vector<int>& experts) const {
    ASSERT_LT(recovery, recoveries_.size());
    const Recovered& recovered = recoveries_[recovery];
    EXPECT_EQ(recovered.home_usable, usable) << recovery;
    for (int r = 0; r < kRanks; ++r) {
      EXPECT_EQ(std::ranges::count(recovered.expert_rank, r), experts[r]) << "recovery " << recovery << ", rank " << r;
    }
  }
};

TEST_F(ShrinkTest, TheOthersTakeTheExpertsOfALostRank) {
  std::atomic<int> calls = 0;
  ExpectUndisturbed(RunAll({{kVictim, FailsOnce(calls, 200)}}, [](Harness& harness) {
    ExpectUndisturbed(harness.Run(Requests()));  // from the first step on without it
  }));
  ASSERT_EQ(recoveries_.size(), 1u);
  EXPECT_EQ(recoveries_[0].home_kept, (std::vector<bool>{true, true, false, true}));
  ExpectShares(0, {true, true, false, true}, {6, 5, 0, 5});
}

// Rank 1 in the second step of the group without rank 2, rank 3 in the second of the next.
TEST_F(ShrinkTest, OneAfterAnotherUntilOneIsLeft) {
  std::atomic<int> first = 0, second = 0, third = 0;
  constexpr int kSecondStep = kPreflightAllToAlls + kAllToAllsPerStep + 3;
  ExpectUndisturbed(RunAll({{2, FailsOnce(first, 100)},
                            {1, FailsInGroupOf(3, second, kSecondStep)},
                            {3, FailsInGroupOf(2, third, kSecondStep)}},
                           [](Harness&) {}));
  ASSERT_EQ(recoveries_.size(), 3u);
  ExpectShares(0, {true, true, false, true}, {6, 5, 0, 5});
  // Rank 1's five experts go where fewest are: 3, 3, 0, 3, 0. What rank 2 has left stays where it is.
  ExpectShares(1, {true, false, false, true}, {8, 0, 0, 8});
  ExpectShares(2, {true, false, false, false}, {16, 0, 0, 0});
}

// The preflight's bytes of the group of three come to rank 1 changed: it cannot join, and the group is formed again.
TEST_F(ShrinkTest, ASmallerGroupThatBreaksIsFormedAnew) {
  std::atomic<int> lost = 0, spoilt = 0;
  std::atomic<int> size = 0;
  const Misbehaviour spoils = {.after_all_to_all =
                                   [&](void* recv, int64_t bytes) {
                                     if (size == 3 && spoilt++ == 0) std::fill_n(static_cast<char*>(recv), bytes, 'x');
                                   },
                               .before_all_to_all =
                                   [&](Communicator& comm) {
                                     size = comm.size();
                                     return absl::OkStatus();
                                   }};
  ExpectUndisturbed(RunAll({{kVictim, FailsOnce(lost, 100)}, {1, spoils}}, [](Harness&) {}));
  EXPECT_GT(spoilt, 1);
  ASSERT_EQ(recoveries_.size(), 1u);
  ExpectShares(0, {true, true, false, true}, {6, 5, 0, 5});
}

// A worker dials in as soon as the group of three is at work, and takes the place while requests run.
TEST_F(ShrinkTest, WhoComesBackGetsItsExpertsBack) {
  std::atomic<int> lost = 0, shrunk = 0;
  const Misbehaviour calls_for_help = {.before_all_to_all = [&](Communicator& comm) {
    if (comm.size() == 3 && ++shrunk == 40) workers_.Start(workers_.Options(leader_, -1));
    return absl::OkStatus();
  }};
  ExpectUndisturbed(RunAll({{kVictim, FailsOnce(lost, 200)}, {0, calls_for_help}}, [this](Harness& harness) {
    for (int runs = 0; recoveries_.size() < 2 && runs < 50; ++runs) ExpectUndisturbed(harness.Run(Requests()));
    ExpectUndisturbed(harness.Run(Requests()));
    for (const LoadSnapshot::Home& home : harness.loop().Load().homes) EXPECT_EQ(home.total_blocks, 128);
  }));
  ASSERT_EQ(recoveries_.size(), 2u);
  ExpectShares(0, {true, true, false, true}, {6, 5, 0, 5});
  ExpectShares(1, {true, true, true, true}, {4, 4, 4, 4});
  EXPECT_EQ(recoveries_[1].home_kept, (std::vector<bool>{true, true, false, true}));
}

// The others' checkpoint is gone: they say so and wait, and go on with whoever takes the place.
TEST_F(ShrinkTest, WithoutTheWeightsTheyWait) {
  const std::filesystem::path copy = std::filesystem::path(testing::TempDir()) / "gone";
  std::filesystem::copy(kModelDir, copy, std::filesystem::copy_options::recursive);
  model_of_ = [&](int rank) { return rank == 0 ? copy.string() : std::string(); };
  std::atomic<int> calls = 0;
  Misbehaviour fails = FailsOnce(calls, 200);
  std::thread replacement;
  fails.before_all_to_all = [&, fail = fails.before_all_to_all](Communicator& comm) {
    const absl::Status status = fail(comm);
    if (!status.ok()) {
      std::filesystem::remove_all(copy);
      replacement = std::thread([this] {
        absl::SleepFor(absl::Milliseconds(800));
        workers_.Start(workers_.Options(leader_, -1));
      });
    }
    return status;
  };
  ExpectUndisturbed(Run(fails));
  replacement.join();
  ExpectOnlyVictimReplaced();
  ExpectShares(0, {true, true, true, true}, {4, 4, 4, 4});
}

// What can be read of it, and what a scheduler hears that does not know of it.
TEST_F(ShrinkTest, TheStateSaysWhoIsMissingAndWhoHasItsExperts) {
  std::atomic<int> calls = 0;
  auto cluster = CreateWithVictimThatFails(calls, 60);
  ASSERT_EQ(cluster.status(), absl::OkStatus());
  Engine& engine = **cluster;
  const EngineInfo& before = engine.Info();
  const auto plan_of = [](int64_t step) {
    return StepPlan{.step = step, .homes = std::vector<HomePlan>(kRanks, HomePlan(HomePlanParts{}, step, 0, 0))};
  };
  absl::Status failed;
  for (int64_t step = 1; failed.ok(); ++step) {
    failed = engine.Submit(plan_of(step));
    if (failed.ok()) failed = engine.Await().status();
  }
  ASSERT_TRUE(absl::IsUnavailable(failed)) << failed.ToString();
  const auto recovery = engine.Recover(absl::Seconds(20));
  ASSERT_EQ(recovery.status(), absl::OkStatus());
  EXPECT_EQ(recovery->home_usable, (std::vector<bool>{true, true, false, true}));
  EXPECT_EQ(before.expert_rank, (std::vector<int>{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3}));
  EXPECT_EQ(engine.Info().expert_rank, (std::vector<int>{0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 3, 0, 3, 3, 3, 3}));
  const RankStatus victim = engine.Ranks()[kVictim];
  EXPECT_EQ(victim.state, RankState::kLost);
  EXPECT_NE(victim.message.find("its experts are with rank 0, 1, 3; waiting for a worker to take its place"),
            std::string::npos)
      << victim.message;
  for (const int r : {0, 1, 3}) EXPECT_EQ(engine.Ranks()[r].state, RankState::kReady);

  HomePlanParts one;
  one.token_ids = {5};
  one.positions = {0};
  one.slot_mapping = {0};
  one.query_starts = {0, 1};
  one.seq_lens = {1};
  one.block_tables = {0};
  one.max_blocks = 1;
  StepPlan plan{.step = recovery->next_step};
  for (int h = 0; h < kRanks; ++h) {
    plan.homes.emplace_back(h == kVictim ? one : HomePlanParts{}, recovery->next_step, /*max_home_tokens=*/1, 0);
  }
  const absl::Status refused = engine.Submit(std::move(plan));
  EXPECT_TRUE(absl::IsUnavailable(refused)) << refused.ToString();
  EXPECT_NE(refused.message().find("1 tokens for home 2, which has no rank"), std::string::npos) << refused.ToString();
  const auto again = engine.Recover(absl::Seconds(20));
  ASSERT_EQ(again.status(), absl::OkStatus());
  EXPECT_EQ(again->home_kept, recovery->home_usable);
  EXPECT_EQ(again->home_usable, recovery->home_usable);
  EXPECT_EQ(engine.Submit(plan_of(again->next_step)), absl::OkStatus());
  EXPECT_EQ(engine.Await().status(), absl::OkStatus());
}

}  // namespace
}  // namespace soloist
