// The real engine with hardly any dispatch room: steps overflow and are run again, and every token and logit is, bit
// for bit, the one of the same engine with room for all.
#include <cstdio>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/replay.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/parity/engine_harness.h"

namespace soloist {
namespace {

using Kind = DispatchRoomOptions::Kind;

absl::StatusOr<std::unique_ptr<Engine>> CreateEngine(const EngineOptions& options, const DispatchRoomOptions& given) {
  DispatchRoomOptions room = given;
  ASSIGN_OR_RETURN(auto engine, CreateInProcessEngine(options, Clock::Real(), nullptr));
  room.masked_max_tokens = engine->Info().masked_max_tokens;
  return std::make_unique<ReplayEngine>(std::move(engine), room);
}

void ExpectSameBits(const std::vector<std::vector<Output>>& expected, const std::vector<std::vector<Output>>& actual) {
  ASSERT_EQ(expected.size(), actual.size());
  for (size_t r = 0; r < expected.size(); ++r) {
    ASSERT_EQ(expected[r].size(), actual[r].size());
    for (size_t i = 0; i < expected[r].size(); ++i) {
      EXPECT_EQ(expected[r][i].tokens, actual[r][i].tokens) << "request " << r;
      EXPECT_EQ(expected[r][i].top, actual[r][i].top) << "request " << r;
      EXPECT_EQ(expected[r][i].logits, actual[r][i].logits) << "request " << r;
    }
  }
}

class ReplayGoldenTest : public testing::TestWithParam<int> {};

TEST_P(ReplayGoldenTest, RoomForOneRow) {
  std::vector<Request> requests;
  std::ifstream file("models/tiny/golden/prompts.jsonl");
  for (std::string line; std::getline(file, line);) {
    const auto golden = nlohmann::json::parse(line);
    Request request;
    request.id = golden["name"];
    request.prompt = golden["ids"].get<std::vector<int32_t>>();
    request.sampling.ignore_eos = true;
    request.sampling.max_tokens = static_cast<int32_t>(golden["greedy"].size());
    request.sampling.return_logits = true;
    requests.push_back(std::move(request));
  }
  ASSERT_EQ(requests.size(), 24u);
  const EngineOptions options{.model_dir = "models/tiny", .num_ranks = GetParam(), .masked_max_tokens = 512};
  std::vector<std::vector<Output>> worst;
  for (const Kind kind : {Kind::kWorst, Kind::kFixed}) {
    Harness harness(CreateEngine(options, {.kind = kind, .rows = 1}), {});
    ASSERT_TRUE(harness.ok());
    const auto outputs = harness.Run(requests);
    const LoadSnapshot load = harness.loop().Load();
    if (kind == Kind::kWorst) {
      worst = outputs;
      EXPECT_EQ(load.replays, 0);
      continue;
    }
    ExpectSameBits(worst, outputs);
    EXPECT_GT(load.replays, 0);
    std::printf("%d ranks: 24 goldens equal bit for bit; %ld steps, %ld run in vain\n", GetParam(), load.steps,
                load.replays);
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, ReplayGoldenTest, testing::Values(4, 16), testing::PrintToStringParamName());

// 16 KiB from rank to rank, of one expert or of four.
TEST(MaskedMaxTokensTest, FollowsTheBytes) {
  ModelConfig config = LoadModelConfig("models/tiny").value();
  const auto tokens = [&](int ranks, int64_t given, const char* device) {
    EngineOptions options{.num_ranks = ranks, .masked_max_tokens = given};
    options.device.kind = device;
    return MaskedMaxTokens(options, config, PlaceExperts(options, config, ranks).value());
  };
  EXPECT_EQ(config.hidden_size, 256);
  EXPECT_EQ(tokens(16, -1, "cpu"), 16);
  EXPECT_EQ(tokens(4, -1, "cpu"), 4);
  config.hidden_size = 128;
  EXPECT_EQ(tokens(16, -1, "cpu"), 64) << "32 rows, of up to so many tokens";
  EXPECT_EQ(tokens(4, -1, "cpu"), 8);
  config.hidden_size = 8192;
  EXPECT_EQ(tokens(16, -1, "cpu"), 0);
  EXPECT_EQ(tokens(4, -1, "cuda"), 64);
  EXPECT_EQ(tokens(4, 0, "cpu"), 0);
  EXPECT_EQ(tokens(4, 100, "cuda"), 100);
}

std::vector<Request> MixedRequests(uint32_t seed, int32_t vocab_size) {
  std::mt19937 random(seed);
  const auto token = [&] { return static_cast<int32_t>(random() % static_cast<uint32_t>(vocab_size)); };
  std::vector<int32_t> shared(60);
  for (int32_t& id : shared) id = token();
  std::vector<Request> requests;
  for (int i = 0; i < 40; ++i) {
    Request request;
    request.id = "r" + std::to_string(i);
    if (i % 3 == 1) request.prompt = shared;
    for (int own = 1 + static_cast<int>(random() % 50); own > 0; --own) request.prompt.push_back(token());
    SamplingParams& s = request.sampling;
    s.max_tokens = 6 + static_cast<int32_t>(random() % 12);
    s.ignore_eos = true;
    s.return_logits = true;
    s.temperature = i % 2 == 0 ? 0.0f : 0.9f;
    s.seed = 1000 + static_cast<uint64_t>(i);
    if (i % 3 == 0) s.repetition_penalty = 1.3f;
    if (i % 5 == 0) s.presence_penalty = 0.5f, s.frequency_penalty = 0.25f;
    if (i % 7 == 0) s.top_k = 40, s.top_p = 0.9f;
    if (i % 6 == 0) s.num_top_logprobs = 3;
    request.num_outputs = i % 8 == 0 ? 2 : 1;
    requests.push_back(std::move(request));
  }
  return requests;
}

// Random models, whose routers are as they come: little room, room that grows, and what is left of it under preemption
// and with few blocks.
TEST(ReplayParityTest, RandomModelsSampledWithPenalties) {
  for (const uint64_t seed : {1, 2}) {
    const std::vector<Request> requests = MixedRequests(static_cast<uint32_t>(seed), 512);
    EngineOptions options{
        .model_dir = "models/paper16-small", .load_format = "dummy", .dummy_seed = seed, .num_ranks = 4};
    options.masked_max_tokens = 64;
    options.max_tokens_per_step = 64;
    options.max_sequences = 64;
    options.max_model_len = 256;
    options.num_blocks = 60;
    std::vector<std::vector<Output>> worst;
    for (const DispatchRoomOptions& room : {DispatchRoomOptions{.kind = Kind::kWorst},
                                            {.kind = Kind::kFixed, .rows = 1},
                                            {.kind = Kind::kFixed, .rows = 9},
                                            {.kind = Kind::kAuto}}) {
      for (const int preempt_every : {0, 4}) {
        Harness harness(CreateEngine(options, room), {.force_preempt_every = preempt_every});
        ASSERT_TRUE(harness.ok());
        const auto outputs = harness.Run(requests);
        if (worst.empty()) worst = outputs;
        ExpectSameBits(worst, outputs);
        const LoadSnapshot load = harness.loop().Load();
        std::printf(
            "seed %lu, room kind %d, %d rows, preemption every %d: equal; %ld steps, %ld run in vain, %ld "
            "preemptions\n",
            seed, static_cast<int>(room.kind), room.rows, preempt_every, load.steps, load.replays, load.preemptions);
        if (room.kind == Kind::kWorst) {
          EXPECT_EQ(load.replays, 0);
        }
        if (room.kind == Kind::kFixed && room.rows == 1) {
          EXPECT_GT(load.replays, 10);
        }
      }
    }
  }
}

}  // namespace
}  // namespace soloist
