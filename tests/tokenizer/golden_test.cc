// The tokenizer against Hugging Face's `tokenizers` package: data made by make_goldens.py, a dozen tokenizers with the
// pipelines of well-known families and some 2,000 strings each.
#include <fstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "server/tokenizer/tokenizer.h"

namespace soloist {
namespace {

using Json = nlohmann::json;
constexpr char kData[] = "tests/tokenizer/data/";

Json Load(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file) << path;
  return Json::parse(file);
}

class GoldenTokenizerTest : public testing::TestWithParam<const char*> {};

TEST_P(GoldenTokenizerTest, EqualsTokenizers) {
  const std::string name = GetParam();
  const auto loaded = Tokenizer::Load(name == "tiny" ? "models/tiny" : kData + name);
  ASSERT_TRUE(loaded.ok()) << loaded.status().ToString();
  const Tokenizer& tokenizer = **loaded;
  const auto texts = Load(std::string(kData) + "strings.json").get<std::vector<std::string>>();
  const Json golden = Load(kData + name + "/golden.json");
  const auto prefix = golden["prefix"].get<std::vector<int32_t>>();
  const auto suffix = golden["suffix"].get<std::vector<int32_t>>();
  ASSERT_EQ(golden["cases"].size(), texts.size());
  ASSERT_GE(texts.size(), 2000u);
  int wrong = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    const Json& expected = golden["cases"][i];
    const auto ids = expected[0].get<std::vector<int32_t>>();
    const auto found = tokenizer.Encode(texts[i], {.add_special_tokens = false});
    std::vector<int32_t> around = prefix;
    around.insert(around.end(), ids.begin(), ids.end());
    around.insert(around.end(), suffix.begin(), suffix.end());
    const std::string text = expected.size() > 1 ? expected[1].get<std::string>() : texts[i];
    std::string pieces;
    IncrementalDecoder decoder(tokenizer, true);
    for (const int32_t id : ids) pieces += decoder.Push(id);
    pieces += decoder.Flush();
    if (found == ids && tokenizer.Encode(texts[i]) == around && tokenizer.Decode(ids, true) == text && pieces == text) {
      continue;
    }
    if (++wrong > 5) continue;
    ADD_FAILURE() << name << ", string " << i << ": " << Json(texts[i]).dump() << "\n  ids  " << Json(found).dump()
                  << "\n  want " << Json(ids).dump() << "\n  text " << Json(tokenizer.Decode(ids, true)).dump()
                  << "\n  want " << Json(text).dump();
  }
  EXPECT_EQ(wrong, 0) << "of " << texts.size();
}

INSTANTIATE_TEST_SUITE_P(Families, GoldenTokenizerTest,
                         testing::Values("tiny", "gpt2", "roberta", "llama3", "qwen2", "gpt-oss", "deepseek", "digits",
                                         "llama2", "mistral", "metaspace", "gemma"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace soloist
