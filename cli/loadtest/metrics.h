// What a load test measured of each request, and the numbers made of it. Definitions: docs/bench.md.
#ifndef SOLOIST_CLI_LOADTEST_METRICS_H_
#define SOLOIST_CLI_LOADTEST_METRICS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace soloist::cli {

class LiveStats;

struct Chunk {
  int64_t ns = 0;
  int tokens = 0;  // 0 where only the whole output was counted
};

// How a request's output tokens were counted; never by counting messages.
enum class TokenSource {
  kNone,
  kTokenIds,
  kUsagePerChunk,  // OpenAI's usage, in each event
  kUsageAtEnd,     // OpenAI's usage, once: no token has a time of its own but the first and the last message's
};
const char* NameOf(TokenSource source);

// Times are of the client's monotonic clock, except the engine's durations.
struct RequestRecord {
  int64_t intended_ns = 0;  // when it should have been sent; latencies count from here
  int64_t sent_ns = 0;
  int64_t end_ns = 0;
  int prompt_tokens = 0;  // the server's own count, if it gave one
  int output_tokens = 0;  // received
  TokenSource token_source = TokenSource::kNone;
  std::vector<Chunk> chunks;    // messages that held tokens
  std::string outcome;          // "ok", "cancelled" (asked for), or what kind of thing went wrong
  std::string detail;           // the server's words about it
  int cancel_after_tokens = 0;  // the client hangs up after that many; 0: never
  // From the server's answer; absent if it did not say.
  std::optional<int64_t> engine_queue_ns, engine_ttft_ns, engine_total_ns;
  LiveStats* live = nullptr;

  // A message with that many tokens has come.
  void AddChunk(int64_t now_ns, int tokens);
  bool ok() const { return outcome == "ok"; }
};

// In milliseconds. Absent where undefined: no token, or a single one.
std::optional<double> TtftMs(const RequestRecord& record);
std::optional<double> TpotMs(const RequestRecord& record);
double LatencyMs(const RequestRecord& record);
// Gaps between consecutive tokens; tokens of one message are 0 apart. None where tokens have no times of their own.
void AppendItlMs(const RequestRecord& record, std::vector<double>& out);

// p99 is the smallest value that 99% of the values do not exceed (nearest rank). The median too.
struct Distribution {
  size_t count = 0;
  double mean = 0, median = 0, p90 = 0, p99 = 0, p999 = 0, max = 0;
};
Distribution Distribute(std::vector<double> values);

// Objectives, in ms; absent: none.
struct Goodput {
  std::optional<double> ttft_ms, tpot_ms, latency_ms;
  bool stated() const { return ttft_ms || tpot_ms || latency_ms; }
};
// "ttft:200,tpot:20,e2e:5000".
absl::StatusOr<Goodput> ParseGoodput(std::string_view text);
// An ok request whose TPOT is undefined meets a TPOT objective.
bool Meets(const RequestRecord& record, const Goodput& objectives);

struct Summary {
  double wall_s = 0;                             // first intended send to last end
  int64_t prompt_tokens = 0, output_tokens = 0;  // of ok requests
  int64_t received_tokens = 0;                   // of all requests
  std::map<std::string, int> outcomes;
  std::map<std::string, int> token_sources;  // of ok requests
  double requests_per_s = 0, output_tokens_per_s = 0, total_tokens_per_s = 0, goodput_per_s = 0;
  double goodput_share = 0;  // requests that meet every objective / all that were not cancelled on purpose
  // Of ok requests.
  Distribution ttft_ms, tpot_ms, itl_ms, chunk_gap_ms, latency_ms;
  Distribution engine_queue_ms, engine_ttft_ms, network_ttft_ms;
  // Of all: how late the client itself sent.
  Distribution lag_ms;
};
Summary Summarize(std::span<const RequestRecord> records, const Goodput& objectives);

struct Ratio {
  double ratio = 0, low = 0, high = 0;
};
// mean(b) / mean(a), with a 95% percentile bootstrap over requests. Requires neither empty.
Ratio CompareMeans(std::span<const double> a, std::span<const double> b, uint64_t seed);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_METRICS_H_
