// What a client may ask, in our own words: gRPC and HTTP both make a GenerationRequest, and everything after that is
// one path (Validate, tokenize, BuildRequest, OutputStream).
#ifndef SOLOIST_SERVER_GENERATION_H_
#define SOLOIST_SERVER_GENERATION_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "scheduler/request.h"
#include "server/grammar/output_form.h"

namespace soloist {

// What the server refuses beyond; the message names value and limit.
struct ServerLimits {
  int64_t max_message_bytes = 8 << 20;
  int64_t max_prompt_bytes = 4 << 20;  // text prompts
  int32_t max_n = 16;
  int32_t max_stop_strings = 16;
  int32_t max_stop_string_bytes = 256;
  int32_t max_stop_token_ids = 64;
  int32_t max_logit_bias = 1024;
  int32_t max_cache_salt_bytes = 256;
  int32_t max_request_id_bytes = 128;
  int32_t max_streams = 4096;          // open at a time
  int32_t max_pending_prompts = 1024;  // large prompts waiting to be tokenized
  int32_t max_pending_forms = 1024;    // other requests waiting for their output form to be compiled
  OutputFormLimits output_form;
  // What one stream may hold unread before its request is cancelled.
  int32_t max_buffered_tokens = 16384;
  int64_t max_buffered_bytes = 4 << 20;
  bool allow_logits = false;  // return_logits
};

// From the model folder's generation_config.json; absent: SamplingParams' own default.
struct SamplingDefaults {
  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<int32_t> top_k;
  std::optional<float> repetition_penalty;
};

// Absent: the default that proto/soloist/v1/inference.proto states.
struct GenerationRequest {
  std::optional<std::string> request_id;
  // monostate: the client gave none (refused).
  std::variant<std::monostate, std::string, std::vector<int32_t>> prompt;
  bool add_special_tokens = true;
  bool parse_special_tokens = true;
  std::optional<int32_t> n;
  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<int32_t> top_k;
  std::optional<float> repetition_penalty;
  std::optional<float> presence_penalty;
  std::optional<float> frequency_penalty;
  std::optional<uint64_t> seed;
  std::vector<std::pair<int32_t, float>> logit_bias;
  std::optional<int32_t> max_tokens;
  std::optional<int32_t> min_tokens;
  std::vector<std::string> stop_strings;
  std::vector<int32_t> stop_token_ids;
  bool include_stop = false;
  bool ignore_eos = false;
  std::optional<int32_t> logprobs;
  // Of the prompt's tokens; absent: none. With it, max_tokens may be 0.
  std::optional<int32_t> prompt_logprobs;
  std::optional<int32_t> priority;
  std::string cache_salt;
  // W3C trace context ("traceparent") that came with the request; see request_log.h. Not checked.
  std::string trace_parent;
  bool skip_special_tokens = true;
  bool return_logits = false;
  std::optional<OutputForm> output_form;  // gRPC: response_format; absent: any text
};

// All that can be known before the prompt is tokenized. Cheap: linear in the request, no tokenizing.
absl::Status Validate(const GenerationRequest& request, const ServerLimits& limits, const PlanLimits& plan_limits);

// The scheduler's Request for a valid one, without id and sink. Draws a seed where the client gave none. `prompt`: its
// tokens. INVALID_ARGUMENT where the prompt does not fit.
absl::StatusOr<Request> BuildRequest(const GenerationRequest& request, std::vector<int32_t> prompt,
                                     const SamplingDefaults& defaults, const PlanLimits& plan_limits);

// "req-" and 16 hexadecimal digits.
std::string DrawRequestId();

}  // namespace soloist

#endif  // SOLOIST_SERVER_GENERATION_H_
