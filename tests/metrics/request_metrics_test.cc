#include "server/metrics/request_metrics.h"

#include <numeric>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace soloist {
namespace {

TEST(Histogram, AValueBelongsToTheFirstBoundNotBelowIt) {
  constexpr double kBounds[] = {1, 2, 4};
  Histogram histogram(kBounds);
  for (const double value : {0.0, 1.0, 1.5, 2.0, 4.0, 4.5, 1000.0}) histogram.Observe(value);
  const Histogram::Snapshot snapshot = histogram.Take();
  EXPECT_EQ(snapshot.counts, (std::vector<int64_t>{2, 2, 1, 2}));
  EXPECT_EQ(snapshot.sum, 1013.0);
}

TEST(Histogram, NoObservationIsLostBetweenThreads) {
  constexpr double kBounds[] = {1, 2};
  Histogram histogram(kBounds);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&histogram, t] {
      for (int i = 0; i < 20'000; ++i) histogram.Observe(t);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Histogram::Snapshot snapshot = histogram.Take();
  EXPECT_EQ(snapshot.counts, (std::vector<int64_t>{40'000, 20'000, 20'000}));
  EXPECT_EQ(snapshot.sum, 20'000.0 * (0 + 1 + 2 + 3));
}

int64_t Count(const Histogram& histogram) {
  const auto counts = histogram.Take().counts;
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

TEST(RequestMetrics, TimesOfAnOutputByHand) {
  constexpr int64_t kMs = 1'000'000;
  RequestMetrics metrics;
  FinishEvent event{.reason = FinishReason::kLength};
  event.times = {.arrival_ns = 110 * kMs,
                 .first_scheduled_ns = 150 * kMs,
                 .first_token_ns = 250 * kMs,
                 .last_token_ns = 650 * kMs};
  metrics.Ended(event, /*received_ns=*/100 * kMs, /*num_prompt_tokens=*/7, /*num_output_tokens=*/5);
  EXPECT_NEAR(metrics.queue_time.Take().sum, 0.050, 1e-12);
  EXPECT_NEAR(metrics.prefill_time.Take().sum, 0.100, 1e-12);
  EXPECT_NEAR(metrics.decode_time.Take().sum, 0.400, 1e-12);
  EXPECT_NEAR(metrics.e2e_latency.Take().sum, 0.550, 1e-12);
  EXPECT_NEAR(metrics.time_per_output_token.Take().sum, 0.100, 1e-12);
  EXPECT_EQ(metrics.prompt_tokens.Take().sum, 7);
  EXPECT_EQ(metrics.generation_tokens.Take().sum, 5);
}

TEST(RequestMetrics, OneTokenHasNoTimePerToken) {
  RequestMetrics metrics;
  metrics.Ended({.reason = FinishReason::kStop}, 0, 3, 1);
  EXPECT_EQ(Count(metrics.e2e_latency), 1);
  EXPECT_EQ(Count(metrics.time_per_output_token), 0);
}

TEST(RequestMetrics, BrokenOutputsCountByReasonOnly) {
  RequestMetrics metrics;
  for (const FinishReason reason : {FinishReason::kCancelled, FinishReason::kError, FinishReason::kCancelled}) {
    metrics.Ended({.reason = reason}, 0, 3, 9);
  }
  EXPECT_EQ(metrics.ended[static_cast<size_t>(FinishReason::kCancelled)], 2);
  EXPECT_EQ(metrics.ended[static_cast<size_t>(FinishReason::kError)], 1);
  EXPECT_EQ(Count(metrics.e2e_latency), 0);
  EXPECT_EQ(Count(metrics.generation_tokens), 0);
}

}  // namespace
}  // namespace soloist
