// The leader's end of the workers' streams: a gRPC server of its own, and a WorkerLink for each worker that has
// dialled.
#ifndef SOLOIST_ENGINE_CLUSTER_WORKER_LINK_H_
#define SOLOIST_ENGINE_CLUSTER_WORKER_LINK_H_

#include <memory>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/cluster/message_stream.h"
#include "grpcpp/server.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "proto/worker.grpc.pb.h"

namespace soloist {

class WorkerLink;

// Called from gRPC's threads; of one link one at a time, OnGone last.
class LinkEvents {
 public:
  virtual ~LinkEvents() = default;
  virtual void OnMessage(const std::shared_ptr<WorkerLink>& link, grpc::ByteBuffer& message) = 0;
  virtual void OnGone(const std::shared_ptr<WorkerLink>& link) = 0;
};

class WorkerLink final : public MessageStream<grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>>,
                         public std::enable_shared_from_this<WorkerLink> {
 public:
  WorkerLink(LinkEvents& events, grpc::CallbackServerContext& context);
  // Keeps itself alive until gRPC is done with it.
  void Begin();
  // Ends the stream at once, whatever the worker does. Any thread, no lock held.
  void Cut();
  const std::string& peer() const { return peer_; }

 private:
  void OnMessage(grpc::ByteBuffer& message) override;
  void OnWritesEnded(bool broken) override;
  void OnCancel() override;
  void OnDone() override;

  LinkEvents& events_;
  const std::string peer_;
  std::mutex context_mutex_;
  grpc::CallbackServerContext* context_;  // context_mutex_; null once gRPC is done
  std::shared_ptr<WorkerLink> self_;
};

class ClusterServer final {
 public:
  // UNAVAILABLE if the address cannot be had. `events` must outlive it.
  static absl::StatusOr<std::unique_ptr<ClusterServer>> Listen(const std::string& address, LinkEvents& events);
  // Cuts what is left; no event comes after it.
  ~ClusterServer();
  const std::string& address() const { return address_; }
  // Streams end by themselves within `grace`, or are cut.
  void Shutdown(absl::Duration grace);

 private:
  class Service final : public worker::v1::Cluster::WithRawCallbackMethod_Join<worker::v1::Cluster::Service> {
   public:
    explicit Service(LinkEvents& events) : events_(events) {}
    grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Join(grpc::CallbackServerContext* context) override;

   private:
    LinkEvents& events_;
  };

  explicit ClusterServer(LinkEvents& events) : service_(events) {}

  Service service_;
  std::string address_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_WORKER_LINK_H_
