#include "server/generation.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string_view>

#include "base/status.h"

namespace soloist {
namespace {

uint64_t DrawBits() {
  thread_local std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

template <typename T>
absl::Status CheckRange(std::string_view name, const std::optional<T>& value, T low, T high) {
  if (!value.has_value() || (*value >= low && *value <= high)) return absl::OkStatus();
  return InvalidArgument("{} is {}, allowed: {} to {}", name, *value, low, high);
}

absl::Status CheckAtMost(std::string_view what, size_t value, int64_t limit) {
  if (static_cast<int64_t>(value) <= limit) return absl::OkStatus();
  return InvalidArgument("{}: {}, the limit is {}", what, value, limit);
}

absl::Status CheckToken(std::string_view what, size_t index, int32_t token, const PlanLimits& limits) {
  if (token >= 0 && token < limits.vocab_size) return absl::OkStatus();
  return InvalidArgument("{}[{}] is {}, allowed: 0 to {}", what, index, token, limits.vocab_size - 1);
}

absl::Status CheckSampling(const GenerationRequest& r, const PlanLimits& plan_limits) {
  if (r.temperature.has_value() && !(*r.temperature >= 0 && std::isfinite(*r.temperature))) {
    return InvalidArgument("temperature is {}, allowed: 0 (greedy) or more", *r.temperature);
  }
  if (r.top_p.has_value() && !(*r.top_p > 0 && *r.top_p <= 1)) {
    return InvalidArgument("top_p is {}, allowed: above 0, up to 1", *r.top_p);
  }
  RETURN_IF_ERROR(CheckRange("min_p", r.min_p, 0.0F, 1.0F));
  if (r.top_k.has_value() && *r.top_k < 0) return InvalidArgument("top_k is {}, allowed: 0 (off) or more", *r.top_k);
  if (r.repetition_penalty.has_value() && !(*r.repetition_penalty > 0 && std::isfinite(*r.repetition_penalty))) {
    return InvalidArgument("repetition_penalty is {}, allowed: above 0", *r.repetition_penalty);
  }
  RETURN_IF_ERROR(CheckRange("presence_penalty", r.presence_penalty, -2.0F, 2.0F));
  RETURN_IF_ERROR(CheckRange("frequency_penalty", r.frequency_penalty, -2.0F, 2.0F));
  RETURN_IF_ERROR(CheckRange("logprobs", r.logprobs, 0, kMaxTopLogprobs));
  RETURN_IF_ERROR(CheckRange("prompt_logprobs", r.prompt_logprobs, 0, kMaxTopLogprobs));
  if (r.max_tokens == 0 && !r.prompt_logprobs.has_value()) {
    return InvalidArgument("max_tokens is 0, allowed: 1 to {}, and 0 with prompt_logprobs", plan_limits.max_model_len);
  }
  RETURN_IF_ERROR(CheckRange("max_tokens", r.max_tokens, 0, plan_limits.max_model_len));
  RETURN_IF_ERROR(CheckRange("min_tokens", r.min_tokens, 0, r.max_tokens.value_or(plan_limits.max_model_len)));
  for (size_t i = 0; i < r.logit_bias.size(); ++i) {
    RETURN_IF_ERROR(CheckToken("logit_bias token_id", i, r.logit_bias[i].first, plan_limits));
    const float bias = r.logit_bias[i].second;
    if (std::isnan(bias) || bias == HUGE_VALF) {
      return InvalidArgument("logit_bias of token {} is {}, allowed: below inf", r.logit_bias[i].first, bias);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckStops(const GenerationRequest& r, const ServerLimits& limits, const PlanLimits& plan_limits) {
  RETURN_IF_ERROR(CheckAtMost("number of stop strings", r.stop_strings.size(), limits.max_stop_strings));
  for (size_t i = 0; i < r.stop_strings.size(); ++i) {
    if (r.stop_strings[i].empty()) return InvalidArgument("stop string {} is empty", i);
    RETURN_IF_ERROR(
        CheckAtMost(fmt::format("bytes of stop string {}", i), r.stop_strings[i].size(), limits.max_stop_string_bytes));
  }
  RETURN_IF_ERROR(CheckAtMost("number of stop token ids", r.stop_token_ids.size(), limits.max_stop_token_ids));
  for (size_t i = 0; i < r.stop_token_ids.size(); ++i) {
    RETURN_IF_ERROR(CheckToken("stop token_ids", i, r.stop_token_ids[i], plan_limits));
  }
  return absl::OkStatus();
}

// That the context must leave for the output.
int32_t LeastTokens(const GenerationRequest& r) { return r.max_tokens == 0 ? 0 : 1; }

absl::Status CheckPrompt(const GenerationRequest& r, const ServerLimits& limits, const PlanLimits& plan_limits) {
  if (std::holds_alternative<std::monostate>(r.prompt)) {
    return InvalidArgument("the request has no prompt: give text or token_ids");
  }
  if (const auto* text = std::get_if<std::string>(&r.prompt)) {
    return CheckAtMost("bytes of the prompt", text->size(), limits.max_prompt_bytes);
  }
  const auto& ids = std::get<std::vector<int32_t>>(r.prompt);
  if (ids.empty()) return InvalidArgument("the prompt is empty");
  RETURN_IF_ERROR(CheckAtMost("tokens of the prompt", ids.size(), plan_limits.max_model_len - LeastTokens(r)));
  for (size_t i = 0; i < ids.size(); ++i) RETURN_IF_ERROR(CheckToken("prompt token_ids", i, ids[i], plan_limits));
  return absl::OkStatus();
}

}  // namespace

absl::Status Validate(const GenerationRequest& request, const ServerLimits& limits, const PlanLimits& plan_limits) {
  if (request.request_id.has_value()) {
    const std::string& id = *request.request_id;
    if (id.empty()) return InvalidArgument("request_id is empty: leave it out to have one drawn");
    RETURN_IF_ERROR(CheckAtMost("bytes of request_id", id.size(), limits.max_request_id_bytes));
    if (!std::ranges::all_of(id, [](char c) { return c > ' ' && c <= '~'; })) {
      return InvalidArgument("request_id has a character that is not printable ASCII, or a space");
    }
  }
  RETURN_IF_ERROR(CheckPrompt(request, limits, plan_limits));
  RETURN_IF_ERROR(CheckRange("n", request.n, 1, limits.max_n));
  RETURN_IF_ERROR(CheckAtMost("number of logit_bias entries", request.logit_bias.size(), limits.max_logit_bias));
  RETURN_IF_ERROR(CheckSampling(request, plan_limits));
  RETURN_IF_ERROR(CheckStops(request, limits, plan_limits));
  if (request.output_form.has_value()) RETURN_IF_ERROR(CheckOutputForm(*request.output_form, limits.output_form));
  RETURN_IF_ERROR(CheckAtMost("bytes of cache_salt", request.cache_salt.size(), limits.max_cache_salt_bytes));
  if (request.return_logits && !limits.allow_logits) {
    return InvalidArgument("return_logits is not allowed by this server");
  }
  return absl::OkStatus();
}

absl::StatusOr<Request> BuildRequest(const GenerationRequest& r, std::vector<int32_t> prompt,
                                     const SamplingDefaults& defaults, const PlanLimits& plan_limits) {
  const auto prompt_tokens = static_cast<int64_t>(prompt.size());
  if (prompt.empty()) return InvalidArgument("the prompt is empty");
  const int64_t room = std::min<int64_t>(plan_limits.max_model_len,
                                         static_cast<int64_t>(plan_limits.num_blocks) * plan_limits.block_size) -
                       prompt_tokens;
  if (room < LeastTokens(r)) {
    return InvalidArgument("tokens of the prompt: {}, the limit is {}", prompt_tokens,
                           room + prompt_tokens - LeastTokens(r));
  }
  if (r.max_tokens.value_or(1) > room) {
    return InvalidArgument("prompt of {} tokens + max_tokens {} = {}, the limit is {}", prompt_tokens, *r.max_tokens,
                           prompt_tokens + *r.max_tokens, prompt_tokens + room);
  }
  if (r.min_tokens.value_or(0) > room) {
    return InvalidArgument("min_tokens is {}, but a prompt of {} tokens leaves {}", *r.min_tokens, prompt_tokens, room);
  }
  Request out;
  out.prompt = std::move(prompt);
  SamplingParams& p = out.sampling;
  p.temperature = r.temperature.value_or(defaults.temperature.value_or(p.temperature));
  p.top_p = r.top_p.value_or(defaults.top_p.value_or(p.top_p));
  p.min_p = r.min_p.value_or(defaults.min_p.value_or(p.min_p));
  p.top_k = r.top_k.value_or(defaults.top_k.value_or(p.top_k));
  p.repetition_penalty = r.repetition_penalty.value_or(defaults.repetition_penalty.value_or(p.repetition_penalty));
  p.presence_penalty = r.presence_penalty.value_or(p.presence_penalty);
  p.frequency_penalty = r.frequency_penalty.value_or(p.frequency_penalty);
  p.seed = r.seed.has_value() ? *r.seed : DrawBits();
  p.num_top_logprobs = r.logprobs.value_or(-1);
  p.num_prompt_logprobs = r.prompt_logprobs.value_or(-1);
  p.logit_bias = r.logit_bias;
  p.max_tokens = r.max_tokens.value_or(static_cast<int32_t>(room));
  p.min_tokens = r.min_tokens.value_or(0);
  p.ignore_eos = r.ignore_eos;
  p.stop_token_ids = r.stop_token_ids;
  p.return_logits = r.return_logits;
  out.num_outputs = r.n.value_or(1);
  out.priority = r.priority.value_or(0);
  out.cache_salt = r.cache_salt;
  return out;
}

std::string DrawRequestId() { return fmt::format("req-{:016x}", DrawBits()); }

}  // namespace soloist
