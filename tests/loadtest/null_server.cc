// A server without an engine, to measure the load tester itself: every stream gets its tokens at a given rate. A
// stream that is written late gets the tokens due in one message, as the real server's readers do.
//
// null_server PORT INTERVAL_US [http]: a token per stream each INTERVAL_US, over gRPC or OpenAI's HTTP interface.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "fmt/format.h"
#include "grpcpp/alarm.h"
#include "grpcpp/grpcpp.h"
#include "proto/soloist/v1/control.grpc.pb.h"
#include "proto/soloist/v1/inference.grpc.pb.h"
#include "tests/loadtest/null_http_server.h"

namespace soloist {
namespace {

using SystemClock = std::chrono::system_clock;

class Stream final : public grpc::ServerWriteReactor<v1::GenerateResponse> {
 public:
  Stream(const v1::GenerateRequest& request, std::chrono::microseconds interval)
      : interval_(interval), tokens_(request.sampling().max_tokens()) {
    response_.mutable_accepted()->set_prompt_tokens(request.token_ids().ids_size());
    StartWrite(&response_);
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return Finish(grpc::Status::CANCELLED);
    if (completed_) return Finish(grpc::Status::OK);
    if (finished_) {
      completed_ = true;
      response_.mutable_completed()->mutable_usage()->set_output_tokens(sent_);
      return StartWrite(&response_);
    }
    if (sent_ == tokens_) {
      finished_ = true;
      response_.mutable_finished()->set_reason(v1::FINISH_REASON_LENGTH);
      response_.mutable_finished()->set_output_tokens(sent_);
      return StartWrite(&response_);
    }
    alarm_.Set(start_ + interval_ * (sent_ + 1), [this](bool) { WriteDue(); });
  }
  void OnDone() override { delete this; }

 private:
  void WriteDue() {
    const auto due = static_cast<int>((SystemClock::now() - start_) / interval_);
    const int until = std::clamp(due, sent_ + 1, tokens_);
    auto* ids = response_.mutable_delta()->mutable_token_ids();
    ids->Clear();
    for (; sent_ < until; ++sent_) ids->Add(sent_);
    StartWrite(&response_);
  }

  const std::chrono::microseconds interval_;
  const int tokens_;
  const SystemClock::time_point start_ = SystemClock::now();
  int sent_ = 0;
  bool finished_ = false, completed_ = false;
  v1::GenerateResponse response_;
  grpc::Alarm alarm_;
};

class Inference final : public v1::InferenceService::CallbackService {
 public:
  explicit Inference(std::chrono::microseconds interval) : interval_(interval) {}
  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext*,
                                                           const v1::GenerateRequest* request) override {
    return new Stream(*request, interval_);
  }

 private:
  const std::chrono::microseconds interval_;
};

class Control final : public v1::ControlService::Service {
  grpc::Status GetServerInfo(grpc::ServerContext*, const v1::GetServerInfoRequest*,
                             v1::GetServerInfoResponse* response) override {
    response->set_version("null");
    return grpc::Status::OK;
  }
  grpc::Status GetModelInfo(grpc::ServerContext*, const v1::GetModelInfoRequest*,
                            v1::GetModelInfoResponse* response) override {
    response->set_name("null");
    response->set_vocab_size(32000);
    return grpc::Status::OK;
  }
};

}  // namespace
}  // namespace soloist

int main(int argc, char** argv) {
  const bool http = argc == 4 && std::string(argv[3]) == "http";
  if ((argc != 3 && !http) || std::atoi(argv[2]) < 1) {
    fmt::print(stderr, "null_server PORT INTERVAL_US [http]\n");
    return 2;
  }
  if (http) {
    soloist::NullHttpServer server(
        {.port = std::atoi(argv[1]), .interval = std::chrono::microseconds(std::atoi(argv[2]))});
    if (server.port() == 0) return 1;
    fmt::print(stderr, "listening on port {}\n", server.port());
    pause();
  }
  soloist::Inference inference{std::chrono::microseconds(std::atoi(argv[2]))};
  soloist::Control control;
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort(std::string("127.0.0.1:") + argv[1], grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&inference);
  builder.RegisterService(&control);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || port == 0) return 1;
  fmt::print(stderr, "listening on port {}\n", port);
  server->Wait();
}
