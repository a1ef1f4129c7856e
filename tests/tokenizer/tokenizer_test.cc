// The tokenizer against the ids of models/tiny/golden (made with Hugging Face tokenizers), and against hand-made
// vocabularies.
#include "server/tokenizer/tokenizer.h"

#include <chrono>
#include <cstdio>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace soloist {
namespace {

using Json = nlohmann::json;

std::unique_ptr<const Tokenizer> Tiny() {
  auto tokenizer = Tokenizer::Load("models/tiny");
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
  return *std::move(tokenizer);
}

TEST(TokenizerTest, Goldens) {
  const auto tokenizer = Tiny();
  std::ifstream file("models/tiny/golden/prompts.jsonl");
  int cases = 0, encoded = 0;
  for (std::string line; std::getline(file, line); ++cases) {
    const Json golden = Json::parse(line);
    // The chat cases have ids only: their text is a rendered template.
    if (golden["text"].is_string()) {
      const Tokenizer::EncodeOptions options{.add_special_tokens = golden["add_bos"].get<bool>()};
      EXPECT_EQ(tokenizer->Encode(golden["text"].get<std::string>(), options),
                golden["ids"].get<std::vector<int32_t>>())
          << golden["name"];
      ++encoded;
    }
    EXPECT_EQ(tokenizer->Decode(golden["greedy"].get<std::vector<int32_t>>(), false),
              golden["greedy_text"].get<std::string>())
        << golden["name"];
  }
  EXPECT_EQ(cases, 24);
  EXPECT_EQ(encoded, 16);
  EXPECT_EQ(tokenizer->vocab_size(), 4096);
  EXPECT_EQ(tokenizer->bos_id(), 0);
  EXPECT_TRUE(tokenizer->IsSpecial(3));
}

// Decode of Encode is the text; pieces joined are the text, each well-formed.
TEST(TokenizerTest, RoundTrip) {
  const auto tokenizer = Tiny();
  std::mt19937 random(5);
  const std::vector<std::string> parts = {"Once upon", " a  time", "\n\n", "naïve", "日本語",  "🐉👩‍👩‍👧",
                                          "\t",        "don't",    " 123", "é",     "<|end|>", "<|en"};
  for (int i = 0; i < 2000; ++i) {
    std::string text;
    for (uint32_t n = random() % 8; n > 0; --n) text += parts[random() % parts.size()];
    const auto ids = tokenizer->Encode(text, {.add_special_tokens = false});
    EXPECT_EQ(tokenizer->Decode(ids, false), text);
    IncrementalDecoder decoder(*tokenizer, false);
    std::string joined;
    for (const int32_t id : ids) joined += decoder.Push(id);
    EXPECT_EQ(joined + decoder.Flush(), text);
  }
}

TEST(TokenizerTest, SpecialTokensAsText) {
  const auto tokenizer = Tiny();
  EXPECT_EQ(tokenizer->Encode("<|end|>", {.add_special_tokens = false}), std::vector<int32_t>{3});
  const auto plain = tokenizer->Encode("<|end|>", {.add_special_tokens = false, .parse_special_tokens = false});
  EXPECT_GT(plain.size(), 1u);
  EXPECT_EQ(tokenizer->Decode(plain, true), "<|end|>");
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{3}, true), "");
}

TEST(TokenizerTest, InvalidUtf8) {
  const auto tokenizer = Tiny();
  const Tokenizer::EncodeOptions plain{.add_special_tokens = false};
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode("a\xff"
                                                "b",
                                                plain),
                              false),
            "a\xEF\xBF\xBD"
            "b");
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode("\xE2\x82", plain), false), "\xEF\xBF\xBD");
}

// Mixtral's kind: "▁" for spaces, a prepended one, bytes for what the vocabulary lacks.
constexpr char kSentencePiece[] = R"({"added_tokens":[{"id":1,"content":"<s>","special":true}],
 "normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},
 "pre_tokenizer":null,
 "post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
   "special_tokens":{"<s>":{"id":"<s>","ids":[1],"tokens":["<s>"]}}},
 "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},
   {"type":"Strip","content":" ","start":1,"stop":0}]},
 "model":{"type":"BPE","unk_token":"<unk>","fuse_unk":true,"byte_fallback":true,
   "vocab":{"<unk>":0,"<s>":1,"<0xC3>":2,"<0xA9>":3,"▁":4,"a":5,"b":6,"ab":7,"▁ab":8},"merges":["a b","▁ ab"]}})";

TEST(TokenizerTest, SentencePieceStyle) {
  auto tokenizer = Tokenizer::FromJson(kSentencePiece, "");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().ToString();
  EXPECT_EQ((*tokenizer)->Encode("ab ba"), (std::vector<int32_t>{1, 8, 4, 6, 5}));
  EXPECT_EQ((*tokenizer)->Encode("aé"), (std::vector<int32_t>{1, 4, 5, 2, 3}));
  EXPECT_EQ((*tokenizer)->Encode("a日本"), (std::vector<int32_t>{1, 4, 5, 0}));
  EXPECT_EQ((*tokenizer)->Decode(std::vector<int32_t>{1, 8, 4, 6, 2, 3}, true), "ab bé");
}

TEST(TokenizerTest, RefusesByName) {
  const auto refused = [](const std::string& from, const std::string& to, const std::string& says) {
    std::string json = kSentencePiece;
    json.replace(json.find(from), from.size(), to);
    const auto tokenizer = Tokenizer::FromJson(json, "");
    ASSERT_FALSE(tokenizer.ok()) << to;
    EXPECT_NE(std::string(tokenizer.status().message()).find(says), std::string::npos) << tokenizer.status().ToString();
  };
  refused(R"("type":"BPE")", R"("type":"WordPiece")", "WordPiece");
  refused(R"("pre_tokenizer":null)", R"("pre_tokenizer":{"type":"UnicodeScripts"})", "UnicodeScripts");
  refused(R"("pre_tokenizer":null)",
          R"("pre_tokenizer":{"type":"Split","pattern":{"Regex":"("},"behavior":"Isolated"})", "pattern '('");
  refused(R"({"type":"Prepend","prepend":"▁"})", R"({"type":"Lowercase"})", "Lowercase");
  refused(R"({"type":"Fuse"})", R"({"type":"CTC"})", "CTC");
  refused(R"("id":1,"content":"<s>")", R"("id":-1,"content":"<s>")", "'<s>' is -1");
  refused(R"("a b")", R"("a c")", "'a' + 'c'");
  refused(R"("<unk>":0)", R"("<unk>":-1)", "-1");
  EXPECT_FALSE(Tokenizer::FromJson("[]", "").ok());
  EXPECT_FALSE(Tokenizer::FromJson("{", "").ok());
}

// A word without a space as long as the text: the heap keeps it near-linear. The time is printed, not judged.
TEST(TokenizerTest, LongTexts) {
  auto tokenizer = Tokenizer::FromJson(kSentencePiece, "");
  ASSERT_TRUE(tokenizer.ok());
  std::string text;
  while (text.size() < 1'000'000) text += "ab";
  const auto start = std::chrono::steady_clock::now();
  const auto ids = (*tokenizer)->Encode(text, {.add_special_tokens = false});
  std::printf("1 MB without a space: %.2f s\n",
              std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  EXPECT_EQ(ids.size(), 500'000u);
}

}  // namespace
}  // namespace soloist
