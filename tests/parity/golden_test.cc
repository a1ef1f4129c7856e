// The bundled model against Hugging Face transformers in float32 (models/tiny/golden, see MODEL_CARD.md): logits,
// router choices, greedy tokens.
#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>
#include <tuple>
#include <vector>

#include "base/status.h"
#include "engine/model/config.h"
#include "engine/model/device_weights.h"
#include "engine/model/footprint.h"
#include "engine/model/weights.h"
#include "engine/worker/worker.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "nlohmann/json.hpp"
#include "tests/parity/engine_harness.h"

namespace soloist {
namespace {

using Json = nlohmann::json;

constexpr char kModelDir[] = "models/tiny";
constexpr float kNearTie = 1e-3f;
constexpr double kLogitBound = 1e-3;

std::vector<Json> Goldens() {
  std::vector<Json> cases;
  std::ifstream file(std::string(kModelDir) + "/golden/prompts.jsonl");
  for (std::string line; std::getline(file, line);) cases.push_back(Json::parse(line));
  return cases;
}

// Greedy decoding through the whole engine. Up to the first near tie of the reference at which we choose differently,
// every token must be equal, and the reference's five best logits must be met.
// Parameter: ranks, GEMM kernel.
class GoldenTest : public testing::TestWithParam<std::tuple<int, std::string>> {};

TEST_P(GoldenTest, LogitsAndGreedyTokens) {
  const auto& [ranks, gemm] = GetParam();
  Harness harness({.model_dir = kModelDir, .num_ranks = ranks, .device = {.cpu_gemm = gemm}}, {});
  ASSERT_TRUE(harness.ok());
  const std::vector<Json> cases = Goldens();
  ASSERT_EQ(cases.size(), 24u);
  std::vector<Request> requests;
  for (const Json& golden : cases) {
    Request request;
    request.id = golden["name"];
    request.prompt = golden["ids"].get<std::vector<int32_t>>();
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.sampling.max_tokens = static_cast<int32_t>(golden["greedy"].size());
    request.sampling.return_logits = true;
    requests.push_back(std::move(request));
  }
  const auto outputs = harness.Run(requests);
  ASSERT_EQ(outputs.size(), cases.size());
  int64_t compared = 0, near_ties = 0;
  double worst = 0;
  for (size_t c = 0; c < cases.size(); ++c) {
    const Json& golden = cases[c];
    const Output& out = outputs[c][0];
    const auto expected = golden["greedy"].get<std::vector<int32_t>>();
    ASSERT_EQ(out.tokens.size(), expected.size()) << golden["name"];
    for (size_t step = 0; step < expected.size(); ++step) {
      const auto ids = golden["top5_ids"][step].get<std::vector<int32_t>>();
      const auto logits = golden["top5_logits"][step].get<std::vector<float>>();
      double difference = 0, norm = 0;
      for (size_t i = 0; i < ids.size(); ++i) {
        difference += std::pow(out.logits[step][ids[i]] - logits[i], 2);
        norm += std::pow(logits[i], 2);
      }
      const double error = std::sqrt(difference / norm);
      worst = std::max(worst, error);
      EXPECT_LE(error, kLogitBound) << golden["name"] << " step " << step;
      ++compared;
      if (out.tokens[step] != expected[step]) {
        ASSERT_LE(logits[0] - logits[1], kNearTie) << golden["name"] << " step " << step;
        std::printf("near tie: %s step %zu: %d here, %d there, gap %g\n", golden["name"].get<std::string>().c_str(),
                    step, out.tokens[step], expected[step], logits[0] - logits[1]);
        ++near_ties;
        break;  // the texts go different ways from here
      }
    }
  }
  EXPECT_GE(compared, 24 * 48 * 9 / 10);
  std::printf("%d ranks, %s: %lld steps compared, worst relative logit error %.2e, %lld near ties\n", ranks,
              gemm.c_str(), static_cast<long long>(compared), worst, static_cast<long long>(near_ties));
}

INSTANTIATE_TEST_SUITE_P(Ranks, GoldenTest, testing::Combine(testing::Values(4, 16), testing::Values("auto")));
INSTANTIATE_TEST_SUITE_P(Gemm, GoldenTest, testing::Combine(testing::Values(1), testing::ValuesIn(GemmKernelNames())));

// Every layer's two experts and weights for each prompt token, read from the worker itself.
TEST(RouterTest, ChoicesEqualReference) {
  auto config = LoadModelConfig(kModelDir);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  auto source = OpenCheckpointSource(*config, kModelDir);
  ASSERT_TRUE(source.ok()) << source.status().ToString();
  auto factory = CreateDeviceFactory({});
  ASSERT_TRUE(factory.ok());
  auto device = (*factory)->CreateDevice(0);
  ASSERT_TRUE(device.ok());
  LoadProgress progress;
  auto shared = LoadSharedWeights(*config, **source, 2048, **device, 2, progress);
  ASSERT_TRUE(shared.ok()) << shared.status().ToString();
  std::vector<int> all(config->num_experts);
  for (size_t e = 0; e < all.size(); ++e) all[e] = static_cast<int>(e);
  auto experts = LoadExpertWeights(*config, **source, all, **device, 2, progress);
  ASSERT_TRUE(experts.ok()) << experts.status().ToString();
  EXPECT_EQ(progress.loaded_bytes, SharedWeightBytes(*config) + ExpertWeightBytes(*config, config->num_experts));
  const PlanLimits limits{.vocab_size = static_cast<int32_t>(config->vocab_size),
                          .max_model_len = 2048,
                          .num_blocks = 128,
                          .block_size = 16,
                          .max_tokens = 512,
                          .max_sequences = 4};
  auto comm = CreateSelfCommunicator(**device);
  auto worker = Worker::Create(*config, {.limits = limits, .expert_rank = std::vector<int>(all.size(), 0)}, *shared,
                               *std::move(experts), *std::move(device), std::move(comm));
  ASSERT_TRUE(worker.ok()) << worker.status().ToString();

  int64_t checked = 0, cases = 0, step = 0;
  for (const Json& golden : Goldens()) {
    if (!golden.contains("router")) continue;
    ++cases;
    HomePlanParts parts;
    parts.token_ids = golden["ids"].get<std::vector<int32_t>>();
    const int n = static_cast<int>(parts.token_ids.size());
    ASSERT_LE(n, limits.max_tokens);
    parts.max_blocks = (n + 15) / 16;
    for (int b = 0; b < parts.max_blocks; ++b) parts.block_tables.push_back(b + 3);
    for (int i = 0; i < n; ++i) {
      parts.positions.push_back(i);
      parts.slot_mapping.push_back((i / 16 + 3) * 16 + i % 16);
    }
    parts.query_starts = {0, n};
    parts.seq_lens = {n};
    auto result = (*worker)->Execute(HomePlan(parts, ++step, n, 0));
    ASSERT_TRUE(result.ok()) << result.status().ToString();
    const Transformer& transformer = (*worker)->transformer();
    for (int64_t layer = 0; layer < config->num_layers; ++layer) {
      for (int i = 0; i < n; ++i) {
        const Json& reference = golden["router"][layer];
        const int64_t row = layer * limits.max_tokens + i;
        for (int j = 0; j < 2; ++j) {
          EXPECT_EQ(transformer.routed_experts().row<int32_t>(row)[j], reference["experts"][i][j].get<int32_t>())
              << golden["name"] << " layer " << layer << " token " << i;
          EXPECT_NEAR(transformer.routed_weights().row<float>(row)[j], reference["weights"][i][j].get<float>(), 1e-3);
          ++checked;
        }
      }
    }
  }
  EXPECT_EQ(cases, 4);
  EXPECT_GT(checked, 0);
  std::printf("%lld router choices compared in %lld cases\n", static_cast<long long>(checked),
              static_cast<long long>(cases));
}

}  // namespace
}  // namespace soloist
