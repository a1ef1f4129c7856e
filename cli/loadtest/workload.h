// What a load test asks for, and when: prompts, output lengths, arrival times. Functions of their options and a seed;
// no network, no clock.
#ifndef SOLOIST_CLI_LOADTEST_WORKLOAD_H_
#define SOLOIST_CLI_LOADTEST_WORKLOAD_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/loadtest/profile.h"

namespace soloist::cli {

// A number of tokens. "128", "uniform:LOW:HIGH" (both included), "normal:MEAN:STDDEV", "lognormal:MEDIAN:SIGMA" (sigma
// of the natural log). Draws are rounded, and at least 1.
class LengthDistribution {
 public:
  static absl::StatusOr<LengthDistribution> Parse(std::string_view text);
  int Draw(std::mt19937_64& random) const;

 private:
  enum class Kind { kFixed, kUniform, kNormal, kLognormal };
  Kind kind_ = Kind::kFixed;
  double a_ = 1, b_ = 0;
};

struct PlannedRequest {
  std::vector<int32_t> prompt;
  std::string text;  // if not empty, the prompt is this text, and `prompt` is empty
  int output_tokens = 1;
  int64_t at_ns = 0;  // intended send time, from the start of the run
};

// The next request, in order of at_ns; none after the last. Called by one thread.
using RequestSource = std::function<std::optional<PlannedRequest>()>;

struct WorkloadOptions {
  int64_t count = 100;
  std::string input_length = "128", output_length = "64";
  int prefix_length = 0;  // tokens that requests share, ahead of their own
  int num_prefixes = 1;
  int vocab_size = 1;
  uint64_t seed = 0;
};

// Uniformly drawn token ids; all arrive at 0. A prefix is drawn once and given to requests in turn.
absl::StatusOr<RequestSource> RandomWorkload(const WorkloadOptions& options);

// Mooncake's JSON lines: timestamp (ms), input_length, output_length, hash_ids (one per 512 tokens; equal ids are equal
// tokens). Takes the first `count` lines, `speed` times as fast.
absl::StatusOr<RequestSource> TraceWorkload(const std::string& path, const WorkloadOptions& options, double speed);

// ShareGPT's conversations, as a JSON array or as JSON lines. Each object has either `prompt` (text) and `output_len`
// (or `output_length`, tokens), or `conversations` (or `messages`): turns with `value` (or `content`); the first is the
// prompt, and the answer is as long as the second, in tokens as `count_tokens` finds. Objects without both are left
// out. Takes the first `count`; all arrive at 0. InvalidArgument if none is left.
absl::StatusOr<RequestSource> DatasetWorkload(
    const std::string& path, int64_t count,
    const std::function<absl::StatusOr<int>(const std::string& text)>& count_tokens);

// `source` with other arrival times: gaps are gamma distributed with shape `burstiness` and a mean of 1 in units of the
// expected number of arrivals, so that the rate follows `rate_per_s` (1: a Poisson process, whatever the profile; less
// comes in bursts, more is steadier). The first gap precedes the first request. Ends where the profile ends.
RequestSource SpreadArrivals(RequestSource source, const Profile& rate_per_s, double burstiness, uint64_t seed);

// For small sources.
std::vector<PlannedRequest> TakeAll(const RequestSource& source);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_WORKLOAD_H_
