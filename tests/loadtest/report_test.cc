// JSON, CSV, HTML and the live line of a small run.
#include "cli/loadtest/report.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cli/loadtest/html.h"
#include "cli/loadtest/live.h"
#include "gtest/gtest.h"

namespace soloist::cli {
namespace {

constexpr int64_t kMs = 1'000'000;

std::vector<RequestRecord> Records() {
  std::vector<RequestRecord> out(3);
  for (int i = 0; i < 3; ++i) {
    RequestRecord& r = out[i];
    r.intended_ns = r.sent_ns = (100 + 10 * i) * kMs;
    r.token_source = TokenSource::kTokenIds;
    for (int t = 1; t <= 4; ++t) r.AddChunk(r.sent_ns + t * (5 + i) * kMs, 1);
    r.end_ns = r.chunks.back().ns;
    r.prompt_tokens = 10;
    r.outcome = "ok";
  }
  out[2].outcome = "bad, \"very\" <bad>";
  return out;
}

TEST(Report, CsvQuotesAndHasAColumnPerField) {
  const auto records = Records();
  const std::string csv = RequestsToCsv(records, records.front().intended_ns);
  EXPECT_EQ(csv.substr(0, csv.find('\n')),
            "outcome,intended_ms,lag_ms,prompt_tokens,output_tokens,ttft_ms,tpot_ms,latency_ms");
  EXPECT_NE(csv.find("\nok,10.0,0.0,10,4,6.0,6.0,24.0\n"), std::string::npos) << csv;
  EXPECT_NE(csv.find("\n\"bad, \"\"very\"\" <bad>\",20.0,"), std::string::npos) << csv;
}

TEST(Report, JsonHasEveryDistributionAndSource) {
  const Goodput goodput = *ParseGoodput("ttft:5.5");
  const auto json = SummaryToJson(Summarize(Records(), goodput), goodput);
  EXPECT_EQ(json["token_sources"]["token_ids"], 2);
  EXPECT_EQ(json["ttft_ms"]["max"], 6.0);
  EXPECT_DOUBLE_EQ(json["goodput_share"].get<double>(), 1.0 / 3);
  for (const auto& [name, value] : kDistributions) EXPECT_TRUE(json.contains(name)) << name;
  EXPECT_FALSE(SummaryToJson({}, {}).contains("goodput_share"));
  EXPECT_GT(MachineToJson()["threads"], 0);
}

// The page is XHTML enough for this: every element is closed but the first two lines' meta.
void ExpectBalanced(const std::string& page) {
  std::vector<std::string> open;
  for (size_t at = 0; (at = page.find('<', at)) != std::string::npos;) {
    const size_t end = page.find('>', at);
    ASSERT_NE(end, std::string::npos);
    const std::string tag = page.substr(at + 1, end - at - 1);
    at = end;
    if (tag.starts_with('!') || tag.starts_with("meta") || tag.ends_with('/')) continue;
    if (tag.starts_with('/')) {
      ASSERT_FALSE(open.empty()) << tag;
      ASSERT_EQ(tag.substr(1), open.back());
      open.pop_back();
    } else {
      open.push_back(tag.substr(0, tag.find(' ')));
    }
  }
  EXPECT_TRUE(open.empty());
}

TEST(Html, RunPageHoldsItsDataAndAsksForNothing) {
  const auto records = Records();
  const Summary summary = Summarize(records, {});
  const std::string page = ToHtml({.title = "a <b> & \"c\"",
                                   .facts = {{"x<y", "1"}},
                                   .table = DistributionTable(summary),
                                   .plots = RunPlots(records),
                                   .notes = "<script>"});
  ExpectBalanced(page);
  for (const char* outside : {"http:", "https:", "<script", "src=", "href=", "url(", "@import"}) {
    EXPECT_EQ(page.find(outside), std::string::npos) << outside;
  }
  EXPECT_NE(page.find("<h1>a &lt;b&gt; &amp; &quot;c&quot;</h1>"), std::string::npos);
  EXPECT_NE(page.find("prefers-color-scheme:dark"), std::string::npos);
  EXPECT_NE(page.find("<td>ttft_ms</td><td>2</td><td>5.500</td><td>5.000</td>"), std::string::npos);
  const auto plots = RunPlots(records);
  ASSERT_EQ(plots.size(), 5u);
  using Points = std::vector<std::pair<double, double>>;
  EXPECT_EQ(plots[0].series.at(0).points, (Points{{5, 50}, {6, 100}, {6, 100}}));
  double tokens = 0;
  for (const auto& [s, per_s] : plots[4].series.at(0).points) tokens += per_s * summary.wall_s / 100;
  EXPECT_NEAR(tokens, 12, 1e-6);
}

TEST(Html, SweepPageHasAPointPerLoad) {
  std::vector<LoadPoint> points;
  for (const double load : {4.0, 1.0, 2.0}) {
    LoadPoint point{.load = load, .sustained = load < 4, .summary = Summarize(Records(), {})};
    point.summary.ttft_ms.p99 = 10 * load;
    points.push_back(point);
  }
  const auto plots = SweepPlots(points, "rate");
  EXPECT_EQ(plots[0].series.at(1).points, (std::vector<std::pair<double, double>>{{1, 10}, {2, 20}, {4, 40}}));
  const std::string page = ToHtml({.title = "t", .plots = plots});
  ExpectBalanced(page);
  size_t circles = 0;
  for (size_t at = 0; (at = page.find("<circle", at)) != std::string::npos; ++at) ++circles;
  EXPECT_EQ(circles, 4u * 2 * 3);
}

TEST(Live, LineHasRatesOfTheWindowAndFitsTheTerminal) {
  LiveStats stats;
  stats.Line(0, 0, 200);
  for (int i = 0; i < 100; ++i) {
    stats.Sent();
    stats.FirstToken(20 * kMs);
    stats.Gap(i < 98 ? kMs : 100 * kMs);
    stats.Tokens(7);
    if (i < 90) stats.Ended(i != 0);
  }
  const std::string line = stats.Line(2'000 * kMs, 0.5, 300);
  EXPECT_TRUE(line.starts_with("[########........]  50%  10 running  44.5 req/s  output 350 tok/s  TTFT ")) << line;
  EXPECT_TRUE(line.ends_with("  1 failed")) << line;
  EXPECT_EQ(stats.Line(3'000 * kMs, 0.5, 40).size(), 40u);
  // Buckets are an eighth of an octave wide: within 9.1% above.
  LiveHistogram histogram;
  for (int64_t ms = 1; ms <= 1000; ++ms) histogram.Add(ms * kMs);
  const auto counts = histogram.Take();
  for (const double q : {0.1, 0.5, 0.99, 1.0}) {
    EXPECT_GE(LiveHistogram::QuantileMs(counts, q), 1000 * q);
    EXPECT_LE(LiveHistogram::QuantileMs(counts, q), 1000 * q * 1.091);
  }
  EXPECT_EQ(LiveHistogram::QuantileMs({}, 0.5), 0);
}

}  // namespace
}  // namespace soloist::cli
