#include "scheduler/request.h"

#include <cmath>

#include "base/status.h"
#include "scheduler/scheduler.h"

namespace soloist {

const char* FinishReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kError:
      return "error";
    case FinishReason::kNone:
      break;
  }
  return "none";
}

namespace {

absl::Status CheckToken(const char* what, size_t index, int32_t token, const PlanLimits& limits) {
  if (token >= 0 && token < limits.vocab_size) return absl::OkStatus();
  return InvalidArgument("{}[{}] is {}, allowed: 0 to {}", what, index, token, limits.vocab_size - 1);
}

absl::Status CheckRange(const char* what, float value, float low, float high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidArgument("{} is {}, allowed: {} to {}", what, value, low, high);
}

absl::Status CheckSampling(const SamplingParams& p, const PlanLimits& limits) {
  if (!(p.temperature >= 0) || !std::isfinite(p.temperature)) {
    return InvalidArgument("temperature is {}, allowed: 0 or more", p.temperature);
  }
  if (!(p.top_p > 0 && p.top_p <= 1)) return InvalidArgument("top_p is {}, allowed: above 0, up to 1", p.top_p);
  RETURN_IF_ERROR(CheckRange("min_p", p.min_p, 0, 1));
  if (p.top_k < 0) return InvalidArgument("top_k is {}, allowed: 0 (off) or more", p.top_k);
  if (!(p.repetition_penalty > 0) || !std::isfinite(p.repetition_penalty)) {
    return InvalidArgument("repetition_penalty is {}, allowed: above 0", p.repetition_penalty);
  }
  RETURN_IF_ERROR(CheckRange("presence_penalty", p.presence_penalty, -2, 2));
  RETURN_IF_ERROR(CheckRange("frequency_penalty", p.frequency_penalty, -2, 2));
  if (p.num_top_logprobs < -1 || p.num_top_logprobs > kMaxTopLogprobs) {
    return InvalidArgument("num_top_logprobs is {}, allowed: -1 (none) to {}", p.num_top_logprobs, kMaxTopLogprobs);
  }
  if (p.num_prompt_logprobs < -1 || p.num_prompt_logprobs > kMaxTopLogprobs) {
    return InvalidArgument("num_prompt_logprobs is {}, allowed: -1 (none) to {}", p.num_prompt_logprobs,
                           kMaxTopLogprobs);
  }
  const int32_t least_tokens = p.num_prompt_logprobs >= 0 ? 0 : 1;
  if (p.max_tokens < least_tokens) {
    return InvalidArgument("max_tokens is {}, allowed: {} or more{}", p.max_tokens, least_tokens,
                           least_tokens == 1 ? " (0 with num_prompt_logprobs)" : "");
  }
  if (p.min_tokens < 0 || p.min_tokens > p.max_tokens) {
    return InvalidArgument("min_tokens is {}, allowed: 0 to max_tokens, {}", p.min_tokens, p.max_tokens);
  }
  for (size_t i = 0; i < p.logit_bias.size(); ++i) {
    RETURN_IF_ERROR(CheckToken("logit_bias", i, p.logit_bias[i].first, limits));
    const float bias = p.logit_bias[i].second;
    if (std::isnan(bias) || bias == HUGE_VALF) {
      return InvalidArgument("logit_bias of token {} is {}, allowed: below inf", p.logit_bias[i].first, bias);
    }
  }
  for (size_t i = 0; i < p.stop_token_ids.size(); ++i) {
    RETURN_IF_ERROR(CheckToken("stop_token_ids", i, p.stop_token_ids[i], limits));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckRequest(const Request& request, const PlanLimits& limits) {
  if (request.id.empty()) return InvalidArgument("the request has no id");
  if (request.sink == nullptr) return InvalidArgument("request {} has no sink", request.id);
  if (request.prompt.empty()) return InvalidArgument("the prompt is empty");
  if (request.num_outputs < 1) return InvalidArgument("n is {}, allowed: 1 or more", request.num_outputs);
  RETURN_IF_ERROR(CheckSampling(request.sampling, limits));
  const int64_t prompt = static_cast<int64_t>(request.prompt.size()), output = request.sampling.max_tokens;
  if (prompt + output > limits.max_model_len) {
    return InvalidArgument("prompt of {} tokens + max_tokens {} = {}, more than the context limit of {} tokens", prompt,
                           output, prompt + output, limits.max_model_len);
  }
  const int64_t capacity = static_cast<int64_t>(limits.num_blocks) * limits.block_size;
  if (prompt + output > capacity) {
    return InvalidArgument("prompt of {} tokens + max_tokens {} = {}, more than a rank's KV cache of {} tokens", prompt,
                           output, prompt + output, capacity);
  }
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    RETURN_IF_ERROR(CheckToken("prompt", i, request.prompt[i], limits));
  }
  return absl::OkStatus();
}

}  // namespace soloist
