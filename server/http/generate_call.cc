#include "server/http/generate_call.h"

#include <atomic>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/logging.h"
#include "base/status.h"
#include "server/http/api_error.h"
#include "server/http/openai_response.h"

namespace soloist {
namespace {

// Prompts of one request that are being admitted at a time: many large ones must not fill the queue for all.
constexpr int kMaxInAdmission = 8;
// A piece of a stream is closed when it passes this.
constexpr size_t kPieceBytes = 64 << 10;
// How long a reader whose request was cancelled for its slowness may take for what is left, before a reset.
constexpr absl::Duration kSlowReaderGrace = absl::Seconds(30);
// An X-Request-Id in front of our own id.
constexpr size_t kMaxIdPrefixBytes = 64;

std::string DrawAnswerId(const OpenAiRequest& request, const HttpRequest& http) {
  const std::string prefix = request.chat ? "chatcmpl-" : "cmpl-";
  if (const auto& own = request.prompts.front().request_id) return prefix + *own;
  const std::string drawn = DrawRequestId().substr(4);
  if (http.request_id.empty()) return prefix + drawn;
  return prefix + http.request_id.substr(0, kMaxIdPrefixBytes) + "-" + drawn;
}

// All of it runs in the exchange's strand, but for the front end's callbacks, which only post there. The exchange holds
// it until the answer is complete, the callbacks until each prompt is accepted or refused.
class GenerateCall final : public HttpExchange::Listener, public std::enable_shared_from_this<GenerateCall> {
 public:
  GenerateCall(Frontend& frontend, std::shared_ptr<HttpExchange> exchange, OpenAiRequest request,
               const GenerateCallOptions& options)
      : frontend_(frontend),
        exchange_(std::move(exchange)),
        options_(options),
        request_(std::move(request)),
        id_(DrawAnswerId(request_, exchange_->request())),
        writer_(WriterOptions(), frontend.tokenizer()),
        parts_(request_.prompts.size()) {}

  void Begin() {
    exchange_->Listen(shared_from_this());
    IssueMore();
  }

  void OnWritten() override {
    writing_ = false;
    if (!tail_.empty()) return FlushTail();
    Pump();
  }

  void OnGone() override {
    if (over_) return;
    over_ = true;
    CloseAll(true);
  }

 private:
  struct Part {
    std::string id;
    std::shared_ptr<OutputStream> stream;  // null: not accepted yet
    // What its choices say of it.
    std::string prompt_text;
    std::vector<int32_t> prompt_token_ids;
    std::shared_ptr<std::vector<TokenEvent>> prompt_tokens;  // echo with logprobs: as they come, all before any text
    bool ended = false, closed = false;
    RequestEnd totals;
  };
  struct Choice {
    AnswerChoice answer;
    std::string text;                // not streamed: all of it
    std::vector<TokenEvent> tokens;  // the same, where the answer needs them
    std::optional<OutputEnd> end;
  };

  AnswerOptions WriterOptions() const {
    const GenerationRequest& first = request_.prompts.front();
    return {.chat = request_.chat,
            .id = id_,
            .model = frontend_.model().name,
            .created_unix_s = frontend_.UnixNs(frontend_.clock().NowNs()) / 1'000'000'000,
            .logprobs = first.logprobs.has_value(),
            .token_ids = request_.return_token_ids,
            .tokens_as_ids = request_.return_tokens_as_token_ids,
            .skip_special_tokens = first.skip_special_tokens,
            .usage_field = request_.include_usage,
            .eos_ids = frontend_.model().eos_token_ids};
  }

  void KeepPrompt(const GenerationRequest& prompt, Part& part) const {
    const auto* ids = std::get_if<std::vector<int32_t>>(&prompt.prompt);
    if (ids != nullptr && request_.return_token_ids) part.prompt_token_ids = *ids;
    if (!request_.echo) return;
    part.prompt_text = ids != nullptr ? frontend_.tokenizer().Decode(*ids, prompt.skip_special_tokens)
                                      : std::get<std::string>(prompt.prompt);
  }

  // All prompts are accepted: the front end has checked n.
  void BeginChoices() {
    for (Part& part : parts_) {
      if (request_.echo && writer_.options().logprobs) {
        part.prompt_tokens = std::make_shared<std::vector<TokenEvent>>();
        part.prompt_tokens->emplace_back().token = part.stream->options().first_prompt_token;
      }
      for (int32_t i = 0; i < request_.n; ++i) {
        Choice& choice = choices_.emplace_back();
        choice.answer.index = static_cast<int32_t>(choices_.size()) - 1;
        choice.answer.prompt_text = part.prompt_text;
        choice.answer.prompt_token_ids = part.prompt_token_ids;
        choice.answer.prompt_tokens = part.prompt_tokens;
      }
    }
  }

  // ---- Admission

  void IssueMore() {
    while (!over_ && issued_ < parts_.size() && in_admission_ < kMaxInAdmission) Issue(issued_++);
  }

  void Issue(size_t index) {
    ++in_admission_;
    Part& part = parts_[index];
    part.id = parts_.size() == 1 ? id_ : fmt::format("{}-{}", id_, index);
    GenerationRequest generation = std::move(request_.prompts[index]);
    KeepPrompt(generation, part);
    generation.request_id = part.id;
    generation.trace_parent = exchange_->request().trace_parent;
    const std::weak_ptr<GenerateCall> weak = weak_from_this();
    frontend_.Generate(
        std::move(generation),
        {.accepted =
             [self = shared_from_this(), index](std::shared_ptr<OutputStream> stream, uint64_t) {
               self->exchange_->Post([self, index, stream = std::move(stream)] { self->OnAccepted(index, stream); });
             },
         .refused =
             [self = shared_from_this(), index](const absl::Status& status) {
               self->exchange_->Post([self, index, status] { self->OnRefused(index, status); });
             },
         .ready =
             [weak] {
               if (const auto self = weak.lock()) self->PostPump();
             }});
  }

  void OnAccepted(size_t index, std::shared_ptr<OutputStream> stream) {
    --in_admission_;
    parts_[index].stream = std::move(stream);
    if (over_) return CloseAll(true);
    IssueMore();
    if (++accepted_ == parts_.size()) BeginChoices();
    if (accepted_ == parts_.size() && request_.stream) {
      exchange_->BeginStream({.content_type = "text/event-stream; charset=utf-8",
                              .body = {},
                              .headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}}},
                             ": ping\n\n", options_.heartbeat);
    }
    Pump();
  }

  void OnRefused(size_t index, const absl::Status& status) {
    --in_admission_;
    if (over_) return;
    ApiError error = ToApiError(status);
    if (error.status == 400 && error.param.empty()) error.param = FieldOf(error.message);
    if (parts_.size() > 1) error.message = fmt::format("prompt {}: {}", index, error.message);
    spdlog::debug("HTTP request {} refused: {}", id_, error.message);
    Fail(error);
  }

  // ---- Tokens

  // Any thread.
  void PostPump() {
    if (pump_posted_.exchange(true)) return;
    exchange_->Post([self = shared_from_this()] {
      self->pump_posted_ = false;
      self->Pump();
    });
  }

  // Takes what has arrived, and writes it if nothing is being written.
  void Pump() {
    if (over_ || accepted_ < parts_.size()) return;
    for (Part& part : parts_) {
      part.stream->Process();
      if (part.stream->overflowed() && !watching_) {
        spdlog::warn("request {}: the reader is too slow, its outputs are cancelled", part.id);
        watching_ = true;
        exchange_->LimitWriting(kSlowReaderGrace);
      }
    }
    if (writing_) return;
    std::string& out = exchange_->buffer();
    bool more = true;
    while (more && out.size() < kPieceBytes) {
      more = false;
      for (size_t i = 0; i < parts_.size(); ++i) {
        const std::optional<StreamEvent> event = parts_[i].stream->Next();
        if (!event.has_value()) continue;
        more = true;
        if (const absl::Status status = Take(i, *event, out); !status.ok()) {
          out.clear();
          return Fail(ToApiError(status));
        }
      }
    }
    if (ended_ == parts_.size()) return Complete(out);
    if (out.empty()) return;
    writing_ = true;
    exchange_->Flush(false);
  }

  absl::Status Take(size_t index, const StreamEvent& event, std::string& out) {
    if (const auto* all = std::get_if<RequestEnd>(&event)) {
      parts_[index].totals = *all;
      parts_[index].ended = true;
      ++ended_;
      return absl::OkStatus();
    }
    if (const auto* scores = std::get_if<PromptLogprobs>(&event)) return KeepScores(parts_[index], *scores);
    const auto* delta = std::get_if<Delta>(&event);
    const int32_t output = delta != nullptr ? delta->output_index : std::get<OutputEnd>(event).output_index;
    Choice& choice = choices_[index * request_.n + output];
    if (delta == nullptr) {
      const auto& end = std::get<OutputEnd>(event);
      if (end.reason == FinishReason::kError) return end.error;
      if (!request_.stream) {
        choice.end = end;
        return absl::OkStatus();
      }
      const AnswerUsage usage = UsageSoFar(index, choice, 0);
      writer_.AppendFinish(out, choice.answer, end, request_.continuous_usage_stats ? &usage : nullptr);
      return absl::OkStatus();
    }
    if (!request_.stream) return Keep(choice, *delta);
    const AnswerUsage usage = UsageSoFar(index, choice, static_cast<int32_t>(delta->tokens.size()));
    writer_.AppendDelta(out, choice.answer, delta->text, delta->tokens,
                        request_.continuous_usage_stats ? &usage : nullptr);
    return absl::OkStatus();
  }

  static int64_t BytesOf(const TokenEvent& token) {
    return static_cast<int64_t>(sizeof(TokenEvent) + token.top_logprobs.size() * sizeof(token.top_logprobs[0]));
  }

  absl::Status CheckKept() const {
    if (kept_bytes_ <= options_.max_answer_bytes) return absl::OkStatus();
    return InvalidArgument("the answer has more than {} bytes: ask for it with stream", options_.max_answer_bytes);
  }

  // An echo without logprobs has no use for them.
  absl::Status KeepScores(const Part& part, const PromptLogprobs& scores) {
    if (part.prompt_tokens == nullptr) return absl::OkStatus();
    for (int32_t i = 0; i < scores.size(); ++i) {
      TokenEvent& token = part.prompt_tokens->emplace_back();
      token.token = scores.tokens[i];
      token.logprob = scores.logprobs[i];
      for (int32_t k = i * scores.num_top; k < (i + 1) * scores.num_top && scores.top_tokens[k] >= 0; ++k) {
        token.top_logprobs.emplace_back(scores.top_tokens[k], scores.top_logprobs[k]);
      }
      kept_bytes_ += BytesOf(token);
    }
    return CheckKept();
  }

  absl::Status Keep(Choice& choice, const Delta& delta) {
    choice.text += delta.text;
    kept_bytes_ += static_cast<int64_t>(delta.text.size());
    choice.answer.completion_tokens += static_cast<int32_t>(delta.tokens.size());
    if (writer_.options().logprobs || writer_.options().token_ids) {
      for (const TokenEvent& token : delta.tokens) {
        kept_bytes_ += BytesOf(token);
      }
      choice.tokens.insert(choice.tokens.end(), delta.tokens.begin(), delta.tokens.end());
    }
    return CheckKept();
  }

  AnswerUsage UsageSoFar(size_t index, const Choice& choice, int32_t new_tokens) const {
    return {.prompt_tokens = parts_[index].stream->options().prompt_tokens,
            .completion_tokens = choice.answer.completion_tokens + new_tokens};
  }

  // ---- The end

  void Complete(std::string& out) {
    AnswerUsage usage;
    for (const Part& part : parts_) {
      usage.prompt_tokens += part.totals.prompt_tokens;
      usage.completion_tokens += part.totals.output_tokens;
      usage.cached_tokens += part.totals.cached_prompt_tokens;
    }
    over_ = true;
    CloseAll(false);
    if (request_.stream) {
      if (request_.include_usage) writer_.AppendUsage(out, usage);
      AnswerWriter::AppendDone(out);
      return exchange_->Flush(true);
    }
    HttpResponse response{.body = {}, .headers = {}};
    writer_.AppendBegin(response.body);
    for (Choice& choice : choices_) {
      writer_.AppendChoice(response.body, choice.answer, choice.text, choice.tokens, *choice.end);
    }
    writer_.AppendEnd(response.body, usage);
    exchange_->Respond(std::move(response));
  }

  void Fail(const ApiError& error) {
    over_ = true;
    CloseAll(true);
    if (!writing_ && !exchange_->started()) return exchange_->Respond(ErrorResponse(error));
    AnswerWriter::AppendError(tail_, error);
    AnswerWriter::AppendDone(tail_);
    if (!writing_) FlushTail();
  }

  void FlushTail() {
    exchange_->buffer() = std::move(tail_);
    tail_.clear();
    exchange_->Flush(true);
  }

  // Of the prompts that are accepted; the front end logs each.
  void CloseAll(bool cancel) {
    for (Part& part : parts_) {
      if (part.stream == nullptr || part.closed) continue;
      part.closed = true;
      if (cancel && !part.ended) frontend_.Cancel(part.id);
      frontend_.Closed(part.id);
    }
  }

  Frontend& frontend_;
  const std::shared_ptr<HttpExchange> exchange_;
  const GenerateCallOptions options_;
  OpenAiRequest request_;
  const std::string id_;
  const AnswerWriter writer_;
  std::vector<Part> parts_;      // [prompts]
  std::vector<Choice> choices_;  // [prompts * n], prompt-major
  size_t issued_ = 0, accepted_ = 0, ended_ = 0;
  int in_admission_ = 0;
  int64_t kept_bytes_ = 0;
  std::string tail_;  // what ends the stream when the piece that is being written is out
  bool writing_ = false;
  bool watching_ = false;
  bool over_ = false;  // answered, or nobody to answer
  std::atomic<bool> pump_posted_{false};
};

}  // namespace

void AnswerGeneration(Frontend& frontend, std::shared_ptr<HttpExchange> exchange, OpenAiRequest request,
                      const GenerateCallOptions& options) {
  std::make_shared<GenerateCall>(frontend, std::move(exchange), std::move(request), options)->Begin();
}

}  // namespace soloist
