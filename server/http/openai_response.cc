#include "server/http/openai_response.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "fmt/format.h"
#include "server/http/json_text.h"
#include "server/tokenizer/utf8.h"

namespace soloist {
namespace {

const char* ReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "abort";
    case FinishReason::kError:
      return "error";
    default:
      return "stop";
  }
}

bool IsWellFormed(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    if (static_cast<unsigned char>(text[i]) < 0x80) {
      ++i;
      continue;
    }
    const Utf8Step step = NextUtf8(text.substr(i));
    if (step.kind != Utf8Step::kCharacter) return false;
    i += step.bytes;
  }
  return true;
}

template <typename T, typename Append>
void AppendArray(std::string& out, const T& items, Append append) {
  out += '[';
  bool first = true;
  for (const auto& item : items) {
    if (!first) out += ',';
    first = false;
    append(item);
  }
  out += ']';
}

void AppendUsageObject(std::string& out, const AnswerUsage& usage, bool details) {
  fmt::format_to(std::back_inserter(out), R"({{"prompt_tokens":{},"total_tokens":{},"completion_tokens":{})",
                 usage.prompt_tokens, usage.prompt_tokens + usage.completion_tokens, usage.completion_tokens);
  if (details) {
    out += R"(,"prompt_tokens_details":{"cached_tokens":)";
    AppendJsonInt(out, usage.cached_tokens);
    out += '}';
  }
  out += '}';
}

}  // namespace

AnswerWriter::AnswerWriter(AnswerOptions options, const Tokenizer& tokenizer)
    : options_(std::move(options)), tokenizer_(tokenizer) {
  const auto head = [&](const char* object) {
    std::string out = R"({"id":)";
    AppendJsonString(out, options_.id);
    out += fmt::format(R"(,"object":"{}","created":{},"model":)", object, options_.created_unix_s);
    AppendJsonString(out, options_.model);
    return out + R"(,"choices":[)";
  };
  head_ = head(options_.chat ? "chat.completion" : "text_completion");
  event_ = "data: " + head(options_.chat ? "chat.completion.chunk" : "text_completion");
}

// ---- Events

void AnswerWriter::AppendDelta(std::string& out, AnswerChoice& choice, std::string_view text,
                               std::span<const TokenEvent> tokens, const AnswerUsage* usage) const {
  out += event_;
  out += R"({"index":)";
  AppendJsonInt(out, choice.index);
  if (options_.chat) {
    out += choice.begun ? R"(,"delta":{"content":)" : R"(,"delta":{"role":"assistant","content":)";
    AppendText(out, choice, text);
    out += '}';
  } else {
    out += R"(,"text":)";
    AppendText(out, choice, text);
  }
  AppendLogprobs(out, choice, tokens);
  out += R"(,"finish_reason":null,"stop_reason":null)";
  AppendTokenIds(out, choice, tokens);
  out += "}]";
  AppendEventEnd(out, usage, false);
  choice.begun = true;
}

void AnswerWriter::AppendFinish(std::string& out, AnswerChoice& choice, const OutputEnd& end,
                                const AnswerUsage* usage) const {
  if (!choice.begun) AppendDelta(out, choice, {}, {}, usage);
  out += event_;
  out += R"({"index":)";
  AppendJsonInt(out, choice.index);
  out += options_.chat ? R"(,"delta":{},"logprobs":null)" : R"(,"text":"","logprobs":null)";
  AppendFinishReason(out, end);
  out += "}]";
  AppendEventEnd(out, usage, false);
}

void AnswerWriter::AppendUsage(std::string& out, const AnswerUsage& usage) const {
  out += event_;
  out += ']';
  AppendEventEnd(out, &usage, true);
}

void AnswerWriter::AppendError(std::string& out, const ApiError& error) {
  out += "data: ";
  out += ErrorJson(error);
  out += "\n\n";
}

void AnswerWriter::AppendDone(std::string& out) { out += "data: [DONE]\n\n"; }

void AnswerWriter::AppendEventEnd(std::string& out, const AnswerUsage* usage, bool details) const {
  if (usage != nullptr) {
    out += R"(,"usage":)";
    AppendUsageObject(out, *usage, details);
  } else if (options_.usage_field) {
    out += R"(,"usage":null)";
  }
  out += "}\n\n";
}

// ---- Whole answers

void AnswerWriter::AppendBegin(std::string& out) const { out += head_; }

void AnswerWriter::AppendChoice(std::string& out, AnswerChoice& choice, std::string_view text,
                                std::span<const TokenEvent> tokens, const OutputEnd& end) const {
  if (out.back() == '}') out += ',';
  out += R"({"index":)";
  AppendJsonInt(out, choice.index);
  out += options_.chat ? R"(,"message":{"role":"assistant","content":)" : R"(,"text":)";
  AppendText(out, choice, text);
  if (options_.chat) out += R"(,"refusal":null})";
  AppendLogprobs(out, choice, tokens);
  AppendFinishReason(out, end);
  AppendTokenIds(out, choice, tokens);
  out += '}';
}

void AnswerWriter::AppendEnd(std::string& out, const AnswerUsage& usage) const {
  out += R"(],"usage":)";
  AppendUsageObject(out, usage, true);
  out += '}';
}

// ---- Parts of both

void AnswerWriter::AppendText(std::string& out, const AnswerChoice& choice, std::string_view text) const {
  if (choice.begun || choice.prompt_text.empty()) return AppendJsonString(out, text);
  AppendJsonString(out, choice.prompt_text);
  out.pop_back();
  const size_t quote = out.size();
  AppendJsonString(out, text);
  out.erase(quote, 1);
}

void AnswerWriter::AppendFinishReason(std::string& out, const OutputEnd& end) const {
  out += R"(,"finish_reason":")";
  out += ReasonName(end.reason);
  out += R"(","stop_reason":)";
  if (end.stop_string.has_value()) {
    AppendJsonString(out, *end.stop_string);
  } else if (end.stop_token.has_value() &&
             std::ranges::find(options_.eos_ids, *end.stop_token) == options_.eos_ids.end()) {
    AppendJsonInt(out, *end.stop_token);
  } else {
    out += "null";
  }
}

void AnswerWriter::AppendTokenIds(std::string& out, AnswerChoice& choice, std::span<const TokenEvent> tokens) const {
  choice.completion_tokens += static_cast<int32_t>(tokens.size());
  if (!options_.token_ids) return;
  if (!choice.begun && !choice.prompt_token_ids.empty()) {
    out += R"(,"prompt_token_ids":)";
    AppendArray(out, choice.prompt_token_ids, [&](int32_t id) { AppendJsonInt(out, id); });
  }
  out += R"(,"token_ids":)";
  AppendArray(out, tokens, [&](const TokenEvent& event) { AppendJsonInt(out, event.token); });
}

void AnswerWriter::AppendLogprobs(std::string& out, AnswerChoice& choice, std::span<const TokenEvent> tokens) const {
  out += R"(,"logprobs":)";
  if (!options_.logprobs) {
    out += "null";
  } else if (options_.chat) {
    AppendChatLogprobs(out, tokens);
  } else {
    AppendCompletionLogprobs(out, choice, tokens);
  }
}

void AnswerWriter::AppendTokenText(std::string& out, int32_t token) const {
  if (options_.tokens_as_ids) {
    out += fmt::format(R"("token_id:{}")", token);
    return;
  }
  const std::string_view bytes = tokenizer_.TokenBytes(token);
  if (options_.chat || IsWellFormed(bytes)) return AppendJsonString(out, bytes);
  // Part of a character, as OpenAI writes it.
  out += "\"bytes:";
  for (const char c : bytes) fmt::format_to(std::back_inserter(out), R"(\\x{:02x})", static_cast<unsigned char>(c));
  out += '"';
}

// Characters that the token adds to the text: those that begin in it.
int32_t AnswerWriter::TextLength(const AnswerChoice& choice, int32_t token) const {
  if (options_.skip_special_tokens && tokenizer_.IsSpecial(token)) return 0;
  const std::string_view bytes = tokenizer_.TokenBytes(token);
  const auto characters = std::ranges::count_if(bytes, [](char c) { return (c & 0xC0) != 0x80; });
  const bool stripped = choice.text_offset == 0 && tokenizer_.strips_leading_space() && bytes.starts_with(' ');
  return static_cast<int32_t>(characters) - (stripped ? 1 : 0);
}

void AnswerWriter::AppendCompletionLogprobs(std::string& out, AnswerChoice& choice,
                                            std::span<const TokenEvent> tokens) const {
  const std::span<const TokenEvent> prompt =
      choice.begun || choice.prompt_tokens == nullptr ? std::span<const TokenEvent>() : *choice.prompt_tokens;
  // `append` of each token; `null_first`: the prompt's first has none.
  const auto array = [&](std::string_view name, bool null_first, const auto& append) {
    out += name;
    out += '[';
    for (const TokenEvent& event : prompt) {
      if (&event != prompt.data()) out += ',';
      if (null_first && &event == prompt.data()) {
        out += "null";
      } else {
        append(event);
      }
    }
    for (const TokenEvent& event : tokens) {
      if (!prompt.empty() || &event != tokens.data()) out += ',';
      append(event);
    }
    out += ']';
  };
  array(R"({"tokens":)", false, [&](const TokenEvent& event) { AppendTokenText(out, event.token); });
  array(R"(,"token_logprobs":)", true, [&](const TokenEvent& event) { AppendJsonLogprob(out, event.logprob); });
  array(R"(,"top_logprobs":)", true, [&](const TokenEvent& event) {
    out += '{';
    bool chosen_is_there = false;
    const auto entry = [&](int32_t token, float logprob) {
      if (out.back() != '{') out += ',';
      AppendTokenText(out, token);
      out += ':';
      AppendJsonLogprob(out, logprob);
    };
    for (const auto& [token, logprob] : event.top_logprobs) {
      chosen_is_there = chosen_is_there || token == event.token;
      entry(token, logprob);
    }
    // As OpenAI does: the sampled token is always there.
    if (!chosen_is_there) entry(event.token, event.logprob);
    out += '}';
  });
  array(R"(,"text_offset":)", false, [&](const TokenEvent& event) {
    AppendJsonInt(out, choice.text_offset);
    choice.text_offset += TextLength(choice, event.token);
  });
  out += '}';
}

void AnswerWriter::AppendChatLogprob(std::string& out, int32_t token, float logprob) const {
  out += R"({"token":)";
  AppendTokenText(out, token);
  out += R"(,"logprob":)";
  AppendJsonLogprob(out, logprob);
  out += R"(,"bytes":)";
  AppendArray(out, tokenizer_.TokenBytes(token), [&](char c) { AppendJsonInt(out, static_cast<unsigned char>(c)); });
}

void AnswerWriter::AppendChatLogprobs(std::string& out, std::span<const TokenEvent> tokens) const {
  out += R"({"content":)";
  AppendArray(out, tokens, [&](const TokenEvent& event) {
    AppendChatLogprob(out, event.token, event.logprob);
    out += R"(,"top_logprobs":)";
    AppendArray(out, event.top_logprobs, [&](const std::pair<int32_t, float>& top) {
      AppendChatLogprob(out, top.first, top.second);
      out += '}';
    });
    out += '}';
  });
  out += R"(,"refusal":null})";
}

}  // namespace soloist
