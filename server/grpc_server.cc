#include "server/grpc_server.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "base/status.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "server/grpc_control.h"
#include "server/grpc_inference.h"

namespace soloist {
namespace {

// How often grpc.health.v1 learns of the front end's state.
constexpr std::chrono::milliseconds kHealthPeriod{100};

class GrpcServerWithServices final : public GrpcServer {
 public:
  explicit GrpcServerWithServices(Frontend& frontend) : frontend_(frontend), inference_(frontend), control_(frontend) {}

  ~GrpcServerWithServices() override { Shutdown(absl::ZeroDuration()); }

  absl::Status Listen(const std::string& address) {
    static std::once_flag plugins;
    std::call_once(plugins, [] {
      grpc::EnableDefaultHealthCheckService(true);
      grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    });
    const size_t colon = address.rfind(':');
    if (colon == std::string::npos || colon == 0 || colon + 1 == address.size()) {
      return InvalidArgument("gRPC address is '{}', expected HOST:PORT", address);
    }
    const ServerLimits& limits = frontend_.limits();
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&inference_);
    builder.RegisterService(&control_);
    builder.SetMaxReceiveMessageSize(static_cast<int>(limits.max_message_bytes));
    builder.SetMaxSendMessageSize(-1);
    // A port in use is an error, not a share of its connections.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    // Clients may ping every 10 s, also with no call open; a connection that is dead is found within 50 s.
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, limits.max_streams + 64);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port == 0) {
      return Unavailable("cannot listen at {}: is the address right, and the port free?", address);
    }
    address_ = address.substr(0, colon + 1) + std::to_string(port);
    PublishHealth();
    health_thread_ = std::thread([this] { WatchHealth(); });
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }

  void Shutdown(absl::Duration grace) override {
    {
      const std::lock_guard lock(mutex_);
      if (server_ == nullptr || stop_) return;
      stop_ = true;
    }
    stopped_.notify_all();
    health_thread_.join();
    if (auto* health = server_->GetHealthCheckService()) health->Shutdown();
    server_->Shutdown(absl::ToChronoTime(absl::Now() + grace));
    server_->Wait();
  }

 private:
  void WatchHealth() {
    std::unique_lock lock(mutex_);
    while (!stopped_.wait_for(lock, kHealthPeriod, [this] { return stop_; })) PublishHealth();
  }

  void PublishHealth() {
    const ServerState state = frontend_.Health().state;
    const bool serving = state == ServerState::kReady || state == ServerState::kDegraded;
    if (auto* health = server_->GetHealthCheckService()) {
      health->SetServingStatus("", serving);
      health->SetServingStatus(v1::InferenceService::service_full_name(), serving);
      // What an operator asks is answered in every state.
      health->SetServingStatus(v1::ControlService::service_full_name(), true);
    }
  }

  Frontend& frontend_;
  InferenceService inference_;
  ControlService control_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::mutex mutex_;
  std::condition_variable stopped_;
  bool stop_ = false;  // mutex_
  std::thread health_thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Create(const std::string& address, Frontend& frontend) {
  auto server = std::make_unique<GrpcServerWithServices>(frontend);
  RETURN_IF_ERROR(server->Listen(address));
  return server;
}

}  // namespace soloist
