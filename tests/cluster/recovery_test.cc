// Groups that break and ranks that are lost, with workers that are threads: no request fails, no token changes, and
// Recover says truly whose keys and values are gone.
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/cluster/recovery_fixture.h"

namespace soloist {
namespace {

// Where a rank may be made to wait.
class Gate {
 public:
  void Wait() {
    std::unique_lock lock(mutex_);
    opened_.wait(lock, [this] { return open_; });
  }
  void Open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    opened_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  bool open_ = false;
};

// Every 150 all-to-alls the victim's connections break; all ranks stay.
TEST_F(RecoveryTest, AGroupThatBreaksIsFormedAnew) {
  std::atomic<int> calls = 0;
  ExpectUndisturbed(Run({.before_all_to_all = [&](Communicator& comm) {
    if (++calls % 150 == 0) comm.Abort(absl::UnavailableError("a cable was pulled"));
    return absl::OkStatus();
  }}));
  ASSERT_GE(recoveries_.size(), 2u);
  for (const Recovered& recovery : recoveries_) EXPECT_EQ(recovery.home_kept, std::vector<bool>(kRanks, true));
}

TEST_F(RecoveryTest, ALostRankIsReplaced) {
  std::atomic<int> calls = 0;
  ReplaceLost();
  ExpectUndisturbed(Run(FailsOnce(calls, 200)));
  ExpectOnlyVictimReplaced();
}

// The same in steps of two micro-batches, where the collectives run on threads of their own: every second all-to-all is
// one under which the rank computes.
TEST_F(RecoveryTest, AGroupThatBreaksUnderComputationIsFormedAnew) {
  scheduler_.micro_batches = MicroBatches::kTwo;
  std::atomic<int> calls = 0;
  ExpectUndisturbed(Run({.before_all_to_all = [&](Communicator& comm) {
    if (++calls % 301 == 0) comm.Abort(absl::UnavailableError("a cable was pulled"));
    return absl::OkStatus();
  }}));
  ASSERT_GE(recoveries_.size(), 2u);
  for (const Recovered& recovery : recoveries_) EXPECT_EQ(recovery.home_kept, std::vector<bool>(kRanks, true));
}

TEST_F(RecoveryTest, ARankThatIsLostUnderComputationIsReplaced) {
  scheduler_.micro_batches = MicroBatches::kTwo;
  std::atomic<int> calls = 0;
  ReplaceLost();
  ExpectUndisturbed(Run(FailsOnce(calls, 402)));
  ExpectOnlyVictimReplaced();
}

TEST_F(RecoveryTest, ASpareTakesOver) {
  std::atomic<int> calls = 0;
  options_.spares = 1;
  Misbehaviour fails = FailsOnce(calls, 200);
  fails.before_all_to_all = [&, fail = fails.before_all_to_all](Communicator& comm) {
    // Every rank has its worker by now, so this one is a spare.
    if (calls == 0) workers_.Start(workers_.Options(leader_, -1));
    return fail(comm);
  };
  ExpectUndisturbed(Run(fails));
  ExpectOnlyVictimReplaced();
}

// It beats, but never comes out of its step: no rank finishes, the others give up, and it does not leave the group.
TEST_F(RecoveryTest, ARankThatHangsInAStepIsFound) {
  std::atomic<int> calls = 0;
  Gate gate;
  ReplaceLost();
  options_.abort_timeout = absl::Milliseconds(500);
  ExpectUndisturbed(Run({.before_all_to_all =
                             [&](Communicator&) {
                               if (++calls == 200) gate.Wait();
                               return absl::OkStatus();
                             }},
                        [&] { gate.Open(); }));
  ExpectOnlyVictimReplaced();
}

// The others have finished the step, since the last exchange is done.
TEST_F(RecoveryTest, ARankThatIsLateWithItsResultIsFound) {
  std::atomic<int> calls = 0;
  Gate gate;
  ReplaceLost();
  options_.step_timeout = absl::Milliseconds(500);
  options_.abort_timeout = absl::Milliseconds(500);
  options_.engine.collective_timeout = absl::Seconds(60);
  ExpectUndisturbed(Run({.after_all_to_all =
                             [&](void*, int64_t) {
                               if (++calls == kPreflightAllToAlls + 5 * kAllToAllsPerStep) gate.Wait();
                             }},
                        [&] { gate.Open(); }));
  ExpectOnlyVictimReplaced();
}

// Nobody is there to take the rank: the loop waits, and what is being done can be read.
TEST_F(RecoveryTest, WhileARankIsMissingItsStateSaysSo) {
  std::atomic<int> calls = 0;
  auto cluster = CreateWithVictimThatFails(calls, 60);
  ASSERT_EQ(cluster.status(), absl::OkStatus());
  Engine& engine = **cluster;
  for (const RankStatus& rank : engine.Ranks()) EXPECT_EQ(rank.state, RankState::kReady);
  EXPECT_TRUE(absl::IsFailedPrecondition(engine.Recover(absl::ZeroDuration()).status()));
  absl::Status failed;
  int64_t step = 0;
  while (failed.ok()) {
    StepPlan plan{.step = ++step, .homes = std::vector<HomePlan>(kRanks, HomePlan(HomePlanParts{}, step, 0, 0))};
    failed = engine.Submit(std::move(plan));
    if (failed.ok()) failed = engine.Await().status();
  }
  EXPECT_TRUE(absl::IsUnavailable(failed)) << failed.ToString();
  EXPECT_NE(failed.message().find("rank 2"), std::string::npos) << failed.ToString();
  EXPECT_TRUE(absl::IsUnavailable(engine.Await().status()));
  const auto waiting = engine.Recover(absl::Milliseconds(300));
  EXPECT_TRUE(absl::IsDeadlineExceeded(waiting.status()));
  EXPECT_NE(waiting.status().message().find("rank 2 lost"), std::string::npos) << waiting.status().ToString();
  const RankStatus victim = engine.Ranks()[kVictim];
  EXPECT_EQ(victim.state, RankState::kLost);
  EXPECT_NE(victim.message.find("waiting for a worker to take its place"), std::string::npos) << victim.message;
  EXPECT_NE(victim.message.find("the device has failed"), std::string::npos) << victim.message;
  EXPECT_EQ(engine.Ranks()[0].state, RankState::kReady);

  workers_.Start(workers_.Options(leader_, kVictim));
  const auto recovery = engine.Recover(absl::Seconds(20));
  ASSERT_EQ(recovery.status(), absl::OkStatus());
  EXPECT_EQ(recovery->home_kept, (std::vector<bool>{true, true, false, true}));
  EXPECT_GT(recovery->next_step, 1);
  StepPlan plan{.step = recovery->next_step,
                .homes = std::vector<HomePlan>(kRanks, HomePlan(HomePlanParts{}, recovery->next_step, 0, 0))};
  EXPECT_EQ(engine.Submit(std::move(plan)), absl::OkStatus());
  EXPECT_EQ(engine.Await().status(), absl::OkStatus());
}

}  // namespace
}  // namespace soloist
