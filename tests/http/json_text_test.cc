// JSON in and out: what is refused, and that what is written is read back, by nlohmann too.
#include "server/http/json_text.h"

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "gtest/gtest.h"

namespace soloist {
namespace {

TEST(ParseJsonTest, KeepsOrderAndValues) {
  const auto value = ParseJson(R"( {"b": [1, -2, 3.5, true, null, "x\n\u00e9"], "a": {}, "c": 18446744073709551615} )");
  ASSERT_TRUE(value.ok()) << value.status();
  EXPECT_EQ(value->dump(), R"({"b":[1,-2,3.5,true,null,"x\né"],"a":{},"c":18446744073709551615})");
}

TEST(ParseJsonTest, RefusesNamesThatComeTwice) {
  EXPECT_FALSE(ParseJson(R"({"a": 1, "b": 2, "a": 1})").ok());
  EXPECT_TRUE(ParseJson(R"([{"a": 1}, {"a": 1}, {"b": {"a": 1}, "a": 2}])").ok());
  // Also where the object is large.
  std::string text = "{";
  for (int i = 0; i < 100; ++i) text += '"' + std::to_string(i) + "\":" + std::to_string(i) + ",";
  EXPECT_EQ(ParseJson(text + R"("x": 1})")->size(), 101);
  for (const char* twice : {"0", "15", "16", "17", "99"}) {
    const auto refused = ParseJson(text + '"' + twice + "\": 1}");
    EXPECT_FALSE(refused.ok()) << twice;
    EXPECT_NE(refused.status().message().find(twice), std::string::npos) << refused.status();
  }
}

TEST(ParseJsonTest, BoundsDepth) {
  const auto nested = [](int depth) { return ParseJson(std::string(depth, '[') + std::string(depth, ']')); };
  EXPECT_TRUE(nested(kMaxJsonDepth).ok());
  EXPECT_FALSE(nested(kMaxJsonDepth + 1).ok());
  EXPECT_FALSE(ParseJson(std::string(5'000'000, '[')).ok());
}

TEST(ParseJsonTest, ManyNamesTakeLinearTime) {
  std::string text = "{";
  for (int i = 0; i < 300'000; ++i) text += '"' + std::to_string(i) + "\":0,";
  EXPECT_EQ(ParseJson(text + R"("x":0})")->size(), 300'001);  // minutes, if each name looked at all before it
}

TEST(AppendJsonStringTest, IsWhatOthersRead) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    const int length = std::uniform_int_distribution(0, 24)(random);
    for (int i = 0; i < length; ++i) {
      static constexpr const char* kPieces[] = {"a",    "\"",   "\\", "\n", "\t", "\r", "\x01",
                                                "\x1f", "\x7f", "/",  "é",  "你", "🐉"};
      text += kPieces[random() % std::size(kPieces)];
    }
    std::string out = "x";
    AppendJsonString(out, text);
    EXPECT_EQ(nlohmann::json::parse(out.substr(1)).get<std::string>(), text);
    EXPECT_EQ(ParseJson(out.substr(1))->get<std::string>(), text);
  }
  std::string out;
  AppendJsonString(out, std::string_view("a\0b", 3));
  EXPECT_EQ(out, R"("a\u0000b")");
}

TEST(AppendJsonStringTest, RepairsIllFormedUtf8) {
  std::mt19937 random(2);
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    const int length = std::uniform_int_distribution(0, 12)(random);
    for (int i = 0; i < length; ++i)
      text += static_cast<char>(random() % 3 == 0 ? random() % 128 : 0x80 + random() % 128);
    std::string out;
    AppendJsonString(out, text);
    const std::string expected = nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    EXPECT_EQ(nlohmann::json::parse(out), nlohmann::json::parse(expected)) << out << " " << expected;
  }
}

TEST(AppendJsonLogprobTest, IsTheSameFloatAgain) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> values(-60, 0);
  for (int i = 0; i < 5000; ++i) {
    const float value = i % 2 == 0 ? values(random) : -std::exp(values(random));
    std::string out;
    AppendJsonLogprob(out, value);
    EXPECT_EQ(static_cast<float>(nlohmann::json::parse(out).get<double>()), value) << out;
  }
  for (const float value : {-std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::string out;
    AppendJsonLogprob(out, value);
    EXPECT_EQ(nlohmann::json::parse(out).get<double>(), -9999);
  }
}

}  // namespace
}  // namespace soloist
