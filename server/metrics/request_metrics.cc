#include "server/metrics/request_metrics.h"

namespace soloist {
namespace {

// From a fifth of a millisecond: a token of a small model, or of a large one on many GPUs.
constexpr double kTokenSeconds[] = {0.0002, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02,
                                    0.03,   0.04,   0.05,  0.075, 0.1,   0.15,  0.2,   0.3,    0.5,  1,     5};
constexpr double kRequestSeconds[] = {0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1,
                                      1.5,    2,      2.5,   5,     10,    15,   20,   30,   60,  120, 240, 480, 960};
constexpr double kTokens[] = {1,    2,    5,    10,    20,    50,    100,    200,    500,
                              1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000};

}  // namespace

RequestMetrics::RequestMetrics()
    : time_to_first_token(kRequestSeconds),
      inter_token_latency(kTokenSeconds),
      time_per_output_token(kTokenSeconds),
      e2e_latency(kRequestSeconds),
      queue_time(kRequestSeconds),
      prefill_time(kRequestSeconds),
      decode_time(kRequestSeconds),
      prompt_tokens(kTokens),
      generation_tokens(kTokens) {}

void RequestMetrics::Ended(const FinishEvent& event, int64_t received_ns, int32_t num_prompt_tokens,
                           int32_t num_output_tokens) {
  ++ended[static_cast<size_t>(event.reason)];
  // As in vLLM, only whole answers count: the lengths and times of the others are the client's doing, or a failure's.
  if (event.reason != FinishReason::kStop && event.reason != FinishReason::kLength) return;
  prompt_tokens.Observe(num_prompt_tokens);
  generation_tokens.Observe(num_output_tokens);
  // One that only scored its prompt has no token whose time could be told.
  if (num_output_tokens == 0) return;
  const RequestTimes& t = event.times;
  e2e_latency.Observe(Seconds(t.last_token_ns - received_ns));
  queue_time.Observe(Seconds(t.first_scheduled_ns - received_ns));
  prefill_time.Observe(Seconds(t.first_token_ns - t.first_scheduled_ns));
  decode_time.Observe(Seconds(t.last_token_ns - t.first_token_ns));
  if (num_output_tokens > 1) {
    time_per_output_token.Observe(Seconds(t.last_token_ns - t.first_token_ns) / (num_output_tokens - 1));
  }
}

}  // namespace soloist
