// RequestMetrics: what the server counts of requests, as they happen. docs/metrics.md says what each is called outside.
#ifndef SOLOIST_SERVER_METRICS_REQUEST_METRICS_H_
#define SOLOIST_SERVER_METRICS_REQUEST_METRICS_H_

#include <array>
#include <atomic>
#include <cstdint>

#include "absl/status/status.h"
#include "scheduler/request.h"
#include "server/metrics/histogram.h"

namespace soloist {

// Any thread. Outputs of one request (n > 1) count one by one.
class RequestMetrics {
 public:
  RequestMetrics();

  // An output's first token, so long after the server had received the request.
  void FirstToken(int64_t since_received_ns) { time_to_first_token.Observe(Seconds(since_received_ns)); }
  // Each further one, so long after the one before.
  void NextToken(int64_t gap_ns) { inter_token_latency.Observe(Seconds(gap_ns)); }
  // An output has ended with so many tokens, of a request that the server had received at received_ns.
  void Ended(const FinishEvent& event, int64_t received_ns, int32_t num_prompt_tokens, int32_t num_output_tokens);
  // A request was not accepted.
  void Refused(absl::StatusCode code) { ++refused[static_cast<size_t>(code)]; }

  // Seconds.
  Histogram time_to_first_token;
  Histogram inter_token_latency;
  Histogram time_per_output_token;
  Histogram e2e_latency;
  Histogram queue_time;
  Histogram prefill_time;
  Histogram decode_time;
  // Tokens.
  Histogram prompt_tokens;
  Histogram generation_tokens;

  std::array<std::atomic<int64_t>, 5> ended{};     // [FinishReason]
  std::array<std::atomic<int64_t>, 17> refused{};  // [absl::StatusCode]

 private:
  static double Seconds(int64_t ns) { return static_cast<double>(ns) * 1e-9; }
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_METRICS_REQUEST_METRICS_H_
