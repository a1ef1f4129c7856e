// Logits of models with random weights on CUDA against the CPU backend in float32: other shapes than the bundled
// model's. Positions where the two choose other experts in some layer are counted and left out: with random weights
// near ties of the router are many, and either choice is right.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/gpu/forced_worker.h"
#include "tests/gpu/parity_flags.h"

namespace soloist {
namespace {

void TestModel(const std::string& name, const ModelConfig& config, int length) {
  const auto source = CreateDummySource(config, 5);
  ASSERT_TRUE(source.ok()) << source.status().ToString();
  std::mt19937 random(3);
  std::vector<int32_t> tokens(length);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % static_cast<uint32_t>(config.vocab_size));
  ForcedOptions options{.kv_dtype = DType::kF32, .max_tokens = 1024, .max_model_len = 1024};
  const auto cpu = ForcedWorker::Create(config, **source, options);
  ASSERT_NE(cpu, nullptr);
  const Forced expected = cpu->Logits(tokens, 256);
  options.kv_dtype = DType::kBF16;
  const int64_t vocab = config.vocab_size;
  for (const auto& [deterministic, chunk] :
       std::vector<std::pair<bool, int32_t>>{{false, 256}, {false, 33}, {true, 100}}) {
    options.device = {.kind = Flags().device, .deterministic = deterministic};
    const auto gpu = ForcedWorker::Create(config, **source, options);
    ASSERT_NE(gpu, nullptr);
    const Forced actual = gpu->Logits(tokens, chunk);
    ASSERT_EQ(actual.logits.size(), expected.logits.size()) << name;
    double difference_all = 0, norm_all = 0, worst = 0;
    int64_t same = 0, above = 0;
    for (int64_t i = 0; i < length; ++i) {
      if (!SameExperts(config, actual, expected, i, length)) continue;
      ++same;
      double difference = 0, norm = 0;
      for (int64_t v = 0; v < vocab; ++v) {
        const double reference = expected.logits[i * vocab + v];
        difference += std::pow(actual.logits[i * vocab + v] - reference, 2);
        norm += reference * reference;
      }
      const double error = std::sqrt(difference / norm);
      worst = std::max(worst, error);
      above += !(error <= 2e-2);
      difference_all += difference;
      norm_all += norm;
    }
    std::printf(
        "  %s, %schunks of %d: relative error of logits %.2e, worst position %.2e (%lld above 2e-2); other "
        "experts somewhere at %lld of %d positions\n",
        name.c_str(), deterministic ? "deterministic, " : "", chunk, std::sqrt(difference_all / norm_all), worst,
        static_cast<long long>(above), static_cast<long long>(length - same), length);
    EXPECT_LE(std::sqrt(difference_all / norm_all), 2e-2) << name;
    // A position sees others whose experts differ, in the layers after.
    EXPECT_LE(above * 15, same) << name;
    EXPECT_GE(same * 3, length) << name;
  }
}

ModelConfig Parse(const std::string& json) {
  auto config = ParseModelConfig(json, "test");
  CHECK_OK(config.status());
  return *config;
}

TEST(ModelParityTest, Paper16Small) {
  const auto config = LoadModelConfig(Flags().small_model_dir);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  TestModel("paper16-small", *config, 500);
}
TEST(ModelParityTest, MixtralGrouped) {
  TestModel("Mixtral, 8 heads of 128 on 2, window 100", Parse(R"({
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "bfloat16", "vocab_size": 1000,
    "hidden_size": 512, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128, "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_act": "silu",
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": 100,
    "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2})"),
            500);
}
TEST(ModelParityTest, OneExpertOfFour) {
  TestModel("two matrices, top 1, 12 heads of 64", Parse(R"({
    "architectures": ["SoloistMoeForCausalLM"], "model_type": "soloist_moe", "dtype": "bfloat16", "vocab_size": 2056,
    "hidden_size": 768, "moe_intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 12,
    "num_key_value_heads": 12, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 1, "hidden_act": "gelu",
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
    "bos_token_id": 1, "eos_token_id": 2})"),
            300);
}

}  // namespace
}  // namespace soloist
