// Two micro-batches give the bits of one: on any number of ranks, in both dispatch layouts, with prompts in chunks
// beside decodes, with and without the prefix cache, after preemption, and where a step of two overflows and is run
// again.
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/replay.h"
#include "gtest/gtest.h"
#include "tests/parity/engine_harness.h"

namespace soloist {
namespace {

struct Seen {
  int64_t steps = 0, split = 0, inside_a_chunk = 0, comm_ns = 0;
};

// Passes everything on and looks at it.
class WatchedEngine final : public Engine {
 public:
  WatchedEngine(std::unique_ptr<Engine> engine, Seen& seen) : engine_(std::move(engine)), seen_(seen) {}
  const EngineInfo& Info() const override { return engine_->Info(); }
  absl::Status Submit(StepPlan plan) override {
    ++seen_.steps;
    seen_.split += plan.homes[0].is_split() ? 1 : 0;
    for (const HomePlan& home : plan.homes) {
      const auto starts = home.query_starts();
      if (home.is_split() && std::ranges::find(starts, home.second_begin()) == starts.end()) ++seen_.inside_a_chunk;
    }
    return engine_->Submit(std::move(plan));
  }
  absl::StatusOr<StepResult> Await() override {
    auto result = engine_->Await();
    if (result.ok()) {
      for (const HomeResult& home : result->homes) seen_.comm_ns += home.comm_ns;
    }
    return result;
  }
  absl::StatusOr<Recovery> Recover(absl::Duration timeout) override { return engine_->Recover(timeout); }
  std::vector<RankStatus> Ranks() const override { return engine_->Ranks(); }

 private:
  const std::unique_ptr<Engine> engine_;
  Seen& seen_;
};

std::vector<Request> MixedRequests(int32_t vocab_size) {
  std::mt19937 random(3);
  const auto token = [&] { return static_cast<int32_t>(random() % static_cast<uint32_t>(vocab_size)); };
  std::vector<int32_t> shared(70);
  for (int32_t& id : shared) id = token();
  std::vector<Request> requests;
  for (int i = 0; i < 14; ++i) {
    Request request;
    request.id = "r" + std::to_string(i);
    if (i % 4 == 1) request.prompt = shared;
    for (int own = i % 5 == 3 ? 150 : 1 + static_cast<int>(random() % 40); own > 0; --own) {
      request.prompt.push_back(token());
    }
    SamplingParams& s = request.sampling;
    s.max_tokens = 4 + static_cast<int32_t>(random() % 6);
    s.ignore_eos = true;
    s.return_logits = true;
    s.temperature = i % 2 == 0 ? 0.0f : 0.9f;
    s.seed = 1000 + static_cast<uint64_t>(i);
    if (i % 3 == 0) s.repetition_penalty = 1.3f;
    requests.push_back(std::move(request));
  }
  return requests;
}

struct Config {
  std::string name;
  EngineOptions engine;
  SchedulerOptions scheduler;
  DispatchRoomOptions room;
};

void Compare(const std::string& model, const std::string& load_format, int32_t vocab_size) {
  std::vector<Config> configs;
  const auto add = [&](const std::string& name, int ranks) -> Config& {
    Config config{.name = name, .engine = {.model_dir = model, .load_format = load_format}};
    config.engine.num_ranks = ranks;
    config.engine.max_tokens_per_step = 96;
    config.engine.max_sequences = 32;
    config.engine.max_model_len = 256;
    config.engine.num_blocks = 160;
    config.scheduler.micro_batches = MicroBatches::kTwo;
    config.room.kind = DispatchRoomOptions::Kind::kWorst;
    configs.push_back(std::move(config));
    return configs.back();
  };
  add("1 rank, one micro-batch", 1).scheduler.micro_batches = MicroBatches::kOne;
  add("1 rank", 1);
  add("2 ranks, no prefix cache", 2).scheduler.prefix_cache = false;
  add("4 ranks", 4);
  add("16 ranks", 16);
  add("4 ranks, contiguous dispatch only", 4).engine.masked_max_tokens = 0;
  Config& placed = add("4 ranks, uneven placement, preemption", 4);
  placed.engine.expert_rank = {3, 0, 0, 2, 1, 3, 3, 0, 1, 1, 0, 3, 3, 2, 0, 1};
  placed.scheduler.force_preempt_every = 3;
  Config& little_room = add("4 ranks, masked dispatch only, room for one row", 4);
  little_room.engine.masked_max_tokens = 96;
  little_room.room = {.kind = DispatchRoomOptions::Kind::kFixed, .rows = 1};

  std::vector<std::vector<Output>> reference;
  const std::vector<Request> requests = MixedRequests(vocab_size);
  for (const Config& config : configs) {
    auto engine = CreateInProcessEngine(config.engine, Clock::Real(), nullptr);
    ASSERT_EQ(engine.status(), absl::OkStatus());
    DispatchRoomOptions room = config.room;
    room.masked_max_tokens = (*engine)->Info().masked_max_tokens;
    Seen seen;
    Harness harness(std::make_unique<WatchedEngine>(std::make_unique<ReplayEngine>(*std::move(engine), room), seen),
                    config.scheduler);
    ASSERT_TRUE(harness.ok());
    const auto outputs = harness.Run(requests);
    if (reference.empty()) reference = outputs;
    ASSERT_EQ(outputs.size(), reference.size());
    for (size_t r = 0; r < outputs.size(); ++r) {
      EXPECT_EQ(outputs[r][0].tokens, reference[r][0].tokens) << config.name << " request " << r;
      EXPECT_EQ(outputs[r][0].logits, reference[r][0].logits) << config.name << " request " << r;
    }
    const LoadSnapshot load = harness.loop().Load();
    std::printf("%s: equal; %ld steps, %ld of two micro-batches (%ld times inside a chunk), %ld run in vain\n",
                config.name.c_str(), seen.steps, seen.split, seen.inside_a_chunk, load.replays);
    const bool two = config.scheduler.micro_batches == MicroBatches::kTwo;
    EXPECT_EQ(seen.split > 2, two) << config.name;
    EXPECT_EQ(seen.inside_a_chunk > 0, two) << config.name;
    EXPECT_EQ(seen.comm_ns > 0, config.engine.num_ranks > 1) << config.name;
    EXPECT_EQ(load.replays > 3, config.room.kind == DispatchRoomOptions::Kind::kFixed) << config.name;
  }
}

TEST(OverlapTest, Mixtral) { Compare("models/tiny", "auto", 4096); }

TEST(OverlapTest, TwoMatrixGelu) { Compare("models/paper16-small", "dummy", 512); }

}  // namespace
}  // namespace soloist
