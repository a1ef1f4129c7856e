// The driver and the sweep in simulated time, against a server model whose behaviour is known exactly.
#include "cli/loadtest/driver.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <utility>
#include <vector>

#include "cli/loadtest/sweep.h"
#include "gtest/gtest.h"

namespace soloist::cli {
namespace {

constexpr int64_t kMs = 1'000'000;

// Time that jumps from event to event.
class SimTimer final : public LoadTimer {
 public:
  int64_t NowNs() const override { return now_ns_; }
  void WaitUntil(int64_t ns) override {
    if (!RunEvent(ns)) {
      ASSERT_NE(ns, std::numeric_limits<int64_t>::max()) << "waits for nothing";
      now_ns_ = std::max(now_ns_, ns);
    }
  }
  void Wake() override {}
  void At(int64_t ns, std::function<void()> run) { events_.emplace(ns, std::move(run)); }
  // While the driver is busy.
  void Pass(int64_t ns) {
    const int64_t until_ns = now_ns_ + ns;
    while (RunEvent(until_ns)) {
    }
    now_ns_ = until_ns;
  }

 private:
  // The next event, if it is not after `ns`.
  bool RunEvent(int64_t ns) {
    if (events_.empty() || events_.begin()->first > ns) return false;
    const auto event = events_.begin();
    now_ns_ = std::max(now_ns_, event->first);
    const std::function<void()> run = std::move(event->second);
    events_.erase(event);
    run();
    return true;
  }

  int64_t now_ns_ = 5'000'000'000;
  std::multimap<int64_t, std::function<void()>> events_;
};

// `servers` of which each takes service_ns for a request, and a queue; one token, at the end.
class SimServer final : public LoadClient {
 public:
  SimServer(SimTimer& timer, int servers, int64_t service_ns)
      : timer_(timer), free_(servers), service_ns_(service_ns) {}

  std::shared_ptr<PreparedCall> Prepare(const PlannedRequest&, RequestRecord* record,
                                        std::function<void()> done) override {
    return std::make_shared<Call>(*this, record, std::move(done));
  }
  absl::StatusOr<int> CountTokens(const std::string& text) override { return static_cast<int>(text.size()); }
  const ServerDescription& server() const override { return description_; }

  int64_t stall_until_ns = 0;  // nothing begins before
  int64_t send_cost_ns = 0;    // the client's own, per request
  int in_flight = 0;
  std::vector<std::pair<int64_t, int>> history;  // when, in flight from then on

 private:
  struct Call final : PreparedCall {
    Call(SimServer& server, RequestRecord* record, std::function<void()> done)
        : server(server), record(record), done(std::move(done)) {}
    void Send() override {
      record->sent_ns = server.timer_.NowNs();
      server.timer_.Pass(server.send_cost_ns);
      server.history.emplace_back(record->sent_ns, ++server.in_flight);
      server.queue_.push({record, done});
      server.Begin();
    }
    SimServer& server;
    RequestRecord* record;
    std::function<void()> done;
  };
  void Begin() {
    const int64_t now_ns = timer_.NowNs();
    for (; free_ > 0 && !queue_.empty(); queue_.pop()) {
      --free_;
      const auto [record, done] = queue_.front();
      timer_.At(std::max(now_ns, stall_until_ns) + service_ns_, [this, record = record, done = done] {
        record->AddChunk(timer_.NowNs(), 1);
        record->end_ns = timer_.NowNs();
        record->outcome = "ok";
        ++free_;
        history.emplace_back(record->end_ns, --in_flight);
        done();
        Begin();
      });
    }
  }

  SimTimer& timer_;
  int free_;
  const int64_t service_ns_;
  std::queue<std::pair<RequestRecord*, std::function<void()>>> queue_;
  const ServerDescription description_;
};

RequestSource Plain(int count) {
  return [count, next = 0]() mutable -> std::optional<PlannedRequest> {
    if (next++ == count) return std::nullopt;
    return PlannedRequest{};
  };
}

// Even gaps: a gamma distribution of that shape has a relative deviation of 0.1%.
constexpr double kEven = 1e6;

TEST(Driver, OpenLoopCountsFromTheIntendedTimeThroughAStall) {
  SimTimer timer;
  SimServer server(timer, 1000, 10 * kMs);
  const int64_t start_ns = timer.NowNs();
  server.stall_until_ns = start_ns + 1000 * kMs;
  const auto records = RunLoad(server, SpreadArrivals(Plain(200), Profile(100), kEven, 1), {}, timer);
  ASSERT_EQ(records.size(), 200u);
  for (size_t i = 0; i < records.size(); ++i) {
    const double meant_ms = 10.0 * static_cast<double>(i + 1);
    EXPECT_NEAR(static_cast<double>(records[i].intended_ns - start_ns) * 1e-6, meant_ms, 1);
    EXPECT_NEAR(*TtftMs(records[i]), std::max(0.0, 1000 - meant_ms) + 10, 1);  // all who were to be served, not one
  }
}

TEST(Driver, ASlowClientShowsAsLagAndInLatency) {
  SimTimer timer;
  SimServer server(timer, 1000, 10 * kMs);
  server.send_cost_ns = 30 * kMs;  // 10 ms apart were asked for
  const auto records = RunLoad(server, SpreadArrivals(Plain(100), Profile(100), kEven, 1), {}, timer);
  const Summary summary = Summarize(records, {});
  EXPECT_NEAR(summary.lag_ms.max, 99 * 20, 2);
  EXPECT_NEAR(summary.latency_ms.max, 99 * 20 + 30 + 10, 2);
}

TEST(Driver, ArrivalsFollowStagesAndRamps) {
  SimTimer timer;
  SimServer server(timer, 100000, kMs);
  const auto profile = Profile::Parse("--rate", "200:20,0:5,0-1000:20");
  ASSERT_TRUE(profile.ok()) << profile.status();
  const int64_t start_ns = timer.NowNs();
  const auto records = RunLoad(server, SpreadArrivals(Plain(1 << 20), *profile, 1, 7), {}, timer);
  // Poisson counts: 4000, 0, and 2500 and 7500 in the halves of the ramp; five standard deviations.
  const auto between = [&](double from_s, double to_s) {
    return std::ranges::count_if(records, [&](const RequestRecord& r) {
      const double s = static_cast<double>(r.intended_ns - start_ns) * 1e-9;
      return s >= from_s && s < to_s;
    });
  };
  EXPECT_NEAR(between(0, 20), 4000, 5 * std::sqrt(4000));
  EXPECT_EQ(between(20, 25), 0);
  EXPECT_NEAR(between(25, 35), 2500, 5 * std::sqrt(2500));
  EXPECT_NEAR(between(35, 45), 7500, 5 * std::sqrt(7500));
  EXPECT_EQ(between(45, 1e9), 0);
}

TEST(Driver, FixedConcurrencyIsKept) {
  SimTimer timer;
  SimServer server(timer, 100, 10 * kMs);
  const int64_t start_ns = timer.NowNs();
  const auto records = RunLoad(server, Plain(30), {.concurrency = Profile(3)}, timer);
  ASSERT_EQ(records.size(), 30u);
  EXPECT_EQ(records.back().end_ns - start_ns, 100 * kMs);
  for (size_t i = 0; i < records.size(); ++i) {
    EXPECT_EQ(records[i].intended_ns - start_ns, static_cast<int64_t>(i / 3) * 10 * kMs);
  }
}

TEST(Driver, ConcurrencyRampsAndFallsAndStops) {
  SimTimer timer;
  SimServer server(timer, 1000, 10 * kMs);
  const auto profile = Profile::Parse("--concurrency", "0-20:10,5:10");
  ASSERT_TRUE(profile.ok());
  const int64_t start_ns = timer.NowNs();
  const auto records = RunLoad(server, Plain(1 << 20), {.concurrency = *profile}, timer);
  // Each place turns over 100 times/s: 10 places on average, then 5.
  EXPECT_NEAR(static_cast<double>(records.size()), 10 * 10 * 100 + 5 * 10 * 100, 120);
  int largest = 0;
  for (const auto& [ns, in_flight] : server.history) {
    const double s = static_cast<double>(ns - start_ns) * 1e-9;
    largest = std::max(largest, in_flight);
    const double most = s < 10 ? std::round(2 * s + 1e-3) : s < 10.011 ? 20 : 5;
    EXPECT_LE(in_flight, most) << s;
    EXPECT_LT(s, 20.011);
  }
  EXPECT_EQ(largest, 20);
}

TEST(Driver, DurationEndsASendingLoop) {
  SimTimer timer;
  SimServer server(timer, 4, 10 * kMs);
  EXPECT_EQ(RunLoad(server, Plain(1 << 20), {.concurrency = Profile(4), .stop_after_ns = 1000 * kMs}, timer).size(),
            400u);
  const auto open =
      RunLoad(server, SpreadArrivals(Plain(1 << 20), Profile(50), kEven, 1), {.stop_after_ns = 1010 * kMs}, timer);
  EXPECT_EQ(open.size(), 50u);
}

TEST(Profile, FlagIsChecked) {
  for (const char* bad : {"", "0", "-3", "x", "5:", "5:0", ":3", "1-2-3:4", "5:10,", "0:10", "nan", "1e9"}) {
    EXPECT_FALSE(Profile::Parse("--rate", bad).ok()) << bad;
  }
}

// The knee of evenly spaced arrivals at 2 servers of 20 ms is 100/s exactly: nobody waits below, the queue grows above.
TEST(Sweep, FindsTheKneeOfAKnownServer) {
  const Goodput objectives = *ParseGoodput("ttft:25");
  SweepOptions options = *ParseSweep("rate:10:1000");
  options.precision = 0.03;
  const auto knee = FindKnee(options, [&](double rate) -> absl::StatusOr<SweepVerdict> {
    SimTimer timer;
    SimServer server(timer, 2, 20 * kMs);
    const auto records = RunLoad(server, SpreadArrivals(Plain(3000), Profile(rate), kEven, 1), {}, timer);
    return Judge(Summarize(records, objectives), true, options);
  });
  ASSERT_TRUE(knee.ok());
  ASSERT_TRUE(knee->load.has_value());
  EXPECT_LE(*knee->load, 100.5);
  EXPECT_GE(*knee->load, 100 / 1.03);
  EXPECT_FALSE(knee->at_limit);
  EXPECT_EQ(knee->points[3].first, 80);
  EXPECT_EQ(knee->points[4].first, 160);
  EXPECT_LT(knee->points.size(), 11u);
}

TEST(Sweep, WholeConcurrencyLimitsAndErrors) {
  const auto up_to = [](double limit) {
    return [limit](double load) -> absl::StatusOr<SweepVerdict> {
      EXPECT_EQ(load, std::floor(load));
      return SweepVerdict{load <= limit, ""};
    };
  };
  SweepOptions options = *ParseSweep("concurrency:1:64");
  options.precision = 0.001;
  EXPECT_EQ(FindKnee(options, up_to(23))->load, 23);
  EXPECT_EQ(FindKnee(options, up_to(1))->load, 1);
  EXPECT_FALSE(FindKnee(options, up_to(0))->load.has_value());
  const Knee above = *FindKnee(options, up_to(1000));
  EXPECT_EQ(above.load, 64);
  EXPECT_TRUE(above.at_limit);
  EXPECT_EQ(above.points.size(), 7u);
  EXPECT_FALSE(FindKnee(options, [](double) { return absl::StatusOr<SweepVerdict>(absl::AbortedError("x")); }).ok());
  EXPECT_FALSE(Judge(Summary{.goodput_share = 1}, /*valid=*/false, options).sustained);
  for (const char* bad : {"", "rate", "rate:1", "rate:0:5", "rate:5:1", "load:1:5", "concurrency:1.5:3", "rate:x:5"}) {
    EXPECT_FALSE(ParseSweep(bad).ok()) << bad;
  }
}

}  // namespace
}  // namespace soloist::cli
