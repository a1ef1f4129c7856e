#include "server/request_log.h"

#include <memory>
#include <string>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "server/tokenizer/tokenizer.h"

namespace soloist {
namespace {

constexpr std::string_view kTrace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

TEST(TraceParent, WellFormed) {
  const auto parts = ParseTraceParent(kTrace);
  ASSERT_TRUE(parts.has_value());
  EXPECT_EQ(parts->trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(parts->parent_id, "00f067aa0ba902b7");
  EXPECT_TRUE(parts->sampled);
  EXPECT_FALSE(ParseTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-a0")->sampled);
  EXPECT_TRUE(ParseTraceParent("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0b-more")->sampled);
}

TEST(TraceParent, Malformed) {
  for (const char* header : {"", "00", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
                             "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",  // version 00 has no more
                             "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01more",
                             "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                             "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
                             "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
                             "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
                             "00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                             "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
                             "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g"}) {
    EXPECT_FALSE(ParseTraceParent(header).has_value()) << header;
  }
}

class RequestLogTest : public testing::Test {
 protected:
  RequestLogTest() : tokenizer_(*Tokenizer::Load("models/tiny")) {
    OutputStreamOptions options;
    options.request_id = "a \"quoted\" \xff id";
    options.prompt_tokens = 9;
    options.num_outputs = 2;
    options.received_ns = 1'000'000'000;
    stream_ = std::make_unique<OutputStream>(options, *tokenizer_, Clock::Real(), [] {}, [](int32_t) {});
  }
  nlohmann::json Line(std::string_view trace = "") {
    stream_->Process();
    const std::string line = RequestLogLine(*stream_, trace);
    EXPECT_EQ(line.find('\n'), std::string::npos);
    return nlohmann::json::parse(line);
  }

  std::unique_ptr<const Tokenizer> tokenizer_;
  std::unique_ptr<OutputStream> stream_;
};

TEST_F(RequestLogTest, OfAWholeRequest) {
  for (int output = 0; output < 2; ++output) {
    for (int i = 0; i <= output; ++i) stream_->OnToken({.output_index = output, .token = 300 + i});
    FinishEvent event{.output_index = output, .reason = output == 0 ? FinishReason::kStop : FinishReason::kLength};
    event.times = {1'001'000'000, 1'002'500'000, 1'010'000'000 + output, 1'050'000'000 + output * 1'000'000};
    event.cached_prompt_tokens = 4;
    event.num_preemptions = 1;
    stream_->OnFinish(event);
  }
  const nlohmann::json line = Line(kTrace);
  EXPECT_EQ(line["request_id"], "a \"quoted\" \xef\xbf\xbd id");
  EXPECT_EQ(line["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(line["parent_id"], "00f067aa0ba902b7");
  EXPECT_EQ(line["prompt_tokens"], 9);
  EXPECT_EQ(line["cached_prompt_tokens"], 4);
  EXPECT_EQ(line["output_tokens"], 3);
  EXPECT_EQ(line["preemptions"], 2);
  EXPECT_EQ(line["finish"], (nlohmann::json{"stop", "length"}));
  EXPECT_EQ(line["queue_ms"], 2.5);
  EXPECT_EQ(line["ttft_ms"], 10);
  EXPECT_EQ(line["e2e_ms"], 51);
  EXPECT_FALSE(line.contains("error"));
}

TEST_F(RequestLogTest, OfAClientThatWentAway) {
  stream_->OnToken({.output_index = 1, .token = 300});
  const nlohmann::json line = Line("not a trace");
  EXPECT_FALSE(line.contains("trace_id"));
  EXPECT_EQ(line["output_tokens"], 1);
  EXPECT_EQ(line["finish"], (nlohmann::json{"open", "open"}));
  EXPECT_FALSE(line.contains("e2e_ms"));
}

TEST_F(RequestLogTest, OfAFailure) {
  for (int output = 0; output < 2; ++output) {
    stream_->OnFinish({.output_index = output,
                       .reason = FinishReason::kError,
                       .error = absl::UnavailableError("the engine has failed")});
  }
  const nlohmann::json line = Line();
  EXPECT_EQ(line["finish"], (nlohmann::json{"error", "error"}));
  EXPECT_EQ(line["error"], "the engine has failed");
}

}  // namespace
}  // namespace soloist
