// Random loads whose steps overflow at random, with two plans in flight, penalties, a prefix cache, cancellations,
// preemption and lost ranks: the tokens are those of the unbatched reference.
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/replay/overflowing_engine.h"
#include "tests/scheduler/testing.h"

namespace soloist {
namespace {

struct Totals {
  int64_t tokens = 0, steps = 0, overflows = 0, replays = 0, preemptions = 0, hits = 0, cancels = 0, losses = 0;
};

// Scheduler over a ReplayEngine, as the step loop drives them.
class World {
 public:
  World(uint64_t seed, const SchedulerOptions& options, SimulatedOptions simulated, int overflow_percent, int depth)
      : options_(options), random_(seed), depth_(depth) {
    auto inner = std::make_unique<OverflowingEngine>(std::move(simulated), [this, overflow_percent](const StepPlan&) {
      return static_cast<int>(random_() % 100) < overflow_percent;
    });
    inner_ = inner.get();
    engine_ = std::make_unique<ReplayEngine>(std::move(inner),
                                             DispatchRoomOptions{.kind = DispatchRoomOptions::Kind::kFixed, .rows = 1});
    scheduler_ = std::make_unique<Scheduler>(options, engine_->Info());
  }

  void Add(Request request) {
    auto sink = std::make_shared<RecordingSink>(request.num_outputs);
    request.sink = sink;
    ASSERT_EQ(CheckRequest(request, engine_->Info().limits), absl::OkStatus());
    sinks_[request.id] = std::move(sink);
    requests_[request.id] = request;
    scheduler_->Add(std::move(request), ++now_ns_);
  }
  void Cancel(const std::string& id) {
    cancelled_[id] = true;
    scheduler_->Cancel(id, -1, FinishReason::kCancelled);
    Deliver();
  }

  void Turn() {
    if (recovering_) return TryRecover();
    std::optional<StepPlan> plan;
    if (scheduler_->plans_in_flight() < depth_) plan = scheduler_->Schedule(++now_ns_);
    const bool submitted = plan.has_value();
    if (submitted && Lost(engine_->Submit(*std::move(plan)))) return;
    const int in_flight = scheduler_->plans_in_flight();
    if (in_flight < depth_ && (submitted || in_flight == 0)) return;
    absl::StatusOr<StepResult> result = engine_->Await();
    if (Lost(result.status())) return;
    EXPECT_EQ(result->step, ++last_step_ + skipped_);
    replays_ += result->replays;
    ++steps_;
    CHECK_OK(scheduler_->Commit(*result, now_ns_));
    Deliver();
  }
  void RunToEnd(int64_t max_turns) {
    while (scheduler_->num_requests() > 0 || scheduler_->plans_in_flight() > 0) {
      ASSERT_GT(max_turns--, 0);
      Turn();
    }
    EXPECT_EQ(scheduler_->CheckIntegrity(/*idle=*/true), absl::OkStatus());
    if (!engine_->Ranks().empty()) {
      EXPECT_LE(engine_->Ranks()[0].last_step, last_step_ + skipped_);
    }
  }

  int64_t ExpectReference() {
    int64_t compared = 0;
    for (const auto& [id, request] : requests_) {
      const auto outputs = sinks_.at(id)->outputs();
      ExpectScores(request, *sinks_.at(id), engine_->Info().limits.vocab_size);
      for (int i = 0; i < request.num_outputs; ++i) {
        Reference reference = ReferenceRun(request, i, options_.eos_token_ids, engine_->Info().limits.vocab_size);
        EXPECT_EQ(outputs[i].num_finishes, 1);
        if (outputs[i].finish.reason == FinishReason::kCancelled) {
          EXPECT_TRUE(cancelled_[id]);
          reference.tokens.resize(std::min(reference.tokens.size(), outputs[i].tokens.size()));
        }
        EXPECT_EQ(outputs[i].tokens, reference.tokens) << id << " output " << i;
        compared += std::ssize(reference.tokens);
      }
    }
    return compared;
  }

  void AddTo(Totals& totals) {
    const LoadSnapshot load = scheduler_->Load();
    totals.steps += steps_;
    totals.overflows += inner_->overflows;
    totals.replays += replays_;
    totals.preemptions += load.preemptions;
    totals.hits += load.prefix_cache_hits;
    totals.losses += load.recoveries;
    totals.cancels += std::ssize(cancelled_);
    EXPECT_EQ(load.replays, replays_);
  }
  const Scheduler& scheduler() const { return *scheduler_; }

 private:
  bool Lost(const absl::Status& status) {
    recovering_ = absl::IsUnavailable(status);
    if (!recovering_) CHECK_OK(status);
    return recovering_;
  }
  void TryRecover() {
    const absl::StatusOr<Recovery> recovery = engine_->Recover(absl::ZeroDuration());
    if (absl::IsDeadlineExceeded(recovery.status())) return;
    CHECK_OK(recovery.status());
    recovering_ = false;
    skipped_ = recovery->next_step - last_step_ - 1;
    CHECK_OK(scheduler_->Recover(*recovery));
  }
  void Deliver() {
    for (OutputEvent& event : scheduler_->TakeEvents()) soloist::Deliver(std::move(event));
  }

  const SchedulerOptions options_;
  std::mt19937_64 random_;
  const int depth_;
  OverflowingEngine* inner_ = nullptr;
  std::unique_ptr<ReplayEngine> engine_;
  std::unique_ptr<Scheduler> scheduler_;
  std::map<std::string, Request> requests_;
  std::map<std::string, std::shared_ptr<RecordingSink>> sinks_;
  std::map<std::string, bool> cancelled_;
  int64_t now_ns_ = 1, last_step_ = 0, skipped_ = 0, steps_ = 0, replays_ = 0;
  bool recovering_ = false;
};

void RunWorld(uint64_t seed, bool tight, bool losses, Totals& totals) {
  std::mt19937_64 random(seed);
  const auto below = [&random](int n) { return static_cast<int32_t>(random() % static_cast<uint64_t>(n)); };
  const int32_t block_size = 1 << below(4);
  const int32_t num_blocks = (tight ? 1 + below(12) : 30 + below(100)) * 8 / block_size + 1;
  SimulatedOptions simulated;
  simulated.num_homes = 2 << below(3);
  simulated.limits = TestLimits(num_blocks, block_size);
  std::mt19937_64 lost(seed + 1);
  const int homes = simulated.num_homes;
  if (losses) {
    simulated.lose = [&lost, homes](int64_t, bool) -> std::optional<SimulatedLoss> {
      if (lost() % 12 != 0) return std::nullopt;
      SimulatedLoss loss;
      if (lost() % 2 == 0) loss.homes = {static_cast<int>(lost() % homes)};
      return loss;
    };
  }
  SchedulerOptions options;
  options.max_tokens_per_step = 1 + below(40);
  options.max_sequences = 1 + below(16);
  options.prefix_cache = below(3) != 0;
  options.eos_token_ids = {3, 50};
  options.force_preempt_every = below(2) == 0 ? 1 + below(7) : 0;
  World world(seed, options, simulated, /*overflow_percent=*/below(3) == 0 ? 100 : 25, below(4) == 0 ? 1 : 2);
  const int32_t longest = std::min(num_blocks * block_size, 80);
  const int num_requests = 5 + below(15);
  int64_t work = 0;
  std::vector<std::string> ids;
  while (std::ssize(ids) < num_requests) {
    Request request = RandomRequest(random, "r" + std::to_string(ids.size()), simulated.limits, longest);
    work += static_cast<int64_t>(request.num_outputs) * (std::ssize(request.prompt) + request.sampling.max_tokens);
    ids.push_back(request.id);
    world.Add(std::move(request));
    if (below(6) == 0) world.Cancel(ids[below(static_cast<int>(ids.size()))]);
    for (int turns = below(6); turns > 0; --turns) world.Turn();
    ASSERT_EQ(world.scheduler().CheckIntegrity(false), absl::OkStatus());
  }
  world.RunToEnd(1000 + 200 * work);
  totals.tokens += world.ExpectReference();
  world.AddTo(totals);
}

void RunWorlds(const char* name, int count, bool tight, bool losses) {
  Totals t;
  for (int i = 0; i < count; ++i) {
    SCOPED_TRACE("world " + std::to_string(i));
    RunWorld(5000 + i, tight, losses, t);
    if (testing::Test::HasFailure()) break;
  }
  std::printf(
      "%s: %ld tokens equal the reference; %ld steps, %ld overflowed, %ld were run again; "
      "%ld preemptions, %ld cancelled, %ld losses, %ld tokens from the prefix cache\n",
      name, t.tokens, t.steps, t.overflows, t.replays, t.preemptions, t.cancels, t.losses, t.hits);
  EXPECT_GT(t.overflows, 0);
  EXPECT_GT(t.preemptions, 0);
  EXPECT_GT(t.hits, 0);
  EXPECT_GT(t.cancels, 0);
  EXPECT_EQ(t.losses > 0, losses);
}

TEST(ReplayProperty, TightPools) { RunWorlds("tight pools", 400, true, false); }
TEST(ReplayProperty, RoomyPools) { RunWorlds("roomy pools", 150, false, false); }
TEST(ReplayProperty, LostRanks) { RunWorlds("lost ranks", 300, true, true); }

}  // namespace
}  // namespace soloist
