// Stop strings against a plain search, however the text is cut; OutputStream: order, coalescing, limits, stop strings
// across tokens, what is reported of tokens that came after one.
#include "server/output_stream.h"

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "gtest/gtest.h"
#include "server/stop_strings.h"

namespace soloist {
namespace {

struct Found {
  std::string text;
  int stop = -1;
};

// The stop that ends first, of those the longest, by looking everywhere.
Found Reference(const std::string& text, const std::vector<std::string>& stops, bool include) {
  for (size_t end = 1; end <= text.size(); ++end) {
    int best = -1;
    for (size_t s = 0; s < stops.size(); ++s) {
      const bool ends_here =
          end >= stops[s].size() && text.compare(end - stops[s].size(), stops[s].size(), stops[s]) == 0;
      if (ends_here && (best < 0 || stops[s].size() > stops[best].size())) best = static_cast<int>(s);
    }
    if (best >= 0) return {text.substr(0, include ? end : end - stops[best].size()), best};
  }
  return {text, -1};
}

TEST(StopStringsTest, EqualsPlainSearchHoweverTheTextIsCut) {
  std::mt19937 random(3);
  const auto word = [&](size_t longest) {
    std::string out(1 + random() % longest, 'a');
    for (char& c : out) c = static_cast<char>('a' + random() % 2);
    return out;
  };
  int matches = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::vector<std::string> strings;
    for (uint32_t n = random() % 4; n > 0; --n) strings.push_back(word(6));
    const std::string text = word(40);
    const bool include = random() % 2 == 0;
    const StopStrings stops(strings);
    StopMatcher matcher(stops, include);
    std::string out;
    for (size_t at = 0; at < text.size();) {
      const size_t size = 1 + random() % 5;
      out += matcher.Push(text.substr(at, size));
      at += size;
    }
    out += matcher.Flush();
    const Found expected = Reference(text, strings, include);
    ASSERT_EQ(out, expected.text) << text;
    ASSERT_EQ(matcher.matched() < 0, expected.stop < 0);
    if (expected.stop >= 0) {
      ++matches;
      ASSERT_EQ(strings[matcher.matched()], strings[expected.stop]);
    }
  }
  EXPECT_GT(matches, 5'000);
}

class OutputStreamTest : public testing::Test {
 protected:
  OutputStreamTest() : tokenizer_(*Tokenizer::Load("models/tiny")) {}

  std::unique_ptr<OutputStream> Create(OutputStreamOptions options) {
    options.request_id = "r";
    return std::make_unique<OutputStream>(
        std::move(options), *tokenizer_, clock_, [this] { ++ready_; },
        [this](int32_t output) { cancelled_.push_back(output); });
  }
  static TokenEvent Token(int32_t token, int32_t output = 0) { return {.output_index = output, .token = token}; }
  FinishEvent End(FinishReason reason, int32_t output = 0) const {
    clock_.AdvanceNs(10);
    return {.output_index = output, .reason = reason, .times = {.arrival_ns = 1, .last_token_ns = clock_.NowNs()}};
  }
  static std::vector<StreamEvent> TakeAll(OutputStream& stream) {
    stream.Process();
    std::vector<StreamEvent> events;
    while (auto event = stream.Next()) events.push_back(*std::move(event));
    return events;
  }
  static std::string TextOf(const std::vector<StreamEvent>& events, int32_t output = 0) {
    std::string text;
    for (const StreamEvent& event : events) {
      if (const auto* delta = std::get_if<Delta>(&event); delta != nullptr && delta->output_index == output) {
        text += delta->text;
      }
    }
    return text;
  }

  mutable ManualClock clock_;
  const std::unique_ptr<const Tokenizer> tokenizer_;
  int ready_ = 0;
  std::vector<int32_t> cancelled_;
};

TEST_F(OutputStreamTest, CoalescesAndEndsInOrder) {
  const auto stream = Create({.prompt_tokens = 3, .num_outputs = 2});
  const auto ids = tokenizer_->Encode("naïve 🐉 café", {.add_special_tokens = false});
  for (const int32_t id : ids) {
    EXPECT_TRUE(stream->OnToken(Token(id, 0)));
    EXPECT_TRUE(stream->OnToken(Token(id, 1)));
  }
  EXPECT_EQ(ready_, 1);  // one call until somebody looks
  stream->OnFinish(End(FinishReason::kLength, 0));
  stream->OnFinish(End(FinishReason::kLength, 1));
  const auto events = TakeAll(*stream);
  ASSERT_EQ(events.size(), 5u);  // a delta and an end each, and the request's end
  EXPECT_EQ(TextOf(events, 0), "naïve 🐉 café");
  EXPECT_EQ(TextOf(events, 1), "naïve 🐉 café");
  ASSERT_TRUE(std::holds_alternative<RequestEnd>(events.back()));
  EXPECT_EQ(std::get<RequestEnd>(events.back()).output_tokens, 2 * static_cast<int32_t>(ids.size()));
  EXPECT_FALSE(stream->Next().has_value());
}

TEST_F(OutputStreamTest, NeverSplitsACharacter) {
  const auto stream = Create({});
  const std::string text = "🐉é日";
  std::string joined;
  for (const int32_t id : tokenizer_->Encode(text, {.add_special_tokens = false})) {
    stream->OnToken(Token(id));
    const std::string piece = TextOf(TakeAll(*stream));
    EXPECT_EQ(tokenizer_->Decode(tokenizer_->Encode(piece, {.add_special_tokens = false}), false), piece);
    joined += piece;
  }
  EXPECT_EQ(joined, text);
}

TEST_F(OutputStreamTest, StopStringDropsWhatCameAfterIt) {
  const auto stream = Create({.stop_strings = {"little"}});
  const auto ids = tokenizer_->Encode("There was a little dragon", {.add_special_tokens = false});
  for (const int32_t id : ids) stream->OnToken(Token(id));
  clock_.AdvanceNs(5);
  auto events = TakeAll(*stream);
  EXPECT_EQ(TextOf(events), "There was a ");
  EXPECT_EQ(cancelled_, std::vector<int32_t>{0});
  stream->OnToken(Token(ids[0]));
  stream->OnFinish(End(FinishReason::kStop));
  events = TakeAll(*stream);
  ASSERT_EQ(events.size(), 2u);
  const auto& end = std::get<OutputEnd>(events[0]);
  EXPECT_EQ(end.reason, FinishReason::kStop);
  EXPECT_EQ(end.stop_string, "little");
  EXPECT_LT(end.output_tokens, static_cast<int32_t>(ids.size()));
  EXPECT_EQ(end.times.last_token_ns, 5);  // when it was found, not when the loop ended it
}

TEST_F(OutputStreamTest, StopTokenEndsTheTextBeforeItself) {
  const auto ids = tokenizer_->Encode("a b", {.add_special_tokens = false});
  for (const bool include : {false, true}) {
    const auto stream = Create({.include_stop = include, .stop_tokens = {ids.back()}});
    for (const int32_t id : ids) stream->OnToken(Token(id));
    FinishEvent end = End(FinishReason::kStop);
    end.stop_token = ids.back();
    stream->OnFinish(end);
    const auto events = TakeAll(*stream);
    EXPECT_EQ(TextOf(events), include ? "a b" : "a");
    EXPECT_EQ(std::get<OutputEnd>(events[1]).stop_token, ids.back());
  }
}

TEST_F(OutputStreamTest, SlowReaderIsRefusedAndTold) {
  const auto stream = Create({.max_buffered_tokens = 4});
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(stream->OnToken(Token(300)));
  EXPECT_FALSE(stream->OnToken(Token(300)));
  EXPECT_TRUE(stream->overflowed());
  stream->OnFinish(End(FinishReason::kCancelled));
  const auto events = TakeAll(*stream);
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(std::get<Delta>(events[0]).tokens.size(), 4u);  // what was accepted is not lost
  const auto& end = std::get<OutputEnd>(events[1]);
  EXPECT_EQ(end.reason, FinishReason::kError);
  EXPECT_EQ(end.error.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(end.retryable);
}

TEST_F(OutputStreamTest, ReadingMakesRoom) {
  const auto stream = Create({.max_buffered_tokens = 4});
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(stream->OnToken(Token(300)));
    TakeAll(*stream);
  }
  // One token always fits, however large.
  const auto tight = Create({.max_buffered_bytes = 1});
  EXPECT_TRUE(tight->OnToken(Token(300)));
  EXPECT_FALSE(tight->OnToken(Token(300)));
}

TEST_F(OutputStreamTest, LargeDeltasAreCut) {
  const auto stream = Create({.max_delta_bytes = 1000});
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(stream->OnToken(Token(300)));
  const auto events = TakeAll(*stream);
  EXPECT_GT(events.size(), 5u);
  size_t tokens = 0;
  for (const StreamEvent& event : events) tokens += std::get<Delta>(event).tokens.size();
  EXPECT_EQ(tokens, 100u);
}

// `count` tokens from index `first` on, each with a top one.
PromptLogprobs Scores(int32_t first, int32_t count) {
  PromptLogprobs scores;
  scores.first = first;
  scores.num_top = 1;
  for (int32_t i = 0; i < count; ++i) {
    scores.tokens.push_back(first + i);
    scores.logprobs.push_back(-1.0f - static_cast<float>(first + i));
    scores.top_tokens.push_back(7);
    scores.top_logprobs.push_back(-0.5f);
  }
  return scores;
}

TEST_F(OutputStreamTest, PromptLogprobsComeFirstInBoundedPieces) {
  const auto stream = Create({.max_delta_bytes = 1000});
  EXPECT_TRUE(stream->OnPromptLogprobs(Scores(1, 50)));
  EXPECT_EQ(ready_, 1);
  EXPECT_EQ(TakeAll(*stream).size(), 4u);  // 15 tokens of about 2 * 32 bytes fit
  EXPECT_TRUE(stream->OnPromptLogprobs(Scores(51, 7)));
  EXPECT_TRUE(stream->OnToken(Token(300)));
  EXPECT_TRUE(stream->OnPromptLogprobs(Scores(58, 20)));
  stream->OnFinish(End(FinishReason::kLength));
  const auto events = TakeAll(*stream);
  ASSERT_EQ(events.size(), 6u);
  int32_t next = 51;
  for (int i = 0; i < 3; ++i) {
    const auto& part = std::get<PromptLogprobs>(events[i]);
    EXPECT_EQ(part.first, next);
    EXPECT_EQ(part.num_top, 1);
    ASSERT_EQ(part.logprobs.size(), part.tokens.size());
    ASSERT_EQ(part.top_tokens.size(), part.tokens.size());
    ASSERT_EQ(part.top_logprobs.size(), part.tokens.size());
    EXPECT_LE(part.size(), 15);
    for (int32_t k = 0; k < part.size(); ++k, ++next) {
      EXPECT_EQ(part.tokens[k], next);
      EXPECT_EQ(part.logprobs[k], -1.0f - static_cast<float>(next));
    }
  }
  EXPECT_EQ(next, 78);
  EXPECT_EQ(std::get<Delta>(events[3]).tokens.size(), 1u);
  EXPECT_EQ(std::get<RequestEnd>(events[5]).output_tokens, 1);
}

TEST_F(OutputStreamTest, UnreadPromptLogprobsAreBoundedByTheirBytes) {
  // 16 bytes a token; of tokens that wait they are none.
  const auto stream = Create({.max_buffered_tokens = 1, .max_buffered_bytes = 16 * 100});
  EXPECT_TRUE(stream->OnPromptLogprobs(Scores(1, 60)));
  EXPECT_TRUE(stream->OnPromptLogprobs(Scores(61, 40)));
  TakeAll(*stream);
  EXPECT_TRUE(stream->OnPromptLogprobs(Scores(101, 1000)));  // one always fits
  EXPECT_FALSE(stream->OnPromptLogprobs(Scores(1101, 1)));
  EXPECT_TRUE(stream->overflowed());
  stream->OnFinish(End(FinishReason::kCancelled));
  const auto events = TakeAll(*stream);
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(std::get<PromptLogprobs>(events[0]).size(), 1000);
  EXPECT_EQ(std::get<OutputEnd>(events[1]).error.code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace soloist
