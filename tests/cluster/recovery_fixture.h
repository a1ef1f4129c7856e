// What the tests of lost ranks have in common: eight requests on a cluster of four worker threads, some of which
// misbehave, and what Recover says meanwhile.
#ifndef SOLOIST_TESTS_CLUSTER_RECOVERY_FIXTURE_H_
#define SOLOIST_TESTS_CLUSTER_RECOVERY_FIXTURE_H_

#include <atomic>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/cluster/cluster_engine.h"
#include "gtest/gtest.h"
#include "tests/cluster/comm_wrapper.h"
#include "tests/cluster/thread_cluster.h"
#include "tests/parity/engine_harness.h"

namespace soloist {

inline constexpr char kModelDir[] = "models/tiny";
inline constexpr int kRanks = 4;
inline constexpr int kVictim = 2;
inline constexpr int kPreflightAllToAlls = 1;
inline constexpr int kAllToAllsPerStep = 2 * 6;  // masked: there and back, of each layer of the bundled model

inline EngineOptions Options(int ranks) {
  EngineOptions options{.model_dir = kModelDir, .num_ranks = ranks};
  options.max_tokens_per_step = 64;
  options.max_sequences = 16;
  options.max_model_len = 256;
  options.num_blocks = 128;
  options.masked_max_tokens = 64;
  options.collective_timeout = absl::Seconds(2);
  return options;
}

// Eight streams, greedy and seeded.
inline std::vector<Request> Requests() {
  std::vector<Request> requests;
  for (int i = 0; i < 8; ++i) {
    Request request;
    request.id = "r" + std::to_string(i);
    for (int t = 0; t < 4 + 9 * i; ++t) request.prompt.push_back((i * 131 + t * 17) % 4000);
    request.sampling = {.temperature = i % 2 == 0 ? 0.0f : 0.9f, .seed = 5, .max_tokens = 40, .ignore_eos = true};
    requests.push_back(std::move(request));
  }
  return requests;
}

// What Recover said, and which rank had which expert then.
struct Recovered : Recovery {
  std::vector<int> expert_rank;
};

// Passes everything on and keeps what Recover said.
class RecordingEngine final : public Engine {
 public:
  RecordingEngine(std::unique_ptr<Engine> engine, std::vector<Recovered>& recoveries)
      : engine_(std::move(engine)), recoveries_(recoveries) {}
  const EngineInfo& Info() const override { return engine_->Info(); }
  absl::Status Submit(StepPlan plan) override { return engine_->Submit(std::move(plan)); }
  absl::StatusOr<StepResult> Await() override { return engine_->Await(); }
  absl::StatusOr<Recovery> Recover(absl::Duration timeout) override {
    auto recovery = engine_->Recover(timeout);
    if (recovery.ok()) recoveries_.push_back({*recovery, Info().expert_rank});
    return recovery;
  }
  std::vector<RankStatus> Ranks() const override { return engine_->Ranks(); }

 private:
  const std::unique_ptr<Engine> engine_;
  std::vector<Recovered>& recoveries_;
};

// Not its communicator's fault, so the worker cannot go on.
inline Misbehaviour FailsOnce(std::atomic<int>& calls, int at) {
  return {.before_all_to_all = [&calls, at](Communicator&) {
    return ++calls == at ? absl::InternalError("the device has failed") : absl::OkStatus();
  }};
}

class RecoveryTest : public testing::Test {
 protected:
  // Runs the requests on a cluster whose victim's communicators misbehave as `how`.
  std::vector<std::vector<Output>> Run(const Misbehaviour& how, const std::function<void()>& at_end = nullptr) {
    return RunAll({{kVictim, how}}, [&](Harness&) {
      if (at_end) at_end();
    });
  }
  // The same with several victims; `then` has more to ask of it.
  std::vector<std::vector<Output>> RunAll(const std::map<int, Misbehaviour>& how,
                                          const std::function<void(Harness&)>& then) {
    options_.engine = Options(kRanks);
    options_.version = kTestVersion;
    options_.start_timeout = absl::Seconds(30);
    options_.on_listening = [this, how](const std::string& leader) {
      leader_ = leader;
      for (int r = 0; r < kRanks; ++r) {
        WorkerProcessOptions options = workers_.Options(leader, r);
        if (how.contains(r)) options.make_comm = Wrapped(options.make_comm, how.at(r));
        if (model_of_) options.model_dir = model_of_(r);
        workers_.Start(options);
      }
      return absl::OkStatus();
    };
    std::vector<std::vector<Output>> outputs;
    auto cluster = CreateClusterEngine(options_, Clock::Real(), nullptr);
    EXPECT_EQ(cluster.status(), absl::OkStatus());
    if (!cluster.ok()) return outputs;
    {
      Harness harness(std::make_unique<RecordingEngine>(*std::move(cluster), recoveries_), scheduler_);
      const absl::Time begin = absl::Now();
      outputs = harness.Run(Requests());
      std::printf("%zu recoveries, all requests in %.2f s\n", recoveries_.size(),
                  absl::ToDoubleSeconds(absl::Now() - begin));
      then(harness);
    }
    workers_.Join();
    return outputs;
  }
  // A cluster whose victim fails in its all-to-all number `at`; `calls` counts them. For who steps it by hand.
  absl::StatusOr<std::unique_ptr<ClusterEngine>> CreateWithVictimThatFails(std::atomic<int>& calls, int at) {
    options_.engine = Options(kRanks);
    options_.version = kTestVersion;
    options_.on_listening = [this, &calls, at](const std::string& leader) {
      leader_ = leader;
      for (int r = 0; r < kRanks; ++r) {
        WorkerProcessOptions options = workers_.Options(leader, r);
        if (r == kVictim) options.make_comm = Wrapped(options.make_comm, FailsOnce(calls, at));
        workers_.Start(options);
      }
      return absl::OkStatus();
    };
    return CreateClusterEngine(options_, Clock::Real(), nullptr);
  }
  // A worker that is as it should be, as any rank.
  void ReplaceLost() {
    options_.on_lost = [this](const std::string&, int64_t) { workers_.Start(workers_.Options(leader_, -1)); };
  }
  static void ExpectUndisturbed(const std::vector<std::vector<Output>>& outputs) {
    Harness one(Options(1), {});
    ASSERT_TRUE(one.ok());
    const auto expected = one.Run(Requests());
    ASSERT_EQ(outputs.size(), expected.size());
    for (size_t r = 0; r < outputs.size(); ++r) {
      EXPECT_EQ(outputs[r][0].tokens, expected[r][0].tokens) << "request " << r;
      EXPECT_EQ(outputs[r][0].finish.reason, FinishReason::kLength) << outputs[r][0].finish.error.ToString();
    }
  }
  void ExpectOnlyVictimReplaced() const {
    ASSERT_EQ(recoveries_.size(), 1u);
    for (int h = 0; h < kRanks; ++h) EXPECT_EQ(recoveries_[0].home_kept[h], h != kVictim) << h;
  }

  ClusterOptions options_;
  SchedulerOptions scheduler_;
  ThreadWorkers workers_;
  std::string leader_;
  std::vector<Recovered> recoveries_;
  std::function<std::string(int rank)> model_of_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_CLUSTER_RECOVERY_FIXTURE_H_
