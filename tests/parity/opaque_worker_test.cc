// A worker on a device whose memory the host cannot touch gives the same results, bit for bit, as on the CPU's own:
// prompts in chunks beside decodes, tokens taken from the step before, penalties, biases, log-probabilities and logits.
#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "engine/model/config.h"
#include "engine/model/device_weights.h"
#include "engine/model/weights.h"
#include "engine/worker/worker.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/kernels/opaque_device.h"

namespace soloist {
namespace {

constexpr int kBlockSize = 8, kBlocks = 4;  // of a sequence
constexpr int64_t kMaxTokens = 64;

struct Rank {
  Rank(const ModelConfig& config, const WeightSource& source, bool opaque, int64_t masked_max_tokens,
       bool captures = false, int loopback_ranks = 0, std::shared_ptr<TraceWriter> trace = nullptr) {
    factory = CreateDeviceFactory({.kind = "cpu", .cpu_threads = 2}).value();
    auto device = factory->CreateDevice(0).value();
    if (opaque) device = CreateOpaqueDevice(std::move(device), captures);
    of_worker = device.get();
    LoadProgress progress;
    std::vector<int> all(config.num_experts);
    std::iota(all.begin(), all.end(), 0);
    shared = LoadSharedWeights(config, source, 256, *device, 2, progress).value();
    std::vector<int> expert_rank(all.size(), 0), local = all;
    if (loopback_ranks > 0) {
      for (size_t e = 0; e < all.size(); ++e) expert_rank[e] = static_cast<int>(e) * loopback_ranks / std::ssize(all);
      local.resize(all.size() / loopback_ranks);
    }
    ExpertWeights experts = LoadExpertWeights(config, source, local, *device, 2, progress).value();
    auto comm = CreateSelfCommunicator(*device);
    const PlanLimits limits{.vocab_size = static_cast<int32_t>(config.vocab_size),
                            .max_model_len = kBlockSize * kBlocks,
                            .num_blocks = 3 * kBlocks,
                            .block_size = kBlockSize,
                            .max_tokens = kMaxTokens,
                            .max_sequences = 3};
    worker = Worker::Create(config,
                            {.limits = limits,
                             .masked_max_tokens = masked_max_tokens,
                             .expert_rank = expert_rank,
                             .loopback_ranks = loopback_ranks,
                             .profile_every = trace != nullptr ? 2 : 0,
                             .trace = std::move(trace)},
                            shared, std::move(experts), std::move(device), std::move(comm))
                 .value();
  }
  std::unique_ptr<DeviceFactory> factory;
  Device* of_worker = nullptr;
  SharedWeights shared;
  std::unique_ptr<Worker> worker;
};

// Adds `tokens` of sequence s, from `position` on, and a row of logits for the last.
void AddSequence(HomePlanParts& parts, int s, int position, const std::vector<int32_t>& tokens) {
  if (parts.query_starts.empty()) parts.query_starts = {0};
  for (const int32_t token : tokens) {
    parts.token_ids.push_back(token);
    parts.positions.push_back(position);
    parts.slot_mapping.push_back((s * kBlocks + position / kBlockSize) * kBlockSize + position % kBlockSize);
    ++position;
  }
  parts.query_starts.push_back(static_cast<int32_t>(parts.token_ids.size()));
  parts.seq_lens.push_back(position);
  parts.max_blocks = kBlocks;
  // Blocks beyond the keys are padding.
  for (int b = 0; b < kBlocks; ++b) {
    parts.block_tables.push_back(b * kBlockSize < position ? s * kBlocks + b : 0);
  }
  parts.logit_rows.push_back(static_cast<int32_t>(parts.token_ids.size()) - 1);
  SamplingRow row;
  row.temperature = s == 1 ? 0.8f : 0.0f;
  row.seed_low = 5;
  row.position = position;
  row.bias_begin = static_cast<int32_t>(parts.bias.size());
  row.history_begin = static_cast<int32_t>(parts.history.size());
  if (s == 0) {
    row.num_top_logprobs = 4;
    parts.bias.push_back({11, -HUGE_VALF});
  }
  if (s == 1) {
    row.repetition_penalty = 1.5f;
    parts.history.insert(parts.history.end(), {{7, 1}, {9, 0}});
  }
  row.return_logits = s == 2 ? 1 : 0;
  parts.sampling.push_back(row);
}

std::vector<HomePlan> Plans() {
  std::vector<HomePlan> plans;
  const auto add = [&](const HomePlanParts& parts, int32_t previous_rows) {
    const auto tokens = static_cast<int32_t>(parts.token_ids.size());
    plans.emplace_back(parts, std::ssize(plans) + 1, tokens, previous_rows);
  };
  HomePlanParts first, second, third;
  AddSequence(first, 0, 0, {1, 2, 3, 4, 5, 6, 7, 8, 9});
  AddSequence(first, 1, 0, {20, 21, 22});
  add(first, 0);
  AddSequence(second, 1, 3, {-2});  // row 1 of the first step
  AddSequence(second, 0, 9, {-1});
  AddSequence(second, 2, 0, std::vector<int32_t>(20, 33));
  add(second, 2);
  add(HomePlanParts{}, 3);
  AddSequence(third, 2, 20, {4});
  add(third, 0);
  return plans;
}

TEST(OpaqueWorkerTest, SameBitsAsOnTheHost) {
  for (const char* model : {"models/tiny", "models/paper16-small"}) {
    const ModelConfig config = LoadModelConfig(model).value();
    const auto source = CreateDummySource(config, 17).value();
    for (const int64_t masked_max_tokens : {int64_t{0}, kMaxTokens}) {
      Rank plain(config, *source, /*opaque=*/false, masked_max_tokens);
      Rank opaque(config, *source, /*opaque=*/true, masked_max_tokens);
      for (const HomePlan& plan : Plans()) {
        const auto expected = plain.worker->Execute(plan), result = opaque.worker->Execute(plan);
        ASSERT_EQ(expected.status(), absl::OkStatus());
        ASSERT_EQ(result.status(), absl::OkStatus());
        EXPECT_EQ(std::ssize(result->tokens), plan.num_logit_rows());
        EXPECT_EQ(result->tokens, expected->tokens);
        EXPECT_EQ(result->logprobs, expected->logprobs);
        EXPECT_EQ(result->top_tokens, expected->top_tokens);
        EXPECT_EQ(result->top_logprobs, expected->top_logprobs);
        EXPECT_EQ(result->raw_logits, expected->raw_logits);
        EXPECT_EQ(result->expert_rows, expected->expert_rows);
        EXPECT_EQ(std::accumulate(result->expert_rows.begin(), result->expert_rows.end(), int64_t{0}),
                  plan.num_tokens() * config.experts_per_token * config.num_layers);
      }
    }
  }
}

// A device's trace: the wait for each step, whole steps, and the groups of every second one.
TEST(OpaqueWorkerTest, TraceOfADevice) {
  const ModelConfig config = LoadModelConfig("models/tiny").value();
  const auto source = CreateDummySource(config, 17).value();
  const std::string path = testing::TempDir() + "/device_trace.json";
  {
    Rank rank(config, *source, /*opaque=*/true, kMaxTokens, /*captures=*/false, /*loopback_ranks=*/0,
              TraceWriter::Open(path).value());
    for (const HomePlan& plan : Plans()) ASSERT_EQ(rank.worker->Execute(plan).status(), absl::OkStatus());
  }
  std::ifstream file(path);
  std::map<std::pair<std::string, int>, std::vector<int>> steps;  // by name and track
  const auto events = nlohmann::json::parse(file);
  for (const auto& event : events) {
    if (event["ph"] == "X") steps[{event["name"], event["tid"]}].push_back(event["args"]["step"]);
  }
  EXPECT_EQ((steps[{"submit", 0}]), std::vector<int>({1, 2, 3, 4}));
  EXPECT_EQ((steps[{"wait_for_device", 3}]), std::vector<int>({1, 2, 3, 4}));
  EXPECT_EQ((steps[{"step", 1}]), std::vector<int>({1, 3}));
  EXPECT_EQ((steps[{"sample", 1}]), std::vector<int>({2, 4}));
  EXPECT_EQ(std::ssize(steps[{"attention", 1}]), 2 * config.num_layers);
  EXPECT_EQ(std::ssize(steps[{"dispatch", 2}]), 2 * config.num_layers);
  EXPECT_EQ(std::ssize(steps[{"combine", 2}]), 2 * config.num_layers);
}

// Decode steps as captured graphs, padded to buckets of 1 and 3 rows, give the bits that they give one by one; also
// after a recovery, whose warm-up finds sequences in the cache.
TEST(OpaqueWorkerTest, GraphsGiveTheSameBits) {
  const auto without_logits = [](HomePlanParts parts) {
    for (SamplingRow& row : parts.sampling) row.return_logits = 0;
    return parts;
  };
  std::vector<HomePlan> plans;
  const auto add = [&](const HomePlanParts& parts, int32_t previous_rows) {
    const auto tokens = static_cast<int32_t>(parts.token_ids.size());
    plans.emplace_back(without_logits(parts), std::ssize(plans) + 1, tokens, previous_rows);
  };
  HomePlanParts prompts, two, one, three, mixed;
  AddSequence(prompts, 0, 0, {1, 2, 3, 4, 5, 6, 7, 8, 9});
  AddSequence(prompts, 1, 0, {20, 21, 22});
  AddSequence(prompts, 2, 0, {30, 31, 32, 33});
  add(prompts, 0);
  AddSequence(two, 1, 3, {-2});
  AddSequence(two, 0, 9, {-1});
  add(two, 3);
  AddSequence(one, 0, 10, {-2});
  add(one, 2);
  add(HomePlanParts{}, 1);
  AddSequence(three, 2, 4, {5});
  AddSequence(three, 1, 4, {6});
  AddSequence(three, 0, 11, {7});
  add(three, 0);
  AddSequence(mixed, 0, 12, {-3});
  AddSequence(mixed, 1, 5, {8, 9});
  add(mixed, 3);

  // Alone, or as one of 16 with dispatch room for two rows of the bucket's three: then those graphs are captured when
  // they are first asked for.
  for (const auto& [model, ranks] : {std::pair("models/tiny", 0), std::pair("models/paper16-small", 0),
                                     std::pair("models/tiny", 16), std::pair("models/paper16-small", 16)}) {
    const ModelConfig config = LoadModelConfig(model).value();
    const auto source = CreateDummySource(config, 18).value();
    for (HomePlan& plan : plans) plan.Renumber(plan.step(), ranks > 0 ? 2 : 0);
    Rank plain(config, *source, /*opaque=*/false, kMaxTokens, /*captures=*/false, ranks);
    Rank graphs(config, *source, /*opaque=*/true, kMaxTokens, /*captures=*/true, ranks);
    int captured = 0;
    ASSERT_EQ(graphs.worker->WarmUp([&](int done, int all) {
      captured = done;
      EXPECT_EQ(all, 2);
    }),
              absl::OkStatus());
    EXPECT_EQ(captured, 2);
    const int64_t before = OpaqueGraphLaunches();
    for (const HomePlan& plan : plans) {
      if (plan.step() == 5) {  // names all its tokens
        ASSERT_EQ(graphs.worker->ReplaceCommunicator(CreateSelfCommunicator(*graphs.of_worker)), absl::OkStatus());
        ASSERT_EQ(graphs.worker->WarmUp(nullptr), absl::OkStatus());
      }
      const auto expected = plain.worker->Execute(plan), result = graphs.worker->Execute(plan);
      ASSERT_EQ(expected.status(), absl::OkStatus());
      ASSERT_EQ(result.status(), absl::OkStatus());
      EXPECT_EQ(result->tokens, expected->tokens) << "step " << plan.step();
      EXPECT_EQ(result->logprobs, expected->logprobs) << "step " << plan.step();
      EXPECT_EQ(result->top_tokens, expected->top_tokens) << "step " << plan.step();
      EXPECT_EQ(result->top_logprobs, expected->top_logprobs) << "step " << plan.step();
      EXPECT_EQ(result->expert_rows, expected->expert_rows) << "step " << plan.step();
      EXPECT_EQ(result->overflow_rows, expected->overflow_rows) << "step " << plan.step();
      if (ranks > 0 && plan.num_tokens() > 6) {
        EXPECT_GT(result->overflow_rows, 2) << "more rows than room";
      }
    }
    // Two rows, one, none, three; not the prompts and not the step with a chunk.
    EXPECT_EQ(OpaqueGraphLaunches() - before, 4);
  }
}

}  // namespace
}  // namespace soloist
