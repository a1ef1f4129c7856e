// Workloads, arrivals and metrics of the load tester: hand-computed cases, and statistics against theory.
#include <cmath>
#include <fstream>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cli/loadtest/metrics.h"
#include "cli/loadtest/url.h"
#include "cli/loadtest/workload.h"
#include "gtest/gtest.h"

namespace soloist::cli {
namespace {

TEST(Lengths, DrawsFollowTheirDistribution) {
  std::mt19937_64 random(1);
  double sum = 0, logs = 0;
  for (int i = 0; i < 20000; ++i) {
    const int uniform = LengthDistribution::Parse("uniform:10:20")->Draw(random);
    EXPECT_GE(uniform, 10);
    EXPECT_LE(uniform, 20);
    sum += LengthDistribution::Parse("normal:1000:100")->Draw(random);
    logs += std::log(LengthDistribution::Parse("lognormal:1000:0.5")->Draw(random));
  }
  // Five standard errors: 100 / sqrt(20000) = 0.71, 0.5 / sqrt(20000) = 0.0035.
  EXPECT_NEAR(sum / 20000, 1000, 3.6);
  EXPECT_NEAR(logs / 20000, std::log(1000), 0.018);
  EXPECT_EQ(LengthDistribution::Parse("7")->Draw(random), 7);
  for (const char* bad : {"", "0", "x", "uniform:5", "uniform:9:5", "normal:1:2:3", "zipf:1:2", "-3", "nan"}) {
    EXPECT_FALSE(LengthDistribution::Parse(bad).ok()) << bad;
  }
}

TEST(Workload, IsAFunctionOfItsSeedAndSharesPrefixes) {
  WorkloadOptions options{
      .count = 6, .input_length = "uniform:3:9", .prefix_length = 4, .num_prefixes = 2, .vocab_size = 1000, .seed = 5};
  const auto a = TakeAll(*RandomWorkload(options)), b = TakeAll(*RandomWorkload(options));
  ASSERT_EQ(a.size(), 6u);
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(a[i].prompt, b[i].prompt);
    for (int t = 0; t < 4; ++t) EXPECT_EQ(a[i].prompt[t], a[i % 2].prompt[t]);
  }
  EXPECT_NE(a[0].prompt, a[1].prompt);
  options.seed = 6;
  EXPECT_NE(TakeAll(*RandomWorkload(options)).front().prompt, a.front().prompt);
}

TEST(Workload, TraceBlocksWithEqualHashesAreEqual) {
  const std::string path = testing::TempDir() + "/trace.jsonl";
  std::ofstream(path) << R"({"timestamp": 30, "input_length": 600, "output_length": 5, "hash_ids": [1, 3]})"
                         "\n"
                      << R"({"timestamp": 10, "input_length": 1000, "output_length": 7, "hash_ids": [1, 2]})"
                         "\n";
  const auto source = TraceWorkload(path, {.count = 10, .vocab_size = 5000}, 2);
  ASSERT_TRUE(source.ok()) << source.status();
  const auto requests = TakeAll(*source);
  ASSERT_EQ(requests.size(), 2u);
  const PlannedRequest &first = requests[0], &second = requests[1];
  EXPECT_EQ(first.at_ns, 5'000'000);
  EXPECT_EQ(second.at_ns, 15'000'000);
  EXPECT_EQ(first.prompt.size(), 1000u);
  EXPECT_EQ(second.prompt.size(), 600u);
  EXPECT_TRUE(std::equal(first.prompt.begin(), first.prompt.begin() + 512, second.prompt.begin()));
  EXPECT_NE(first.prompt[512], second.prompt[512]);
  std::ofstream(path) << "{}\n";
  EXPECT_FALSE(TraceWorkload(path, {.vocab_size = 5000}, 1).ok());
}

TEST(Workload, DatasetsOfBothKinds) {
  const std::string path = testing::TempDir() + "/dataset.jsonl";
  const auto count = [](const std::string& text) -> absl::StatusOr<int> { return static_cast<int>(text.size()); };
  std::ofstream(path)
      << R"({"prompt": "one", "output_len": 7})"
         "\n\n"
      << R"({"conversations": [{"from": "human", "value": "two"}, {"from": "gpt", "value": "12345"}]})"
         "\n"
      << R"({"conversations": [{"from": "human", "value": "no answer"}]})"
         "\n"
      << R"({"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "12"}]})"
         "\n";
  const auto lines = DatasetWorkload(path, 100, count);
  ASSERT_TRUE(lines.ok()) << lines.status();
  const auto requests = TakeAll(*lines);
  ASSERT_EQ(requests.size(), 3u);
  EXPECT_EQ(requests[0].text, "one");
  EXPECT_EQ(requests[0].output_tokens, 7);
  EXPECT_EQ(requests[1].output_tokens, 5);
  EXPECT_EQ(requests[2].text, "three");
  EXPECT_EQ(TakeAll(*DatasetWorkload(path, 2, count)).size(), 2u);
  std::ofstream(path) << R"([{"prompt": "x", "output_length": 2}, 5, {"prompt": "y"}])";
  EXPECT_EQ(TakeAll(*DatasetWorkload(path, 100, count)).size(), 1u);
  for (const char* bad : {"", "[", "{}\n", "nonsense\n", "[5]"}) {
    std::ofstream(path) << bad;
    EXPECT_FALSE(DatasetWorkload(path, 100, count).ok()) << bad;
  }
}

TEST(Url, Parts) {
  const auto parts = [](std::string_view text) {
    const auto url = ParseUrl(text);
    return url.ok() ? url->host + "|" + url->port + "|" + url->prefix : std::string("refused");
  };
  EXPECT_EQ(parts("http://h"), "h|80|");
  EXPECT_EQ(parts("http://h:81/a/b/"), "h|81|/a/b");
  EXPECT_EQ(parts("http://[::1]:81"), "::1|81|");
  EXPECT_EQ(parts("http://[::1]/"), "::1|80|");
  for (const char* bad : {"h:80", "https://h", "http://", "http://:80", "http://h:0", "http://h:65536", "http://h:x"}) {
    EXPECT_EQ(parts(bad), "refused") << bad;
  }
}

TEST(Arrivals, GapsHaveTheMeanAndTheVarianceOfTheirGamma) {
  constexpr int kCount = 50000;
  for (const double shape : {0.5, 1.0, 4.0}) {
    int left = kCount;
    const RequestSource source = [&]() -> std::optional<PlannedRequest> {
      if (left-- == 0) return std::nullopt;
      return PlannedRequest{};
    };
    const auto requests = TakeAll(SpreadArrivals(source, Profile(100), shape, 3));
    ASSERT_EQ(requests.size(), static_cast<size_t>(kCount));
    double sum = 0, squares = 0;
    int64_t before = 0;
    for (const auto& request : requests) {
      const double gap_s = static_cast<double>(request.at_ns - before) * 1e-9;
      before = request.at_ns;
      sum += gap_s;
      squares += gap_s * gap_s;
    }
    const double mean = sum / kCount, variance = squares / kCount - mean * mean;
    // Five standard errors of the mean; the variance within 8%.
    EXPECT_NEAR(mean, 0.01, 5 * 0.01 / std::sqrt(shape * kCount)) << shape;
    EXPECT_NEAR(variance, 1e-4 / shape, 0.08e-4 / shape) << shape;
  }
}

// 1 token at 10 ms, 3 at 20 ms, 1 at 50 ms; meant for 0, sent at 2 ms.
RequestRecord Example() {
  RequestRecord r;
  r.sent_ns = 2'000'000;
  r.chunks = {{10'000'000, 1}, {20'000'000, 3}, {50'000'000, 1}};
  r.end_ns = 60'000'000;
  r.prompt_tokens = 7;
  r.output_tokens = 5;
  r.outcome = "ok";
  r.engine_ttft_ns = 5'000'000;
  return r;
}

TEST(Metrics, HandComputed) {
  RequestRecord refused;
  refused.outcome = "UNAVAILABLE";
  refused.end_ns = 100'000'000;
  const std::vector<RequestRecord> records = {Example(), refused};
  const Summary s = Summarize(records, *ParseGoodput("ttft:10,tpot:10"));
  EXPECT_DOUBLE_EQ(s.ttft_ms.mean, 10);  // from the intended time, not from the late one
  EXPECT_DOUBLE_EQ(s.tpot_ms.mean, 10);  // 40 ms / 4
  EXPECT_EQ(s.itl_ms.count, 4u);
  EXPECT_DOUBLE_EQ(s.itl_ms.mean, 10);  // 10, 0, 0, 30
  EXPECT_DOUBLE_EQ(s.itl_ms.median, 0);
  EXPECT_EQ(s.chunk_gap_ms.count, 2u);
  EXPECT_DOUBLE_EQ(s.chunk_gap_ms.mean, 20);
  EXPECT_DOUBLE_EQ(s.network_ttft_ms.mean, 3);  // 10 - 2 - 5
  EXPECT_DOUBLE_EQ(s.lag_ms.max, 2);
  EXPECT_DOUBLE_EQ(s.wall_s, 0.1);
  EXPECT_DOUBLE_EQ(s.output_tokens_per_s, 50);
  EXPECT_DOUBLE_EQ(s.total_tokens_per_s, 120);
  EXPECT_DOUBLE_EQ(s.goodput_per_s, 10);
  EXPECT_EQ(s.outcomes.at("UNAVAILABLE"), 1);
  EXPECT_DOUBLE_EQ(Summarize(records, *ParseGoodput("tpot:9.9")).goodput_per_s, 0);
}

TEST(Metrics, NearestRankPercentiles) {
  std::vector<double> values;
  for (int i = 1000; i >= 1; --i) values.push_back(i);
  const Distribution d = Distribute(values);
  EXPECT_EQ(d.median, 500);
  EXPECT_EQ(d.p90, 900);
  EXPECT_EQ(d.p99, 990);
  EXPECT_EQ(d.p999, 999);
  EXPECT_EQ(d.max, 1000);
  EXPECT_EQ(Distribute({3}).p999, 3);
  EXPECT_EQ(Distribute({}).count, 0u);
}

TEST(Metrics, OneTokenHasNoTpot) {
  RequestRecord r = Example();
  r.chunks.resize(1);
  r.output_tokens = 1;
  EXPECT_FALSE(TpotMs(r).has_value());
  EXPECT_TRUE(Meets(r, *ParseGoodput("tpot:1")));
}

TEST(Metrics, GoodputFlagIsChecked) {
  for (const char* bad : {"ttft", "ttft:x", "itl:3", "ttft:-1", "ttft:1,"}) EXPECT_FALSE(ParseGoodput(bad).ok()) << bad;
}

TEST(Compare, IntervalHoldsTheTrueRatio) {
  std::mt19937_64 random(9);
  std::normal_distribution<double> noise(100, 10);
  std::vector<double> a(400), b(400);
  for (double& value : a) value = noise(random);
  for (double& value : b) value = 2 * noise(random);
  const Ratio r = CompareMeans(a, b, 1);
  EXPECT_LT(r.low, r.ratio);
  EXPECT_GT(r.high, r.ratio);
  EXPECT_NEAR(r.ratio, 2, 0.05);
  // Standard error of the ratio: 2 * 0.1 * sqrt(2 / 400) = 0.014; the interval is 3.9 of it wide.
  EXPECT_NEAR(r.high - r.low, 0.055, 0.012);
}

}  // namespace
}  // namespace soloist::cli
