#include "server/grpc_inference.h"

#include <chrono>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "base/logging.h"
#include "base/status.h"
#include "grpcpp/alarm.h"
#include "server/grpc_convert.h"

namespace soloist {
namespace {

// How long a reader whose request was cancelled for its slowness may take for what is left, before a reset.
constexpr std::chrono::seconds kSlowReaderGrace{30};

// One Generate call. At most one write is outstanding; what the step loop makes meanwhile waits in the OutputStream.
//
// gRPC's rules: no StartWrite after Finish, Finish once and with no write outstanding, no touch after OnDone. gRPC
// calls are made outside mutex_, since they may run reactions at once; `writing_` keeps them one at a time. The object
// keeps itself alive until OnDone and for as long as a posted job holds it.
class GenerateCall final : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                           public std::enable_shared_from_this<GenerateCall> {
 public:
  GenerateCall(Frontend& frontend, grpc::CallbackServerContext& context, bool logprobs)
      : frontend_(frontend), context_(context), logprobs_(logprobs) {}

  void Begin(GenerationRequest request) {
    self_ = shared_from_this();
    const std::weak_ptr<GenerateCall> weak = self_;
    frontend_.Generate(std::move(request),
                       {.accepted = [call = self_](std::shared_ptr<OutputStream> stream,
                                                   uint64_t seed) { call->OnAccepted(std::move(stream), seed); },
                        .refused = [call = self_](const absl::Status& status) { call->OnRefused(status); },
                        // From the step loop: hand over to another thread.
                        .ready =
                            [weak] {
                              if (const auto call = weak.lock()) {
                                call->frontend_.Post([call] { call->Pump(); });
                              }
                            }});
  }

  void OnWriteDone(bool ok) override {
    {
      const std::lock_guard lock(mutex_);
      writing_ = false;
      broken_ = broken_ || !ok;
    }
    Pump();
  }

  // Reset by the client, its deadline, a lost connection, or the server's shutdown.
  void OnCancel() override {
    bool cancel;
    {
      const std::lock_guard lock(mutex_);
      broken_ = true;
      cancel = stream_ != nullptr && !closed_;
    }
    if (cancel) frontend_.Cancel(id_);
    Pump();
  }

  void OnDone() override {
    {
      const std::lock_guard lock(context_mutex_);
      done_ = true;
    }
    slow_reader_alarm_.Cancel();
    Close();
    self_.reset();
  }

 private:
  void OnAccepted(std::shared_ptr<OutputStream> stream, uint64_t seed) {
    bool cancel;
    {
      const std::lock_guard lock(mutex_);
      stream_ = std::move(stream);
      id_ = stream_->options().request_id;
      v1::Accepted& accepted = *first_.emplace().mutable_accepted();
      accepted.set_request_id(id_);
      accepted.set_prompt_tokens(stream_->options().prompt_tokens);
      accepted.set_seed(seed);
      cancel = broken_;  // cancelled before it was accepted
    }
    if (cancel) frontend_.Cancel(id_);
    Pump();
  }

  void OnRefused(const absl::Status& status) {
    spdlog::debug("Generate from {} refused: {}", context_.peer(), status.ToString());
    {
      const std::lock_guard lock(mutex_);
      if (finished_) return;
      finished_ = true;
    }
    Finish(ToGrpc(status));
  }

  // Takes what has arrived, and writes the next event if none is being written.
  void Pump() {
    bool write = false, finish = false, watch = false;
    {
      const std::lock_guard lock(mutex_);
      if (finished_) return;
      if (stream_ != nullptr) {
        stream_->Process();
        if (stream_->overflowed() && !watching_) watch = watching_ = true;
      }
      if (writing_) {
        // OnWriteDone comes.
      } else if (broken_) {
        // Not before it is accepted or refused: until then the prompt may be in use.
        finish = finished_ = stream_ != nullptr;
      } else {
        write = writing_ = TakeNext();
        finish = finished_ = !write && ended_;
      }
    }
    if (watch) WatchSlowReader();
    if (write) StartWrite(&response_);
    if (!finish) return;
    Close();
    Finish(broken_ ? grpc::Status(grpc::StatusCode::CANCELLED, "cancelled") : grpc::Status::OK);
  }

  // mutex_ is held.
  bool TakeNext() {
    if (stream_ == nullptr) return false;
    if (first_.has_value()) {
      response_ = *std::move(first_);
      first_.reset();
      return true;
    }
    std::optional<StreamEvent> event = stream_->Next();
    if (!event.has_value()) return false;
    response_ = ToProto(*event, logprobs_, frontend_);
    if (std::holds_alternative<RequestEnd>(*event)) ended_ = true;
    return true;
  }

  void WatchSlowReader() {
    spdlog::warn("request {}: the reader is too slow, its outputs are cancelled", id_);
    slow_reader_alarm_.Set(std::chrono::system_clock::now() + kSlowReaderGrace,
                           [call = shared_from_this()](bool fired) {
                             if (!fired) return;
                             const std::lock_guard lock(call->context_mutex_);
                             if (!call->done_) call->context_.TryCancel();
                           });
  }

  void Close() {
    {
      const std::lock_guard lock(mutex_);
      if (closed_ || stream_ == nullptr) return;
      closed_ = true;
    }
    frontend_.Closed(id_);
  }

  Frontend& frontend_;
  grpc::CallbackServerContext& context_;  // until OnDone
  const bool logprobs_;
  std::shared_ptr<GenerateCall> self_;  // until OnDone
  grpc::Alarm slow_reader_alarm_;
  v1::GenerateResponse response_;  // being written while writing_

  std::mutex context_mutex_;
  bool done_ = false;  // context_mutex_; context_ is gone

  std::mutex mutex_;  // guards what follows; id_ is constant once stream_ is there
  std::shared_ptr<OutputStream> stream_;
  std::string id_;
  std::optional<v1::GenerateResponse> first_;
  bool writing_ = false;
  bool broken_ = false;    // nothing can be sent any more
  bool ended_ = false;     // the last event was taken
  bool finished_ = false;  // Finish was or is being called
  bool closed_ = false;
  bool watching_ = false;
};

grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext& context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context.DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

}  // namespace

grpc::ServerWriteReactor<v1::GenerateResponse>* InferenceService::Generate(grpc::CallbackServerContext* context,
                                                                           const v1::GenerateRequest* request) {
  auto call = std::make_shared<GenerateCall>(frontend_, *context, request->has_logprobs());
  GenerateCall* reactor = call.get();
  GenerationRequest generation = FromProto(*request);
  const auto& metadata = context->client_metadata();
  if (const auto it = metadata.find("traceparent"); it != metadata.end()) {
    generation.trace_parent.assign(it->second.data(), it->second.size());
  }
  call->Begin(std::move(generation));
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                                  v1::AbortResponse*) {
  return Reply(*context, frontend_.Abort(request->request_id()));
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const v1::TokenizeRequest* request,
                                                     v1::TokenizeResponse* response) {
  const ServerLimits& limits = frontend_.limits();
  if (static_cast<int64_t>(request->text().size()) > limits.max_prompt_bytes) {
    return Reply(*context, InvalidArgument("bytes of the text: {}, the limit is {}", request->text().size(),
                                           limits.max_prompt_bytes));
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const absl::Status posted = frontend_.PostLarge([this, request, response, reactor] {
    const Tokenizer& tokenizer = frontend_.tokenizer();
    const std::vector<int32_t> ids = tokenizer.Encode(
        request->text(),
        {.add_special_tokens = !request->has_add_special_tokens() || request->add_special_tokens(),
         .parse_special_tokens = !request->has_parse_special_tokens() || request->parse_special_tokens()});
    response->mutable_token_ids()->Add(ids.begin(), ids.end());
    if (request->return_token_bytes()) {
      for (const int32_t id : ids) response->add_token_bytes(std::string(tokenizer.TokenBytes(id)));
    }
    if (const Engine* engine = frontend_.engine()) response->set_max_model_len(engine->Info().limits.max_model_len);
    reactor->Finish(grpc::Status::OK);
  });
  if (!posted.ok()) reactor->Finish(ToGrpc(posted));
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  const Tokenizer& tokenizer = frontend_.tokenizer();
  const std::vector<int32_t> ids(request->token_ids().begin(), request->token_ids().end());
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= tokenizer.vocab_size()) {
      return Reply(*context,
                   InvalidArgument("token_ids[{}] is {}, allowed: 0 to {}", i, ids[i], tokenizer.vocab_size() - 1));
    }
  }
  response->set_text(tokenizer.Decode(ids, request->skip_special_tokens()));
  return Reply(*context, absl::OkStatus());
}

}  // namespace soloist
