// LeaderStream: a worker's end of the stream to the leader.
#ifndef SOLOIST_ENGINE_CLUSTER_LEADER_STREAM_H_
#define SOLOIST_ENGINE_CLUSTER_LEADER_STREAM_H_

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/cluster/message_stream.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/client_callback.h"

namespace soloist {

class LeaderStream final : public MessageStream<grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>> {
 public:
  // Called from gRPC's threads: a message; the end, once, after the last message.
  using OnBytes = std::function<void(grpc::ByteBuffer& message)>;
  using OnEnd = std::function<void(const absl::Status& status)>;

  LeaderStream(const std::string& address, OnBytes on_message, OnEnd on_end);
  // Waits for the end: Close first.
  ~LeaderStream() override;

  // Writes what is queued, then ends the stream; cuts it off if the leader does not take it within `patience`.
  void Close(absl::Duration patience);
  // Whether the leader has ever answered on this stream.
  bool connected() const;

 private:
  void OnReadInitialMetadataDone(bool ok) override;
  void OnMessage(grpc::ByteBuffer& message) override { on_message_(message); }
  void OnWritesEnded(bool broken) override;
  void OnDone(const grpc::Status& status) override;

  const OnBytes on_message_;
  const OnEnd on_end_;
  std::shared_ptr<grpc::Channel> channel_;
  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool connected_ = false;
  bool done_ = false;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_LEADER_STREAM_H_
