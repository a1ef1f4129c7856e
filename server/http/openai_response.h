// Answers of /v1/completions and /v1/chat/completions: JSON, whole or as server-sent events, written straight into a
// buffer: one append per piece, no tree.
#ifndef SOLOIST_SERVER_HTTP_OPENAI_RESPONSE_H_
#define SOLOIST_SERVER_HTTP_OPENAI_RESPONSE_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "scheduler/request.h"
#include "server/http/api_error.h"
#include "server/output_stream.h"
#include "server/tokenizer/tokenizer.h"

namespace soloist {

struct AnswerOptions {
  bool chat = false;
  std::string id, model;
  int64_t created_unix_s = 0;
  bool logprobs = false;       // tokens have them
  bool token_ids = false;      // each piece says its tokens
  bool tokens_as_ids = false;  // "token_id:5" for a token's text in logprobs
  bool skip_special_tokens = true;
  bool usage_field = false;      // events have "usage", null where nothing is said
  std::vector<int32_t> eos_ids;  // end tokens of the model: not a stop_reason
};

struct AnswerUsage {
  int32_t prompt_tokens = 0, completion_tokens = 0;
  int32_t cached_tokens = 0;
};

// A choice as it grows.
struct AnswerChoice {
  int32_t index = 0;
  std::string prompt_text;  // goes in front of the text (echo)
  // With logprobs, in front of those of the text: the prompt's tokens, the first without a log-probability.
  std::shared_ptr<const std::vector<TokenEvent>> prompt_tokens;
  std::vector<int32_t> prompt_token_ids;  // said in the first piece, if not empty
  bool begun = false;
  int32_t text_offset = 0;        // characters so far, of the tokens' text
  int32_t completion_tokens = 0;  // so far
};

// Stateless but for its constants; what changes is in the AnswerChoice.
class AnswerWriter {
 public:
  // `tokenizer` must outlive it.
  AnswerWriter(AnswerOptions options, const Tokenizer& tokenizer);

  const AnswerOptions& options() const { return options_; }

  // Each appends one whole event. `usage`: null or the usage so far.
  void AppendDelta(std::string& out, AnswerChoice& choice, std::string_view text, std::span<const TokenEvent> tokens,
                   const AnswerUsage* usage) const;
  void AppendFinish(std::string& out, AnswerChoice& choice, const OutputEnd& end, const AnswerUsage* usage) const;
  // The event without choices that says the usage.
  void AppendUsage(std::string& out, const AnswerUsage& usage) const;
  static void AppendError(std::string& out, const ApiError& error);
  static void AppendDone(std::string& out);

  // The pieces of a whole answer: Begin, AppendChoice for each, End.
  void AppendBegin(std::string& out) const;
  void AppendChoice(std::string& out, AnswerChoice& choice, std::string_view text, std::span<const TokenEvent> tokens,
                    const OutputEnd& end) const;
  void AppendEnd(std::string& out, const AnswerUsage& usage) const;

 private:
  void AppendText(std::string& out, const AnswerChoice& choice, std::string_view text) const;
  void AppendLogprobs(std::string& out, AnswerChoice& choice, std::span<const TokenEvent> tokens) const;
  void AppendCompletionLogprobs(std::string& out, AnswerChoice& choice, std::span<const TokenEvent> tokens) const;
  void AppendChatLogprobs(std::string& out, std::span<const TokenEvent> tokens) const;
  void AppendChatLogprob(std::string& out, int32_t token, float logprob) const;
  void AppendTokenText(std::string& out, int32_t token) const;
  void AppendTokenIds(std::string& out, AnswerChoice& choice, std::span<const TokenEvent> tokens) const;
  void AppendEventEnd(std::string& out, const AnswerUsage* usage, bool details) const;
  void AppendFinishReason(std::string& out, const OutputEnd& end) const;
  int32_t TextLength(const AnswerChoice& choice, int32_t token) const;

  const AnswerOptions options_;
  const Tokenizer& tokenizer_;
  std::string head_;   // {"id":...,"choices":[
  std::string event_;  // data: {"id":...,"choices":[
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_OPENAI_RESPONSE_H_
