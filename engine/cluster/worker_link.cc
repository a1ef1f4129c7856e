#include "engine/cluster/worker_link.h"

#include <climits>
#include <utility>

#include "absl/time/clock.h"
#include "base/status.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"

namespace soloist {

WorkerLink::WorkerLink(LinkEvents& events, grpc::CallbackServerContext& context)
    : events_(events), peer_(context.peer()), context_(&context) {}

void WorkerLink::Begin() {
  self_ = shared_from_this();
  StartSendInitialMetadata();  // the worker learns that it has reached the leader
  StartReading();
}

void WorkerLink::Cut() {
  const std::lock_guard lock(context_mutex_);
  if (context_ != nullptr) context_->TryCancel();
}

void WorkerLink::OnMessage(grpc::ByteBuffer& message) { events_.OnMessage(self_, message); }

void WorkerLink::OnWritesEnded(bool broken) {
  Finish(broken ? grpc::Status(grpc::StatusCode::UNAVAILABLE, "the stream is broken") : grpc::Status::OK);
}

void WorkerLink::OnCancel() {
  MarkBroken();
  Flush();
}

void WorkerLink::OnDone() {
  {
    const std::lock_guard lock(context_mutex_);
    context_ = nullptr;
  }
  const std::shared_ptr<WorkerLink> self = std::move(self_);
  events_.OnGone(self);
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* ClusterServer::Service::Join(
    grpc::CallbackServerContext* context) {
  auto link = std::make_shared<WorkerLink>(events_, *context);
  link->Begin();
  return link.get();
}

absl::StatusOr<std::unique_ptr<ClusterServer>> ClusterServer::Listen(const std::string& address, LinkEvents& events) {
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == address.size()) {
    return InvalidArgument("cluster address is '{}', expected HOST:PORT", address);
  }
  std::unique_ptr<ClusterServer> server(new ClusterServer(events));
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&server->service_);
  builder.SetMaxReceiveMessageSize(INT_MAX);
  builder.SetMaxSendMessageSize(INT_MAX);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Workers ping every 5 s to see whether the leader is there.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1'000);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || port == 0) {
    return Unavailable("cannot listen for workers at {}: is the address right, and the port free?", address);
  }
  server->address_ = address.substr(0, colon + 1) + std::to_string(port);
  return server;
}

ClusterServer::~ClusterServer() { Shutdown(absl::ZeroDuration()); }

void ClusterServer::Shutdown(absl::Duration grace) {
  if (server_ == nullptr) return;
  server_->Shutdown(absl::ToChronoTime(absl::Now() + grace));
  server_->Wait();
  server_.reset();
}

}  // namespace soloist
