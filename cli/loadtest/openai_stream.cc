#include "cli/loadtest/openai_stream.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"

namespace soloist::cli {
namespace {

using Json = nlohmann::json;

// Where the JSON is, as far as it matters.
enum class Key {
  kOther,
  kChoices,
  kDelta,
  kTokenIds,
  kText,
  kFinishReason,
  kUsage,
  kPromptTokens,
  kCompletionTokens,
  kError,
  kMessage
};

Key KeyOf(std::string_view name) {
  if (name == "choices") return Key::kChoices;
  if (name == "delta") return Key::kDelta;
  if (name == "token_ids") return Key::kTokenIds;
  if (name == "text" || name == "content" || name == "reasoning_content" || name == "reasoning") return Key::kText;
  if (name == "finish_reason") return Key::kFinishReason;
  if (name == "usage") return Key::kUsage;
  if (name == "prompt_tokens") return Key::kPromptTokens;
  if (name == "completion_tokens") return Key::kCompletionTokens;
  if (name == "error") return Key::kError;
  if (name == "message") return Key::kMessage;
  return Key::kOther;
}

// Builds no document: a stream has an event per token.
class EventReader final : public nlohmann::json_sax<Json> {
 public:
  StreamEvent event;

  bool null() override { return !path_.empty(); }
  bool boolean(bool) override { return !path_.empty(); }
  bool number_integer(number_integer_t value) override { return Number(value); }
  bool number_unsigned(number_unsigned_t value) override { return Number(static_cast<int64_t>(value)); }
  bool number_float(number_float_t, const string_t&) override { return !path_.empty(); }
  bool string(string_t& value) override {
    if (path_.empty()) return false;
    if (key_ == Key::kText && In(Key::kChoices)) event.has_text |= !value.empty();
    if (key_ == Key::kFinishReason && In(Key::kChoices)) event.finished = true;
    if (key_ == Key::kError && path_.size() == 1) event.error = value;
    if (key_ == Key::kMessage && path_.size() == 2 && path_[1] == Key::kError) event.error = value;
    return true;
  }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override {
    if (key_ == Key::kError && path_.size() == 1) event.error.emplace();
    return Enter();
  }
  bool end_object() override { return Leave(); }
  bool start_array(size_t) override {
    if (path_.empty()) return false;
    if (key_ == Key::kTokenIds && In(Key::kChoices) && !event.token_ids) event.token_ids = 0;
    return Enter();
  }
  bool end_array() override { return Leave(); }
  bool key(string_t& name) override {
    key_ = KeyOf(name);
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return false; }

 private:
  bool Enter() {
    if (path_.size() > 64) return false;
    path_.push_back(key_);
    return true;
  }
  bool Leave() {
    key_ = path_.back();
    path_.pop_back();
    return true;
  }
  bool In(Key key) const { return path_.size() > 1 && path_[1] == key; }
  bool Number(int64_t value) {
    if (path_.empty()) return false;
    if (path_.back() == Key::kTokenIds && In(Key::kChoices)) ++*event.token_ids;
    if (path_.back() == Key::kUsage && path_.size() == 2) {
      if (key_ == Key::kPromptTokens) event.prompt_tokens = static_cast<int>(value);
      if (key_ == Key::kCompletionTokens) event.completion_tokens = static_cast<int>(value);
    }
    return true;
  }

  Key key_ = Key::kOther;
  std::vector<Key> path_;  // of the containers that are open; the first is the event
};

}  // namespace

bool SseParser::Feed(std::string_view piece, const std::function<void(std::string_view data)>& on_data) {
  while (!piece.empty()) {
    if (after_return_ && piece.front() == '\n') piece.remove_prefix(1);
    after_return_ = false;
    const size_t end = piece.find_first_of("\r\n");
    if (end == std::string_view::npos) {
      line_ += piece;
      break;
    }
    after_return_ = piece[end] == '\r';
    if (line_.empty()) {
      Line(piece.substr(0, end), on_data);
    } else {
      line_ += piece.substr(0, end);
      Line(line_, on_data);
      line_.clear();
    }
    piece.remove_prefix(end + 1);
    if (data_.size() > kMaxBytes) return false;
  }
  return line_.size() <= kMaxBytes;
}

void SseParser::Line(std::string_view line, const std::function<void(std::string_view data)>& on_data) {
  if (line.empty()) {
    if (!data_.empty()) on_data(std::string_view(data_).substr(0, data_.size() - 1));
    data_.clear();
    return;
  }
  if (!line.starts_with("data")) return;
  line.remove_prefix(4);
  if (!line.empty() && line.front() != ':') return;
  if (!line.empty()) line.remove_prefix(1);
  if (!line.empty() && line.front() == ' ') line.remove_prefix(1);
  data_.append(line).push_back('\n');
}

std::optional<StreamEvent> ParseStreamEvent(std::string_view json) {
  EventReader reader;
  if (!Json::sax_parse(json, &reader)) return std::nullopt;
  return std::move(reader.event);
}

void StreamedAnswer::OnData(int64_t now_ns, std::string_view data) {
  if (done_) return;
  if (data == "[DONE]") {
    done_ = true;
    return;
  }
  const std::optional<StreamEvent> event = ParseStreamEvent(data);
  if (!event) {
    if (error_.empty()) error_ = "not JSON";
    return;
  }
  if (event->error) {
    error_ = "error event";
    record_.detail = *event->error;
    return;
  }
  finished_ |= event->finished;
  if (event->prompt_tokens) record_.prompt_tokens = *event->prompt_tokens;
  if (event->completion_tokens) usage_tokens_ = std::max(usage_tokens_.value_or(0), *event->completion_tokens);
  const int new_tokens = usage_tokens_.value_or(0) - record_.output_tokens;
  if (event->token_ids) {
    record_.token_source = TokenSource::kTokenIds;
    if (*event->token_ids > 0) record_.AddChunk(now_ns, *event->token_ids);
  } else if (record_.token_source == TokenSource::kUsagePerChunk && new_tokens > 0) {
    record_.AddChunk(now_ns, new_tokens);
  } else if (record_.token_source == TokenSource::kNone && event->has_text && record_.chunks.empty() &&
             new_tokens > 0) {
    record_.token_source = TokenSource::kUsagePerChunk;
    record_.AddChunk(now_ns, new_tokens);
  } else if (record_.token_source == TokenSource::kNone && event->has_text) {
    record_.AddChunk(now_ns, 0);
  }
}

std::string StreamedAnswer::Finish() {
  if (!error_.empty()) return error_;
  if (!done_ || !finished_) return "incomplete";
  if (record_.token_source == TokenSource::kNone) {
    if (!usage_tokens_) return "no token count";
    record_.token_source = TokenSource::kUsageAtEnd;
    record_.output_tokens = *usage_tokens_;
  }
  if (usage_tokens_ && *usage_tokens_ != record_.output_tokens) return "tokens lost";
  return "ok";
}

}  // namespace soloist::cli
