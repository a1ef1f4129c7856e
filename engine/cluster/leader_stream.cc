#include "engine/cluster/leader_stream.h"

#include <climits>
#include <utility>

#include "base/status.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/support/channel_arguments.h"

namespace soloist {
namespace {

constexpr char kMethod[] = "/soloist.worker.v1.Cluster/Join";

std::shared_ptr<grpc::Channel> Dial(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(INT_MAX);
  arguments.SetMaxSendMessageSize(INT_MAX);
  // A leader that is cut off or stopped is found within 10 s.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 5'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1'000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1'000);
  // Each dialling is a connection of its own: no state of one that has failed.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // A leader is an address of the cluster: never through a proxy that the environment names.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

}  // namespace

LeaderStream::LeaderStream(const std::string& address, OnBytes on_message, OnEnd on_end)
    : on_message_(std::move(on_message)), on_end_(std::move(on_end)), channel_(Dial(address)), stub_(channel_) {
  stub_.PrepareBidiStreamingCall(&context_, kMethod, grpc::StubOptions(), this);
  AddHold();  // writes come from other threads; until OnWritesEnded
  StartReading();
  StartCall();
}

LeaderStream::~LeaderStream() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return done_; });
}

void LeaderStream::Close(absl::Duration patience) {
  EndAfterWrites();
  {
    std::unique_lock lock(mutex_);
    if (changed_.wait_for(lock, absl::ToChronoNanoseconds(patience), [this] { return done_; })) return;
  }
  context_.TryCancel();
}

bool LeaderStream::connected() const {
  const std::lock_guard lock(mutex_);
  return connected_;
}

void LeaderStream::OnReadInitialMetadataDone(bool ok) {
  if (!ok) return;
  const std::lock_guard lock(mutex_);
  connected_ = true;
}

void LeaderStream::OnWritesEnded(bool broken) {
  if (!broken) StartWritesDone();
  RemoveHold();
}

void LeaderStream::OnDone(const grpc::Status& status) {
  on_end_(absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message()));
  const std::lock_guard lock(mutex_);
  done_ = true;
  changed_.notify_all();
}

}  // namespace soloist
