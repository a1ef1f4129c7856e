// Request (the immutable ask) and TokenSink (where its tokens go).
#ifndef SOLOIST_SCHEDULER_REQUEST_H_
#define SOLOIST_SCHEDULER_REQUEST_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace soloist {

struct SamplingParams {
  float temperature = 1;                              // 0: greedy
  float top_p = 1;                                    // (0, 1]
  float min_p = 0;                                    // [0, 1]
  int32_t top_k = 0;                                  // 0: off
  float repetition_penalty = 1;                       // > 0
  float presence_penalty = 0;                         // [-2, 2]
  float frequency_penalty = 0;                        // [-2, 2]
  uint64_t seed = 0;                                  // the server draws one where the client gave none
  int32_t num_top_logprobs = -1;                      // -1: none; 0: the chosen token's only; up to kMaxTopLogprobs
  std::vector<std::pair<int32_t, float>> logit_bias;  // token id, added to its logit
  int32_t max_tokens = 16;                            // new tokens per output, >= 1
  int32_t min_tokens = 0;                             // end tokens are banned before that many
  bool ignore_eos = false;                            // end tokens neither stop nor count as stops
  std::vector<int32_t> stop_token_ids;                // besides the model's end tokens; kept in the output
  bool return_logits = false;                         // raw logits with each token; for tests and tools
};

enum class FinishReason { kNone, kStop, kLength, kCancelled, kError };
// "stop", "length", ...
const char* FinishReasonName(FinishReason reason);

// Engine times, Clock::NowNs; 0: not yet.
struct RequestTimes {
  int64_t arrival_ns = 0;
  int64_t first_scheduled_ns = 0;
  int64_t first_token_ns = 0;
  int64_t last_token_ns = 0;
};

// One new token of one output.
struct TokenEvent {
  int32_t output_index = 0;
  int32_t token = 0;
  float logprob = 0;                                    // valid if num_top_logprobs >= 0
  std::vector<std::pair<int32_t, float>> top_logprobs;  // most likely first
  std::vector<float> logits;                            // if return_logits
};

// The end of one output; nothing follows for it.
struct FinishEvent {
  int32_t output_index = 0;
  FinishReason reason = FinishReason::kNone;
  int32_t stop_token = -1;  // the token that stopped it (already pushed), or -1
  absl::Status error;       // for kError
  bool retryable = false;   // for kError: the same request may succeed elsewhere or later
  RequestTimes times;
  int32_t cached_prompt_tokens = 0;  // prompt tokens that came from the prefix cache at first admission
  int32_t num_preemptions = 0;
};

// Implemented by the server and the CLI. Called by the step loop's thread only, in order per output; must not block and
// must not call back into the StepLoop (except StepLoop::Cancel, which only queues). Exactly one OnFinish per output,
// also for a request that never ran. The sink is released after the last OnFinish.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  // false: the sink is full or gone; the loop cancels the output (FinishReason::kCancelled).
  virtual bool OnToken(TokenEvent event) = 0;
  virtual void OnFinish(const FinishEvent& event) = 0;
};

struct Request {
  std::string id;               // unique among those in the loop
  std::vector<int32_t> prompt;  // token ids, not empty
  SamplingParams sampling;
  int32_t num_outputs = 1;  // n; output i samples with the same seed and output_index i
  int32_t priority = 0;     // lower runs first (as vLLM)
  std::string cache_salt;   // prefix-cache hits only among equal salts
  std::shared_ptr<TokenSink> sink;
};

}  // namespace soloist

#endif  // SOLOIST_SCHEDULER_REQUEST_H_
