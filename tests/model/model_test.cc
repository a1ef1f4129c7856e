// config.json, safetensors and weight sources: what is accepted, what is refused and in which words, and that values
// arrive.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "engine/model/checkpoint.h"
#include "engine/model/config.h"
#include "engine/model/convert.h"
#include "engine/model/device_weights.h"
#include "engine/model/footprint.h"
#include "engine/model/safetensors.h"
#include "engine/model/weights.h"
#include "gtest/gtest.h"
#include "kernels/uniform.h"
#include "nlohmann/json.hpp"

namespace soloist {
namespace {

using Json = nlohmann::json;

Json TinyConfig() {
  std::ifstream file("models/tiny/config.json");
  return Json::parse(file);
}

void ExpectSays(const absl::Status& status, const std::string& says) {
  ASSERT_FALSE(status.ok()) << "expected: " << says;
  EXPECT_NE(std::string(status.message()).find(says), std::string::npos) << status.ToString() << "\nexpected: " << says;
}

TEST(ConfigTest, Tiny) {
  const auto config = LoadModelConfig("models/tiny");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->num_layers, 6);
  EXPECT_EQ(config->num_kv_heads, 2);
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_TRUE(config->tie_word_embeddings);
  const auto defaults = LoadGenerationDefaults("models/tiny");
  ASSERT_TRUE(defaults.ok());
  EXPECT_EQ(defaults->eos_token_ids, (std::vector<int32_t>{0, 3}));
  EXPECT_FLOAT_EQ(*defaults->temperature, 0.8f);
}

TEST(ConfigTest, RefusesWithFieldValueAndLimit) {
  const std::vector<std::pair<std::pair<const char*, Json>, const char*>> cases = {
      {{"hidden_size", 0}, "hidden_size is 0, allowed: an integer from 1"},
      {{"hidden_size", -5}, "hidden_size is -5"},
      {{"hidden_size", "256"}, "hidden_size is \"256\""},
      {{"hidden_size", 1e300}, "hidden_size is 1e+300"},
      {{"hidden_size", 18446744073709551615u}, "hidden_size is 18446744073709551615"},
      {{"num_hidden_layers", nullptr}, "num_hidden_layers is missing"},
      {{"num_key_value_heads", 3}, "not a multiple of num_key_value_heads 3"},
      {{"num_key_value_heads", 5}, "num_key_value_heads is 5, allowed: an integer from 1 to 4"},
      {{"num_experts_per_tok", 17}, "17 experts per token, but there are 16 experts"},
      {{"head_dim", 63}, "head_dim is 63, allowed: even"},
      {{"hidden_act", "gelu"}, "hidden_act is \"gelu\": only silu"},
      {{"rope_scaling", {{"type", "yarn"}}}, "rope_scaling is"},
      {{"rope_theta", 0}, "rope_theta is 0"},
      {{"rms_norm_eps", 2}, "rms_norm_eps is 2"},
      {{"eos_token_id", 4096}, "eos_token_id holds 4096, allowed: token ids from 0 to 4095"},
      {{"tie_word_embeddings", 1}, "tie_word_embeddings is 1, allowed: true or false"},
      {{"architectures", {"GPT2LMHeadModel"}},
       "architecture 'GPT2LMHeadModel' is not supported; supported: MixtralForCausalLM"},
      {{"architectures", Json::array()}, "architectures must be a list of one name"},
      {{"quantization_config", {{"bits", 4}}}, "quantized checkpoints are not supported"},
  };
  for (const auto& [change, says] : cases) {
    Json config = TinyConfig();
    config[change.first] = change.second;
    ExpectSays(ParseModelConfig(config.dump(), "x/config.json").status(), says);
  }
  ExpectSays(ParseModelConfig("[]", "c").status(), "a JSON object is expected");
  ExpectSays(ParseModelConfig("{", "c").status(), "not valid JSON");
  ExpectSays(ParseModelConfig(std::string(100000, '['), "c").status(), "nested 100000 levels deep");
  ExpectSays(LoadModelConfig("no/such").status(), "no/such/config.json");
}

// A file with one F32 [2, 2] and one BF16 [3] tensor, its header changed by `edit`.
std::string Safetensors(const std::function<void(Json&)>& edit, int64_t extra_bytes = 0) {
  Json header = {{"a", {{"dtype", "F32"}, {"shape", {2, 2}}, {"data_offsets", {0, 16}}}},
                 {"b", {{"dtype", "BF16"}, {"shape", {3}}, {"data_offsets", {16, 22}}}},
                 {"__metadata__", {{"format", "pt"}}}};
  edit(header);
  const std::string text = header.dump();
  const uint64_t length = text.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file + text + std::string(22 + extra_bytes, '\1');
}

absl::Status ParseFile(const std::string& file) {
  return ParseSafetensorsHeader(file, static_cast<int64_t>(file.size()), "f").status();
}

TEST(SafetensorsTest, Corruptions) {
  EXPECT_TRUE(ParseFile(Safetensors([](Json&) {})).ok());
  const std::vector<std::pair<std::function<void(Json&)>, const char*>> cases = {
      {[](Json& h) { h["a"]["dtype"] = "F33"; }, "tensor 'a': dtype is 'F33'"},
      {[](Json& h) { h["a"]["dtype"] = 3; }, "dtype is missing or not a string"},
      {[](Json& h) { h["a"].erase("shape"); }, "shape is missing"},
      {[](Json& h) { h["a"]["shape"] = {2, -2}; }, "shape holds -2"},
      {[](Json& h) { h["a"]["shape"] = {2, 2.5}; }, "shape holds 2.5"},
      {[](Json& h) { h["a"]["shape"] = {1LL << 40, 1LL << 40}; }, "overflows"},
      {[](Json& h) { h["a"]["shape"] = {2, 3}; }, "span 16 bytes, but F32 [2,3] needs 24"},
      {[](Json& h) { h["a"]["data_offsets"] = {0}; }, "not a list of two"},
      {[](Json& h) { h["a"]["data_offsets"] = {16, 0}; }, "expected begin <= end"},
      {[](Json& h) { h["a"]["data_offsets"] = {-4, 12}; }, "expected begin <= end"},
      {[](Json& h) { h["b"]["data_offsets"] = {30, 36}; }, "end at 36, but the file holds 22"},
      {[](Json& h) { h["b"]["data_offsets"] = {10, 16}; }, "it overlaps another"},
      {[](Json& h) { h["a"] = 1; }, "tensor 'a': an object is expected"},
      {[](Json& h) { h.erase("a"); }, "there is a hole"},
      {[](Json& h) { h.erase("b"); }, "tensors end at byte"},
  };
  for (const auto& [edit, says] : cases) ExpectSays(ParseFile(Safetensors(edit)), says);
  ExpectSays(ParseFile(Safetensors([](Json&) {}, 5)), "tensors end at byte");
  ExpectSays(ParseFile("short"), "has at least 8");
  std::string huge = Safetensors([](Json&) {});
  huge[7] = '\x7f';
  ExpectSays(ParseFile(huge), "the header claims");
  std::string broken = Safetensors([](Json&) {});
  broken[8] = 'x';
  ExpectSays(ParseFile(broken), "not valid JSON");
  ExpectSays(SafetensorsFile::Open("no/such.safetensors").status(), "no/such.safetensors");
  ExpectSays(SafetensorsFile::Open("models").status(), "not a regular file");
}

TEST(CheckpointTest, FindChecksShape) {
  const auto checkpoint = Checkpoint::Open("models/tiny");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  EXPECT_TRUE(checkpoint->Find("model.norm.weight", {256}).ok());
  ExpectSays(checkpoint->Find("model.norm.weight", {255}).status(), "has shape [256], expected [255]");
  ExpectSays(checkpoint->Find("lm_head.weight", {4096, 256}).status(),
             "tensor 'lm_head.weight' is not in the checkpoint");
}

TEST(ConvertTest, Floats) {
  EXPECT_EQ(HalfToFloat(0x3c00), 1.0f);
  EXPECT_EQ(HalfToFloat(0x0001), 0x1p-24f);
  EXPECT_EQ(HalfToFloat(0x8400), -0x1p-14f);
  EXPECT_EQ(HalfToFloat(0xfc00), -INFINITY);
  EXPECT_TRUE(std::isnan(HalfToFloat(0x7e00)));
  EXPECT_EQ(ToBFloat16(1.0f).bits, 0x3f80);
  EXPECT_EQ(ToBFloat16(1.00390625f).bits, 0x3f80);  // a tie goes to even
  EXPECT_EQ(ToBFloat16(1.01171875f).bits, 0x3f82);
  EXPECT_TRUE(std::isnan(ToFloat(ToBFloat16(std::nanf("")))));
}

// Any split into rows gives the same values, and seeds, layers and experts differ.
TEST(DummySourceTest, PureFunctionOfItsKey) {
  const auto config = LoadModelConfig("models/paper16-small");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  const auto source = CreateDummySource(*config, 1), other = CreateDummySource(*config, 2);
  const auto [rows, cols] = RoleShape(*config, WeightRole::kExpertDown);
  std::vector<float> all(rows * cols), again(rows * cols), different(rows * cols);
  ASSERT_TRUE((*source)->Read(WeightRole::kExpertDown, 1, 3, 0, rows, all.data()).ok());
  for (int64_t row = 0; row < rows; row += 3) {
    const int64_t count = std::min<int64_t>(3, rows - row);
    ASSERT_TRUE((*source)->Read(WeightRole::kExpertDown, 1, 3, row, count, again.data() + row * cols).ok());
  }
  EXPECT_EQ(all, again);
  ASSERT_TRUE((*source)->Read(WeightRole::kExpertDown, 1, 4, 0, rows, different.data()).ok());
  EXPECT_NE(all, different);
  ASSERT_TRUE((*other)->Read(WeightRole::kExpertDown, 1, 3, 0, rows, different.data()).ok());
  EXPECT_NE(all, different);
  // The numbers of this source are those of its first version.
  const float step = std::sqrt(3.0f / 256) / 32768.0f;
  for (const auto& [index, multiple] : {std::pair(0, 28122.0f), {5, -23764.0f}, {1002, 17582.0f}}) {
    EXPECT_EQ(all[index], multiple * step) << index;
  }
  const auto uniform = (*source)->Uniform(WeightRole::kExpertDown, 1, 3);
  ASSERT_TRUE(uniform.has_value());
  for (int64_t i = 0; i < rows * cols; ++i) ASSERT_EQ(all[i], UniformAt(uniform->key, i, uniform->scale)) << i;
  EXPECT_FALSE((*source)->Uniform(WeightRole::kMoeNorm, 1, 0).has_value());
  double square = 0;
  for (const float x : all) square += double{x} * x;
  EXPECT_NEAR(square / static_cast<double>(all.size()) * static_cast<double>(cols), 1, 0.05);
}

// The design page's bytes: 2.15 GB of attention and 4.29 GB of experts per rank of sixteen, 0.26 MB of KV per token
// (bf16).
TEST(BytesTest, Paper16) {
  const auto config = LoadModelConfig("models/paper16");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  const double head = 2.0 * 2 * 32000 * 4096;
  EXPECT_NEAR((static_cast<double>(SharedWeightBytes(*config)) - head) * 1e-9, 2.15, 0.01);
  EXPECT_NEAR(static_cast<double>(ExpertWeightBytes(*config, 1)) * 1e-9, 4.29, 0.01);
}

}  // namespace
}  // namespace soloist
