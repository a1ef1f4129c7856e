// The OpenAI client against the null server, over real sockets: counting, connections, failures.
#include "cli/loadtest/http_client.h"

#include <string>
#include <vector>

#include "cli/loadtest/driver.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/loadtest/null_http_server.h"

namespace soloist::cli {
namespace {

using Count = NullHttpOptions::Count;

// `count` requests of 12 + i prompt tokens and 9 output tokens, `concurrency` in flight.
std::vector<RequestRecord> Load(const HttpClientOptions& options, int count, double concurrency,
                                double cancel_share = 0) {
  const auto client = HttpLoadClient::Connect(options);
  EXPECT_TRUE(client.ok()) << client.status();
  if (!client.ok()) return {};
  int next = 0;
  const RequestSource source = [&]() -> std::optional<PlannedRequest> {
    if (next == count) return std::nullopt;
    return PlannedRequest{.prompt = std::vector<int32_t>(static_cast<size_t>(12 + next++), 7), .output_tokens = 9};
  };
  const auto timer = LoadTimer::Create();
  return RunLoad(**client, source, {.concurrency = Profile(concurrency), .cancel_share = cancel_share}, *timer);
}

TEST(HttpClient, CountsByWhatTheServerGivesHoweverTheBytesArrive) {
  struct Case {
    Count count;
    TokenSource source;
  };
  for (const Case c :
       {Case{Count::kTokenIds, TokenSource::kTokenIds}, Case{Count::kUsagePerChunk, TokenSource::kUsagePerChunk},
        Case{Count::kUsageAtEnd, TokenSource::kUsageAtEnd}}) {
    for (const size_t write_bytes : {0, 1, 7}) {
      for (const bool chat : {false, true}) {
        NullHttpServer server(
            {.interval = std::chrono::microseconds(500), .count = c.count, .write_bytes = write_bytes});
        const auto records = Load({.url = server.url(), .chat = chat}, 6, 3);
        ASSERT_EQ(records.size(), 6u);
        for (size_t i = 0; i < 6; ++i) {
          EXPECT_EQ(records[i].outcome, "ok") << records[i].detail;
          EXPECT_EQ(records[i].output_tokens, 9);
          EXPECT_EQ(records[i].prompt_tokens, 12 + static_cast<int>(i));
          EXPECT_EQ(records[i].token_source, c.source);
          EXPECT_GE(records[i].sent_ns, records[i].intended_ns);
          EXPECT_GT(TtftMs(records[i]).value_or(0), 0.5);
          std::vector<double> itl;
          AppendItlMs(records[i], itl);
          EXPECT_EQ(itl.size(), c.source == TokenSource::kUsageAtEnd ? 0u : 8u);
        }
      }
    }
  }
}

TEST(HttpClient, WithoutAnyCountThereAreNoTokens) {
  NullHttpServer server({.count = Count::kNothing});
  const auto records = Load({.url = server.url()}, 1, 1);
  EXPECT_EQ(records.at(0).outcome, "no token count");
  EXPECT_EQ(records.at(0).output_tokens, 0);
}

TEST(HttpClient, KeepsConnectionsAlive) {
  NullHttpServer server({});
  const auto records = Load({.url = server.url(), .connections = 3}, 30, 3);
  for (const RequestRecord& record : records) EXPECT_EQ(record.outcome, "ok");
  EXPECT_EQ(server.accepted_connections(), 3 + 3);  // probe, /v1/models, /version; then the three
}

TEST(HttpClient, TriesAgainWhereAKeptConnectionWasClosed) {
  NullHttpServer server({.close_after_answer = true});
  const auto records = Load({.url = server.url(), .connections = 1}, 8, 1);
  ASSERT_EQ(records.size(), 8u);
  for (const RequestRecord& record : records) EXPECT_EQ(record.outcome, "ok");
}

TEST(HttpClient, SaysWhatWentWrong) {
  {
    NullHttpServer server({.refuse_status = 503});
    const auto records = Load({.url = server.url()}, 3, 1);
    ASSERT_EQ(records.size(), 3u);
    for (const RequestRecord& record : records) {
      EXPECT_EQ(record.outcome, "HTTP 503");
      EXPECT_EQ(record.detail, R"({"error":{"message":"refused, as told"}})");
    }
  }
  {
    NullHttpServer server({.break_after_tokens = 4});
    const auto records = Load({.url = server.url()}, 2, 1);
    ASSERT_EQ(records.size(), 2u);
    for (const RequestRecord& record : records) {
      EXPECT_FALSE(record.ok());
      EXPECT_GE(record.output_tokens, 4);
    }
  }
  NullHttpServer server({});
  const std::string closed = NullHttpServer({}).url();
  EXPECT_EQ(HttpLoadClient::Connect({.url = closed}).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(HttpLoadClient::Connect({.url = "https://127.0.0.1"}).status().code(), absl::StatusCode::kUnimplemented);
  for (const HttpClientOptions& bad :
       {HttpClientOptions{.url = "127.0.0.1:80"}, HttpClientOptions{.url = "http://:80"},
        HttpClientOptions{.url = "http://h:0"}, HttpClientOptions{.url = server.url(), .extra_body = "[]"},
        HttpClientOptions{.url = server.url(), .headers = {"none"}}}) {
    EXPECT_EQ(HttpLoadClient::Connect(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad.url;
  }
}

TEST(HttpClient, HangsUpAfterHalfOfTheTokens) {
  NullHttpServer server({});
  const auto records = Load({.url = server.url()}, 4, 2, /*cancel_share=*/1);
  ASSERT_EQ(records.size(), 4u);
  for (const RequestRecord& record : records) {
    EXPECT_EQ(record.outcome, "cancelled");
    EXPECT_GE(record.output_tokens, 4);
  }
}

TEST(HttpClient, SendsWhatItIsToldTo) {
  NullHttpServer server({});
  const std::string url = server.url();
  Load({.url = url + "/", .model = "other", .extra_body = R"({"ignore_eos": null, "top_k": 5})", .headers = {"X-A: b"}},
       1, 1);
  const std::string sent = server.last_request();
  EXPECT_TRUE(sent.starts_with("POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")) << sent;
  EXPECT_NE(sent.find("\r\nX-A: b\r\n"), std::string::npos);
  const auto body = nlohmann::json::parse(sent.substr(sent.find("\r\n\r\n")));
  EXPECT_EQ(body["model"], "other");
  EXPECT_EQ(body["prompt"].size(), 12u);
  EXPECT_EQ(body["max_tokens"], 9);
  EXPECT_EQ(body["top_k"], 5);
  EXPECT_FALSE(body.contains("ignore_eos"));
  EXPECT_EQ(body["return_token_ids"], true);
  EXPECT_EQ(body["stream_options"]["include_usage"], true);
  EXPECT_EQ(body["stream_options"]["continuous_usage_stats"], true);
  const auto client = HttpLoadClient::Connect({.url = url});
  ASSERT_TRUE(client.ok());
  EXPECT_EQ(*(*client)->CountTokens("12345"), 5);
  EXPECT_EQ((*client)->server().max_model_len, 65536);
}

}  // namespace
}  // namespace soloist::cli
