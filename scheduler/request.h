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
  int32_t num_prompt_logprobs = -1;                   // the same for the tokens of the prompt
  std::vector<std::pair<int32_t, float>> logit_bias;  // token id, added to its logit
  int32_t max_tokens = 16;                            // new tokens per output, >= 1; 0: only scores the prompt
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
  int64_t time_ns = 0;                                  // Clock::NowNs when its step was committed
};

// Log-probabilities of consecutive tokens of the prompt, each given those before it. All of them, in order, come before
// the first token of any output; the prompt's first token has none.
struct PromptLogprobs {
  int32_t first = 1;                // index in the prompt of the first token here
  int32_t num_top = 0;              // the request's num_prompt_logprobs
  std::vector<int32_t> tokens;      // [n] the prompt's
  std::vector<float> logprobs;      // [n]
  std::vector<int32_t> top_tokens;  // [n, num_top] most likely first; -1: the vocabulary has no more
  std::vector<float> top_logprobs;  // [n, num_top]

  int32_t size() const { return static_cast<int32_t>(tokens.size()); }
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
// must not call back into the StepLoop (except Add and Cancel, which only queue). Exactly one OnFinish per output,
// also for a request that never ran. The sink is released after the last OnFinish.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  // false: the sink is full or gone; the loop cancels the output (FinishReason::kCancelled).
  virtual bool OnToken(TokenEvent event) = 0;
  // Of a request with num_prompt_logprobs >= 0. false: as OnToken, for all outputs.
  virtual bool OnPromptLogprobs(const PromptLogprobs&) { return true; }
  virtual void OnFinish(const FinishEvent& event) = 0;
};

class ConstraintSource;

struct Request {
  std::string id;               // unique among those in the loop
  std::vector<int32_t> prompt;  // token ids, not empty
  SamplingParams sampling;
  int32_t num_outputs = 1;  // n; output i samples with the same seed and output_index i
  int32_t priority = 0;     // lower runs first (as vLLM)
  std::string cache_salt;   // prefix-cache hits only among equal salts
  std::shared_ptr<TokenSink> sink;
  std::shared_ptr<const ConstraintSource> constraint;  // the form that every output must have; null: any
};

}  // namespace soloist

#endif  // SOLOIST_SCHEDULER_REQUEST_H_
