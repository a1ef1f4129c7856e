#include "server/http/openai_request.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <utility>

#include "base/status.h"
#include "server/http/api_error.h"
#include "server/http/json_fields.h"
#include "server/http/openai_parts.h"

namespace soloist {
namespace {

constexpr int32_t kDefaultCompletionTokens = 16;  // OpenAI's
constexpr size_t kMaxUnknownFields = 16;          // remembered of a request

// A body while it is read.
struct Draft {
  OpenAiRequest request;
  GenerationRequest common;  // all but the prompt
  ChatInput chat_input;
  const Json* prompt = nullptr;
  std::optional<std::string> model;
  std::optional<int32_t> best_of, top_logprobs, completion_max_tokens;
  std::optional<bool> chat_logprobs;
  bool has_stream_options = false;
};

enum Where : uint8_t { kCompletion = 1, kChat = 2, kBoth = 3 };

struct Field {
  std::string_view name;
  Where where;
  absl::Status (*read)(std::string_view name, const Json& value, Draft& draft);
};

// A field that a function reads into a member of the draft.
#define FIELD_BY(function, where, name, member)                                                                       \
  Field {                                                                                                             \
    name, where, [](std::string_view field, const Json& value, Draft& d) { return function(field, value, d.member); } \
  }
#define PLAIN_FIELD(where, name, member) FIELD_BY(ReadField, where, name, member)

absl::Status Accept(std::string_view, const Json&, Draft&) { return absl::OkStatus(); }

absl::Status Refuse(std::string_view name, const Json& value, Draft&) { return RefuseField(name, value); }

absl::Status RefuseToolChoice(std::string_view name, const Json& value, Draft& draft) {
  return value == "none" || value == "auto" ? absl::OkStatus() : Refuse(name, value, draft);
}

absl::Status ReadModalities(std::string_view name, const Json& value, Draft& draft) {
  return value == Json::array({"text"}) ? absl::OkStatus() : Refuse(name, value, draft);
}

absl::Status ReadPrompt(std::string_view, const Json& value, Draft& draft) {
  draft.prompt = value.is_null() ? nullptr : &value;
  return absl::OkStatus();
}

absl::Status ReadTopK(std::string_view name, const Json& value, Draft& draft) {
  RETURN_IF_ERROR(ReadField(name, value, draft.common.top_k));
  if (draft.common.top_k == -1) draft.common.top_k = 0;  // vLLM's "off"
  return absl::OkStatus();
}

absl::Status ReadStop(std::string_view name, const Json& value, Draft& draft) {
  if (value.is_array()) return ReadField(name, value, draft.common.stop_strings);
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_string()) return WrongType(name, value, "a string or an array of strings");
  draft.common.stop_strings = {value.get_ref<const std::string&>()};
  return absl::OkStatus();
}

absl::Status ReadLogitBias(std::string_view name, const Json& value, Draft& draft) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_object()) return WrongType(name, value, "an object of token ids and numbers");
  for (const auto& [key, bias] : value.get_ref<const Json::object_t&>()) {
    int32_t token = 0;
    const char* const end = key.data() + key.size();
    const auto parsed = std::from_chars(key.data(), end, token);
    std::optional<float> number;
    if (parsed.ec != std::errc() || parsed.ptr != end) return WrongType(name, Json(key), "token ids as names");
    RETURN_IF_ERROR(ReadField(name, bias, number));
    if (!number.has_value()) return WrongType(name, bias, "a number for each token id");
    draft.common.logit_bias.emplace_back(token, *number);
  }
  return absl::OkStatus();
}

absl::Status ReadStreamOptions(std::string_view name, const Json& value, Draft& draft) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_object()) return WrongType(name, value, "an object");
  draft.has_stream_options = true;
  for (const auto& [key, option] : value.get_ref<const Json::object_t&>()) {
    const std::string field = fmt::format("{}.{}", name, key);
    if (key == "include_usage") RETURN_IF_ERROR(ReadField(field, option, draft.request.include_usage));
    if (key == "continuous_usage_stats") {
      RETURN_IF_ERROR(ReadField(field, option, draft.request.continuous_usage_stats));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadDocuments(std::string_view name, const Json& value, Draft& draft) {
  if (!value.is_null() && !value.is_array()) return WrongType(name, value, "an array of objects");
  draft.chat_input.documents = value;
  return absl::OkStatus();
}

absl::Status ReadTemplateKwargs(std::string_view name, const Json& value, Draft& draft) {
  if (!value.is_null() && !value.is_object()) return WrongType(name, value, "an object");
  draft.chat_input.template_kwargs = value;
  return absl::OkStatus();
}

absl::Status ReadChatLogprobs(std::string_view name, const Json& value, Draft& draft) {
  return value.is_null() ? absl::OkStatus() : ReadField(name, value, draft.chat_logprobs.emplace());
}

const Field kFields[] = {
    PLAIN_FIELD(kBoth, "model", model),
    {"prompt", kCompletion, ReadPrompt},
    FIELD_BY(ReadMessages, kChat, "messages", chat_input.messages),
    PLAIN_FIELD(kBoth, "n", common.n),
    PLAIN_FIELD(kBoth, "best_of", best_of),
    PLAIN_FIELD(kBoth, "stream", request.stream),
    {"stream_options", kBoth, ReadStreamOptions},
    PLAIN_FIELD(kCompletion, "echo", request.echo),
    PLAIN_FIELD(kCompletion, "logprobs", common.logprobs),
    {"logprobs", kChat, ReadChatLogprobs},
    PLAIN_FIELD(kChat, "top_logprobs", top_logprobs),
    PLAIN_FIELD(kBoth, "max_tokens", common.max_tokens),
    PLAIN_FIELD(kChat, "max_completion_tokens", completion_max_tokens),
    PLAIN_FIELD(kBoth, "min_tokens", common.min_tokens),
    PLAIN_FIELD(kBoth, "temperature", common.temperature),
    PLAIN_FIELD(kBoth, "top_p", common.top_p),
    {"top_k", kBoth, ReadTopK},
    PLAIN_FIELD(kBoth, "min_p", common.min_p),
    PLAIN_FIELD(kBoth, "repetition_penalty", common.repetition_penalty),
    PLAIN_FIELD(kBoth, "presence_penalty", common.presence_penalty),
    PLAIN_FIELD(kBoth, "frequency_penalty", common.frequency_penalty),
    PLAIN_FIELD(kBoth, "seed", common.seed),
    {"logit_bias", kBoth, ReadLogitBias},
    {"stop", kBoth, ReadStop},
    PLAIN_FIELD(kBoth, "stop_token_ids", common.stop_token_ids),
    PLAIN_FIELD(kBoth, "include_stop_str_in_output", common.include_stop),
    PLAIN_FIELD(kBoth, "ignore_eos", common.ignore_eos),
    PLAIN_FIELD(kBoth, "skip_special_tokens", common.skip_special_tokens),
    PLAIN_FIELD(kCompletion, "add_special_tokens", common.add_special_tokens),
    PLAIN_FIELD(kChat, "add_generation_prompt", chat_input.add_generation_prompt),
    PLAIN_FIELD(kChat, "continue_final_message", chat_input.continue_final_message),
    {"documents", kChat, ReadDocuments},
    {"chat_template_kwargs", kChat, ReadTemplateKwargs},
    PLAIN_FIELD(kBoth, "return_token_ids", request.return_token_ids),
    PLAIN_FIELD(kBoth, "return_tokens_as_token_ids", request.return_tokens_as_token_ids),
    PLAIN_FIELD(kBoth, "priority", common.priority),
    PLAIN_FIELD(kBoth, "cache_salt", common.cache_salt),
    PLAIN_FIELD(kBoth, "request_id", common.request_id),
    FIELD_BY(ReadResponseFormat, kBoth, "response_format", common.output_form),
    FIELD_BY(ReadSchema, kBoth, "guided_json", common.output_form),
    FIELD_BY(ReadRegex, kBoth, "guided_regex", common.output_form),
    FIELD_BY(ReadChoice, kBoth, "guided_choice", common.output_form),
    FIELD_BY(ReadGrammar, kBoth, "guided_grammar", common.output_form),
    FIELD_BY(ReadStructuredOutputs, kBoth, "structured_outputs", common.output_form),
    // Known, and nothing to do.
    {"user", kBoth, Accept},
    {"metadata", kBoth, Accept},
    {"store", kBoth, Accept},
    {"service_tier", kBoth, Accept},
    {"safety_identifier", kBoth, Accept},
    {"prompt_cache_key", kBoth, Accept},
    {"prediction", kBoth, Accept},
    {"parallel_tool_calls", kBoth, Accept},
    {"length_penalty", kBoth, Accept},
    {"early_stopping", kBoth, Accept},
    {"guided_decoding_backend", kBoth, Accept},
    // Known, and beyond this server.
    {"suffix", kCompletion, Refuse},
    {"prompt_embeds", kBoth, Refuse},
    {"prompt_logprobs", kBoth, Refuse},
    {"truncate_prompt_tokens", kBoth, Refuse},
    {"use_beam_search", kBoth, Refuse},
    {"bad_words", kBoth, Refuse},
    {"allowed_token_ids", kBoth, Refuse},
    {"logits_processors", kBoth, Refuse},
    {"guided_whitespace_pattern", kBoth, Refuse},
    {"vllm_xargs", kBoth, Refuse},
    {"kv_transfer_params", kBoth, Refuse},
    {"tools", kChat, Refuse},
    {"tool_choice", kChat, RefuseToolChoice},
    {"functions", kChat, Refuse},
    {"function_call", kChat, RefuseToolChoice},
    {"audio", kChat, Refuse},
    {"modalities", kChat, ReadModalities},
    {"web_search_options", kChat, Refuse},
    {"reasoning_effort", kChat, Refuse},
    {"chat_template", kChat, Refuse},
    {"add_special_tokens", kChat, Refuse},
    {"mm_processor_kwargs", kChat, Refuse},
};
#undef PLAIN_FIELD
#undef FIELD_BY

const Field* Find(std::string_view name, Where where) {
  const auto* const found =
      std::ranges::find_if(kFields, [&](const Field& f) { return f.name == name && (f.where & where) != 0; });
  return found == std::end(kFields) ? nullptr : found;
}

absl::Status ReadFields(const Json& body, Where where, const OpenAiContext& context, Draft& draft) {
  if (!body.is_object()) return InvalidArgument("the body is {}, expected a JSON object", Shown(body));
  for (const auto& [name, value] : body.get_ref<const Json::object_t&>()) {
    if (const Field* field = Find(name, where)) {
      RETURN_IF_ERROR(field->read(name, value, draft));
    } else if (draft.request.unknown_fields.size() < kMaxUnknownFields) {
      draft.request.unknown_fields.push_back(name);
    }
  }
  if (draft.model.has_value() && *draft.model != context.model) return NoSuchModel(*draft.model, context.model);
  OpenAiRequest& request = draft.request;
  request.n = draft.common.n.value_or(1);
  if (draft.best_of.has_value() && *draft.best_of != request.n) {
    return FieldError("best_of", fmt::format("best_of is {}, allowed: as n, {}", *draft.best_of, request.n));
  }
  if (draft.has_stream_options && !request.stream) {
    return FieldError("stream_options", "stream_options is given, but stream is not true");
  }
  return absl::OkStatus();
}

// One prompt of a completion.
absl::Status AddPrompt(std::string_view field, const Json& value, Draft& draft) {
  GenerationRequest& one = draft.request.prompts.emplace_back(draft.common);
  if (value.is_string()) {
    one.prompt = value.get<std::string>();
    return absl::OkStatus();
  }
  if (!value.is_array() || value.empty()) return WrongType(field, value, "text or an array of token ids");
  return ReadField(field, value, one.prompt.emplace<std::vector<int32_t>>());
}

absl::Status AddPrompts(const Json& prompt, int32_t max_prompts, Draft& draft) {
  const bool several = prompt.is_array() && !prompt.empty() && (prompt[0].is_string() || prompt[0].is_array());
  if (!several) return AddPrompt("prompt", prompt, draft);
  if (prompt.size() > static_cast<size_t>(max_prompts)) {
    return FieldError("prompt", fmt::format("prompts: {}, the limit is {}", prompt.size(), max_prompts));
  }
  for (size_t i = 0; i < prompt.size(); ++i) {
    RETURN_IF_ERROR(AddPrompt(fmt::format("prompt[{}]", i), prompt[i], draft));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<OpenAiRequest> ReadCompletion(const Json& body, const OpenAiContext& context) {
  Draft draft;
  RETURN_IF_ERROR(ReadFields(body, kCompletion, context, draft));
  if (draft.prompt == nullptr) return FieldError("prompt", "prompt is missing");
  if (!draft.common.max_tokens.has_value()) {
    draft.common.max_tokens = std::max(kDefaultCompletionTokens, draft.common.min_tokens.value_or(0));
  }
  // A prompt that is only echoed (max_tokens 0) runs as one that is scored.
  if (draft.request.echo && (draft.common.logprobs.has_value() || draft.common.max_tokens == 0)) {
    draft.common.prompt_logprobs = draft.common.logprobs.value_or(0);
  }
  RETURN_IF_ERROR(AddPrompts(*draft.prompt, context.max_prompts, draft));
  return std::move(draft.request);
}

absl::StatusOr<OpenAiRequest> ReadChat(const Json& body, const OpenAiContext& context) {
  Draft draft;
  draft.request.chat = true;
  RETURN_IF_ERROR(ReadFields(body, kChat, context, draft));
  if (draft.chat_input.messages.is_null()) return FieldError("messages", "messages is missing");
  if (draft.completion_max_tokens.has_value()) draft.common.max_tokens = draft.completion_max_tokens;
  if (const int32_t top = draft.top_logprobs.value_or(0); top < 0 || top > kMaxTopLogprobs) {
    return FieldError("top_logprobs", fmt::format("top_logprobs is {}, allowed: 0 to {}", top, kMaxTopLogprobs));
  }
  if (draft.chat_logprobs.value_or(false)) {
    draft.common.logprobs = draft.top_logprobs.value_or(0);
  } else if (draft.top_logprobs.value_or(0) != 0) {
    return FieldError("top_logprobs", "top_logprobs is given, but logprobs is not true");
  }
  if (context.render == nullptr) return FieldError("messages", "the model has no chat template: use /v1/completions");
  ASSIGN_OR_RETURN(draft.common.prompt, context.render(draft.chat_input));
  draft.request.prompts.push_back(std::move(draft.common));
  return std::move(draft.request);
}

absl::StatusOr<ChatInput> ReadChatInput(const Json& body) {
  Draft draft;
  for (const char* name :
       {"messages", "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template_kwargs"}) {
    if (body.contains(name)) RETURN_IF_ERROR(Find(name, kChat)->read(name, body.at(name), draft));
  }
  return std::move(draft.chat_input);
}

std::string_view FieldOf(std::string_view message) {
  const std::string_view first = message.substr(0, message.find_first_of(" []:."));
  return Find(first, kBoth) == nullptr ? std::string_view() : first;
}

}  // namespace soloist
