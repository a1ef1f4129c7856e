// Log-probabilities of prompts: those of Hugging Face transformers in float32 (make_prompt_logprobs.py), the same bits
// whatever the number of ranks and the chunks are, and the same as those that generation gives.
#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "nlohmann/json.hpp"
#include "tests/parity/engine_harness.h"

namespace soloist {
namespace {

using Json = nlohmann::json;

constexpr char kModelDir[] = "models/tiny";
constexpr int32_t kTop = 3;

std::vector<Json> Lines(const std::string& path) {
  std::vector<Json> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(Json::parse(line));
  return lines;
}

std::vector<Request> GoldenPrompts() {
  std::vector<Request> requests;
  for (const Json& golden : Lines(std::string(kModelDir) + "/golden/prompts.jsonl")) {
    Request request;
    request.id = golden["name"];
    request.prompt = golden["ids"].get<std::vector<int32_t>>();
    request.sampling.num_prompt_logprobs = kTop;
    request.sampling.max_tokens = requests.size() % 2 == 0 ? 0 : 2;
    request.sampling.temperature = 0.7f;  // and penalties: of no influence on raw logits
    request.sampling.presence_penalty = 1;
    request.sampling.seed = 3;
    requests.push_back(std::move(request));
  }
  return requests;
}

TEST(PromptLogprobsTest, SameBitsInEveryLayout) {
  struct Config {
    std::string name;
    EngineOptions engine;
    SchedulerOptions scheduler;
  };
  std::vector<Config> configs;
  for (const int ranks : {1, 4}) {
    const std::string on = std::to_string(ranks) + (ranks == 1 ? " rank, " : " ranks, ");
    configs.push_back({on + "up to 256 rows a step", {.model_dir = kModelDir, .num_ranks = ranks}, {}});
    EngineOptions small = configs.back().engine;
    small.max_sequences = 8;
    small.max_tokens_per_step = 48;
    configs.push_back({on + "up to 48 rows a step, preemption", small, {.force_preempt_every = 9}});
  }
  const std::vector<Request> requests = GoldenPrompts();
  ASSERT_EQ(requests.size(), 24u);
  std::vector<std::vector<Output>> reference;
  for (const Config& config : configs) {
    Harness harness(config.engine, config.scheduler);
    ASSERT_TRUE(harness.ok()) << config.name;
    // The long ones once with each number of ranks.
    std::vector<Request> some;
    std::vector<size_t> which;
    for (size_t r = 0; r < requests.size(); ++r) {
      if (config.scheduler.force_preempt_every > 0 && requests[r].prompt.size() > 400) continue;
      some.push_back(requests[r]);
      which.push_back(r);
    }
    const auto outputs = harness.Run(some);
    ASSERT_EQ(outputs.size(), some.size());
    if (reference.empty()) reference = outputs;
    for (size_t i = 0; i < which.size(); ++i) {
      const size_t r = which[i];
      const PromptLogprobs &expected = reference[r][0].prompt, &actual = outputs[i][0].prompt;
      EXPECT_EQ(actual.tokens, std::vector<int32_t>(requests[r].prompt.begin() + 1, requests[r].prompt.end()));
      EXPECT_EQ(actual.logprobs, expected.logprobs) << config.name << " " << requests[r].id;
      EXPECT_EQ(actual.top_tokens, expected.top_tokens) << config.name << " " << requests[r].id;
      EXPECT_EQ(actual.top_logprobs, expected.top_logprobs) << config.name << " " << requests[r].id;
      EXPECT_EQ(outputs[i][0].tokens, reference[r][0].tokens) << config.name << " " << requests[r].id;
    }
    std::printf("%s: %lld steps, %lld preemptions\n", config.name.c_str(),
                static_cast<long long>(harness.loop().Load().steps),
                static_cast<long long>(harness.loop().Load().preemptions));
  }
}

// Parameter: GEMM kernel.
class PromptLogprobsGemmTest : public testing::TestWithParam<std::string> {};

// Within 1e-3 of transformers; where activations lose their last bits, of a log-probability's size.
TEST_P(PromptLogprobsGemmTest, EqualTransformers) {
  const bool whole = GetParam() != "avx512_bf16";
  const auto bound = [&](double logprob) { return whole ? 1e-3 : 1e-3 * std::max(1.0, -logprob); };
  const std::vector<Request> requests = GoldenPrompts();
  const std::vector<Json> goldens = Lines("tests/parity/prompt_logprobs.jsonl");
  ASSERT_EQ(goldens.size(), requests.size());
  Harness harness({.model_dir = kModelDir, .device = {.cpu_gemm = GetParam()}}, {});
  ASSERT_TRUE(harness.ok());
  const auto outputs = harness.Run(requests);
  ASSERT_EQ(outputs.size(), requests.size());
  int64_t compared = 0, others = 0, over = 0;
  double worst = 0, sum = 0, golden_sum = 0;
  for (size_t r = 0; r < goldens.size(); ++r) {
    const Json& golden = goldens[r];
    const PromptLogprobs& scores = outputs[r][0].prompt;
    ASSERT_EQ(golden["name"], requests[r].id);
    ASSERT_EQ(std::ssize(golden["logprobs"]), scores.size());
    for (int32_t i = 0; i < scores.size(); ++i, ++compared) {
      const double logprob = golden["logprobs"][i];
      const double error = std::abs(scores.logprobs[i] - logprob);
      EXPECT_LE(error, bound(logprob)) << requests[r].id << " token " << i + 1 << ": " << scores.logprobs[i] << ", "
                                       << logprob;
      worst = std::max(worst, error);
      over += error > 1e-3 ? 1 : 0;
      sum += scores.logprobs[i];
      golden_sum += logprob;
      for (int32_t k = 0; golden.contains("top_ids") && k < kTop; ++k) {
        const int32_t at = i * kTop + k;
        const double top = golden["top_logprobs"][i][k];
        EXPECT_NEAR(scores.top_logprobs[at], top, bound(top)) << requests[r].id;
        others += scores.top_tokens[at] != golden["top_ids"][i][k].get<int32_t>() ? 1 : 0;
      }
    }
  }
  EXPECT_GT(compared, 3000);
  EXPECT_LT(others, 10) << "the most likely tokens are others";
  EXPECT_LE(over, whole ? 0 : 3);
  EXPECT_NEAR(sum, golden_sum, 1e-5 * std::abs(golden_sum));
  std::printf("%s, %lld tokens: errors %.1e at most, %lld above 1e-3; sums %.3f and %.3f; %lld others likely\n",
              GetParam().c_str(), static_cast<long long>(compared), worst, static_cast<long long>(over), sum,
              golden_sum, static_cast<long long>(others));
}

INSTANTIATE_TEST_SUITE_P(Gemm, PromptLogprobsGemmTest, testing::ValuesIn(GemmKernelNames()));

// What is generated, with its log-probabilities, as a prompt: the same bits again.
TEST(PromptLogprobsTest, EqualThoseOfGeneration) {
  Harness harness({.model_dir = kModelDir, .num_ranks = 4}, {});
  ASSERT_TRUE(harness.ok());
  Request request;
  request.id = "generates";
  request.prompt = {0, 597, 690, 262, 429};
  request.sampling = {.seed = 5, .num_top_logprobs = 4, .max_tokens = 60, .ignore_eos = true};
  const Output generated = harness.Run({request})[0][0];
  ASSERT_EQ(generated.tokens.size(), 60u);
  request.id = "scores";
  request.prompt.insert(request.prompt.end(), generated.tokens.begin(), generated.tokens.end());
  request.sampling = {.num_prompt_logprobs = 4, .max_tokens = 0};
  const PromptLogprobs scores = harness.Run({request})[0][0].prompt;
  ASSERT_EQ(scores.size(), 64);
  for (int32_t i = 0; i < 60; ++i) {
    EXPECT_EQ(scores.logprobs[4 + i], generated.logprobs[i]) << i;
    for (int32_t k = 0; k < 4; ++k) {
      EXPECT_EQ(scores.top_tokens[(4 + i) * 4 + k], generated.top[i][k].first) << i;
      EXPECT_EQ(scores.top_logprobs[(4 + i) * 4 + k], generated.top[i][k].second) << i;
    }
  }
}

}  // namespace
}  // namespace soloist
