#include "cli/loadtest/grpc_client.h"

#include <atomic>
#include <chrono>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "grpcpp/grpcpp.h"
#include "proto/soloist/v1/control.grpc.pb.h"
#include "proto/soloist/v1/inference.grpc.pb.h"

namespace soloist::cli {
namespace {

constexpr std::chrono::seconds kConnectTimeout(10);

std::string CodeName(int code) { return std::string(absl::StatusCodeToString(static_cast<absl::StatusCode>(code))); }

absl::Status ToAbsl(const grpc::Status& status, const std::string& address) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      fmt::format("{}: {}", address, status.error_message()));
}

// One Generate call, made ahead. Keeps itself alive between Send and OnDone.
class Call final : public PreparedCall,
                   public std::enable_shared_from_this<Call>,
                   public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  static std::shared_ptr<Call> Create(v1::InferenceService::Stub& stub, const PlannedRequest& planned,
                                      RequestRecord* record, std::function<void()> done) {
    std::shared_ptr<Call> call(new Call(planned, record, std::move(done)), [](Call* last) { last->Release(); });
    stub.async()->Generate(&call->context_, &call->request_, call.get());
    call->StartRead(&call->response_);
    return call;
  }
  void Send() override {
    self_ = shared_from_this();
    record_.sent_ns = Clock::Real().NowNs();
    StartCall();
  }
  void OnReadDone(bool ok) override {
    if (!ok) return;
    Take();
    StartRead(&response_);
  }
  void OnDone(const grpc::Status& status) override {
    if (released_) {
      delete this;
      return;
    }
    record_.end_ns = Clock::Real().NowNs();
    if (hung_up_ && status.error_code() == grpc::CANCELLED) {
      record_.outcome = "cancelled";
    } else if (!status.ok()) {
      record_.outcome = CodeName(status.error_code());
      record_.detail = status.error_message();
    } else if (!error_.empty()) {
      record_.outcome = error_;
    } else {
      record_.outcome = completed_ ? "ok" : "incomplete";
    }
    const std::shared_ptr<Call> self = std::move(self_);
    ended_ = true;
    done_();
  }

 private:
  Call(const PlannedRequest& planned, RequestRecord* record, std::function<void()> done)
      : record_(*record), done_(std::move(done)) {
    record_.token_source = TokenSource::kTokenIds;
    if (planned.text.empty()) {
      auto* ids = request_.mutable_token_ids()->mutable_ids();
      ids->Add(planned.prompt.begin(), planned.prompt.end());
    } else {
      request_.set_text(planned.text);
    }
    request_.mutable_sampling()->set_max_tokens(planned.output_tokens);
    request_.mutable_sampling()->set_temperature(0);
    request_.mutable_stop()->set_ignore_eos(true);
  }
  // A call that gRPC has made ends in OnDone only, and OnDone comes only after a start: one that was never sent starts
  // cancelled, and touches no record.
  void Release() {
    if (ended_) {
      delete this;
      return;
    }
    released_ = true;
    context_.TryCancel();
    StartCall();
  }
  void Take() {
    if (response_.has_delta() && response_.delta().token_ids_size() > 0) {
      record_.AddChunk(Clock::Real().NowNs(), response_.delta().token_ids_size());
      if (record_.cancel_after_tokens > 0 && record_.output_tokens >= record_.cancel_after_tokens && !hung_up_) {
        hung_up_ = true;
        context_.TryCancel();
      }
    } else if (response_.has_finished()) {
      const v1::OutputFinished& finished = response_.finished();
      if (finished.reason() == v1::FINISH_REASON_ERROR) error_ = "output " + CodeName(finished.error().code());
      if (finished.reason() == v1::FINISH_REASON_CANCELLED) error_ = "cancelled by the server";
      if (finished.output_tokens() != record_.output_tokens && error_.empty()) error_ = "tokens lost";
    } else if (response_.has_accepted()) {
      record_.prompt_tokens = response_.accepted().prompt_tokens();
    } else if (response_.has_completed()) {
      completed_ = true;
      if (!response_.completed().has_timing()) return;
      const v1::Timing& timing = response_.completed().timing();
      record_.engine_queue_ns = timing.queue_ns();
      record_.engine_ttft_ns = timing.time_to_first_token_ns();
      record_.engine_total_ns = timing.total_ns();
    }
  }

  RequestRecord& record_;
  const std::function<void()> done_;
  std::shared_ptr<Call> self_;
  grpc::ClientContext context_;
  v1::GenerateRequest request_;
  v1::GenerateResponse response_;
  bool hung_up_ = false, completed_ = false, ended_ = false, released_ = false;
  std::string error_;
};

class Client final : public GrpcLoadClient {
 public:
  Client(const std::vector<std::shared_ptr<grpc::Channel>>& channels, ServerDescription server)
      : server_(std::move(server)) {
    for (const auto& channel : channels) stubs_.push_back(v1::InferenceService::NewStub(channel));
  }
  std::shared_ptr<PreparedCall> Prepare(const PlannedRequest& request, RequestRecord* record,
                                        std::function<void()> done) override {
    return Call::Create(*stubs_[next_++ % stubs_.size()], request, record, std::move(done));
  }
  absl::StatusOr<int> CountTokens(const std::string& text) override {
    grpc::ClientContext context;
    v1::TokenizeRequest request;
    v1::TokenizeResponse response;
    request.set_text(text);
    request.set_add_special_tokens(false);
    RETURN_IF_ERROR(ToAbsl(stubs_.front()->Tokenize(&context, request, &response), "Tokenize"));
    return response.token_ids_size();
  }
  const ServerDescription& server() const override { return server_; }

 private:
  const ServerDescription server_;
  std::vector<std::unique_ptr<v1::InferenceService::Stub>> stubs_;
  std::atomic<size_t> next_{0};
};

}  // namespace

absl::StatusOr<std::unique_ptr<GrpcLoadClient>> GrpcLoadClient::Connect(const std::string& address, int connections) {
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (int i = 0; i < connections; ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
    arguments.SetMaxReceiveMessageSize(-1);
    channels.push_back(grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
  }
  const auto control = v1::ControlService::NewStub(channels.front());
  ServerDescription server;
  {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kConnectTimeout);
    v1::GetServerInfoResponse info;
    RETURN_IF_ERROR(ToAbsl(control->GetServerInfo(&context, {}, &info), address));
    server.version = info.version();
    server.device = info.layout().device();
    server.num_ranks = info.layout().num_ranks();
  }
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kConnectTimeout);
  v1::GetModelInfoResponse model;
  RETURN_IF_ERROR(ToAbsl(control->GetModelInfo(&context, {}, &model), address));
  server.model = model.name();
  server.vocab_size = model.vocab_size();
  server.max_model_len = model.max_model_len();
  return std::make_unique<Client>(channels, std::move(server));
}

}  // namespace soloist::cli
