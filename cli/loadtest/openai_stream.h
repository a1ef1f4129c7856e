// OpenAI's streamed answers: server-sent events, and what the JSON in each says.
#ifndef SOLOIST_CLI_LOADTEST_OPENAI_STREAM_H_
#define SOLOIST_CLI_LOADTEST_OPENAI_STREAM_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "cli/loadtest/metrics.h"

namespace soloist::cli {

// Server-sent events, of which only `data` matters here. Takes the stream in pieces of any size.
class SseParser {
 public:
  // Calls on_data with the data of each event that ends in `piece` (lines of one event joined by a line feed); the view
  // holds during the call. False: a line or an event is longer than kMaxBytes.
  bool Feed(std::string_view piece, const std::function<void(std::string_view data)>& on_data);
  static constexpr size_t kMaxBytes = 16 << 20;

 private:
  void Line(std::string_view line, const std::function<void(std::string_view data)>& on_data);

  std::string line_;  // the beginning of a line
  std::string data_;  // of the event so far, a line feed after each line
  bool after_return_ = false;
};

// One event of a streamed completion or chat completion with one choice.
struct StreamEvent {
  std::optional<int> token_ids;  // how many ids it holds
  std::optional<int> prompt_tokens, completion_tokens;
  bool has_text = false;
  bool finished = false;  // has a finish_reason
  std::optional<std::string> error;
};
// None: not a JSON object.
std::optional<StreamEvent> ParseStreamEvent(std::string_view json);

// Fills a record from the events of its answer.
class StreamedAnswer {
 public:
  explicit StreamedAnswer(RequestRecord& record) : record_(record) {}
  void OnData(int64_t now_ns, std::string_view data);
  // After the last event: "ok", or what is wrong with the answer. Sets the record's output tokens and their source.
  std::string Finish();

 private:
  RequestRecord& record_;
  bool finished_ = false, done_ = false;
  std::optional<int> usage_tokens_;  // the largest completion_tokens so far
  std::string error_;
};

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_OPENAI_STREAM_H_
