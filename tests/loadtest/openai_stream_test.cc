// Server-sent events cut at every place, and what the events are counted as.
#include "cli/loadtest/openai_stream.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace soloist::cli {
namespace {

std::vector<std::string> Parse(const std::vector<std::string_view>& pieces) {
  SseParser parser;
  std::vector<std::string> out;
  for (const std::string_view piece : pieces) {
    EXPECT_TRUE(parser.Feed(piece, [&](std::string_view data) { out.emplace_back(data); }));
  }
  return out;
}

TEST(Sse, SameEventsWhereverTheStreamIsCut) {
  const std::string stream =
      ": heartbeat\n\nevent: x\ndata: {\"a\": 1}\n\ndata:two\r\ndata:  lines\r\n\r\nid: 3\rdata\rdata: end\r\r"
      "database: no\n\n:\n\ndata: [DONE]\n\ndata: never finished";
  const std::vector<std::string> expected = {"{\"a\": 1}", "two\n lines", "\nend", "[DONE]"};
  const std::string_view view = stream;
  EXPECT_EQ(Parse({view}), expected);
  for (size_t i = 0; i <= view.size(); ++i) {
    for (size_t j = i; j <= view.size(); ++j) {
      ASSERT_EQ(Parse({view.substr(0, i), view.substr(i, j - i), view.substr(j)}), expected) << i << " " << j;
    }
  }
  std::vector<std::string_view> bytes;
  for (size_t i = 0; i < view.size(); ++i) bytes.push_back(view.substr(i, 1));
  EXPECT_EQ(Parse(bytes), expected);
}

TEST(Sse, RefusesWhatHasNoEnd) {
  SseParser parser;
  const std::string piece(1 << 20, 'x');
  bool fits = true;
  for (int i = 0; i < 17; ++i) fits = parser.Feed(piece, [](std::string_view) {});
  EXPECT_FALSE(fits);
}

TEST(StreamEvent, ReadsWhatCountsAndNothingElse) {
  const auto event = ParseStreamEvent(
      R"({"id":"c","prompt_token_ids":[1,2,3],"choices":[{"index":0,"text":"a","token_ids":[5,6],"prompt_token_ids":[9],
          "logprobs":{"tokens":["a"],"token_logprobs":[-1.5],"finish_reason":"x"},"finish_reason":null}],
          "usage":{"prompt_tokens":3,"completion_tokens":2,"completion_tokens_details":{"completion_tokens":77}}})");
  ASSERT_TRUE(event.has_value());
  EXPECT_EQ(event->token_ids, 2);
  EXPECT_EQ(event->prompt_tokens, 3);
  EXPECT_EQ(event->completion_tokens, 2);
  EXPECT_TRUE(event->has_text);
  EXPECT_FALSE(event->error.has_value());
  EXPECT_EQ(ParseStreamEvent(R"({"choices":[{"token_ids":null,"text":""}]})")->token_ids, std::nullopt);
  EXPECT_EQ(ParseStreamEvent(R"({"choices":[{"token_ids":[]}]})")->token_ids, 0);
  EXPECT_TRUE(ParseStreamEvent(R"({"choices":[{"delta":{"content":"x"}}]})")->has_text);
  EXPECT_FALSE(ParseStreamEvent(R"({"choices":[{"delta":{"role":"assistant","content":""}}]})")->has_text);
  EXPECT_TRUE(ParseStreamEvent(R"({"choices":[{"finish_reason":"stop"}]})")->finished);
  EXPECT_EQ(ParseStreamEvent(R"({"error":{"message":"no","code":500}})")->error, "no");
  EXPECT_EQ(ParseStreamEvent(R"({"error":"no"})")->error, "no");
  for (const char* bad : {"", "[1]", "3", "\"x\"", "{", "{\"a\":}"}) EXPECT_FALSE(ParseStreamEvent(bad)) << bad;
}

struct Answer {
  RequestRecord record;
  std::string outcome;
};

Answer Take(const std::vector<std::string>& events) {
  Answer out;
  StreamedAnswer answer(out.record);
  int64_t now_ns = 0;
  for (const std::string& event : events) answer.OnData(++now_ns, event);
  out.outcome = answer.Finish();
  return out;
}

std::string Text(const std::string& more = "", const std::string& text = "x") {
  return R"({"choices":[{"text":")" + text + "\"" + more + "}]}";
}
std::string Usage(const std::string& choices, int tokens) {
  return R"({"choices":)" + choices + R"(,"usage":{"prompt_tokens":4,"completion_tokens":)" + std::to_string(tokens) +
         "}}";
}
const std::string kFinish = R"({"choices":[{"text":"","finish_reason":"length"}]})";

TEST(StreamedAnswer, CountsTokensNeverChunks) {
  // Ids; text may come later than they do.
  Answer a = Take({Text(R"(,"token_ids":[1])", ""), Text(R"(,"token_ids":[2,3])"), kFinish, Usage("[]", 3), "[DONE]"});
  EXPECT_EQ(a.outcome, "ok");
  EXPECT_EQ(a.record.output_tokens, 3);
  EXPECT_EQ(a.record.prompt_tokens, 4);
  EXPECT_EQ(a.record.token_source, TokenSource::kTokenIds);
  ASSERT_EQ(a.record.chunks.size(), 2u);
  EXPECT_EQ(a.record.chunks[1].tokens, 2);
  // Usage with each event; the first event's token has no text yet.
  const std::string held = R"([{"text":""}])", shown = R"([{"text":"x"}])";
  a = Take({Usage(held, 1), Usage(shown, 2), Usage(shown, 5), kFinish, Usage("[]", 5), "[DONE]"});
  EXPECT_EQ(a.outcome, "ok");
  EXPECT_EQ(a.record.output_tokens, 5);
  EXPECT_EQ(a.record.token_source, TokenSource::kUsagePerChunk);
  ASSERT_EQ(a.record.chunks.size(), 2u);
  EXPECT_EQ(a.record.chunks[0].tokens, 2);
  // Usage once, beside the last text: no token has a time.
  a = Take({Text(), Text(), Usage(R"([{"text":"x","finish_reason":"stop"}])", 7), "[DONE]"});
  EXPECT_EQ(a.outcome, "ok");
  EXPECT_EQ(a.record.output_tokens, 7);
  EXPECT_EQ(a.record.token_source, TokenSource::kUsageAtEnd);
  std::vector<double> itl;
  AppendItlMs(a.record, itl);
  EXPECT_TRUE(itl.empty());
}

TEST(StreamedAnswer, SaysWhatIsWrong) {
  EXPECT_EQ(Take({Text(), kFinish, "[DONE]"}).outcome, "no token count");
  EXPECT_EQ(Take({Text(R"(,"token_ids":[1])"), kFinish}).outcome, "incomplete");
  EXPECT_EQ(Take({Text(R"(,"token_ids":[1])"), "[DONE]"}).outcome, "incomplete");
  EXPECT_EQ(Take({Text(R"(,"token_ids":[1])"), kFinish, Usage("[]", 2), "[DONE]"}).outcome, "tokens lost");
  EXPECT_EQ(Take({"oops", "[DONE]"}).outcome, "not JSON");
  const Answer a = Take({R"({"error":{"message":"worker lost"}})", "[DONE]"});
  EXPECT_EQ(a.outcome, "error event");
  EXPECT_EQ(a.record.detail, "worker lost");
}

}  // namespace
}  // namespace soloist::cli
