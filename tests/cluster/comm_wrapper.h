// A communicator that passes everything on to another, and can be told to misbehave.
#ifndef SOLOIST_TESTS_CLUSTER_COMM_WRAPPER_H_
#define SOLOIST_TESTS_CLUSTER_COMM_WRAPPER_H_

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "engine/cluster/worker_process.h"
#include "engine/comm/communicator.h"

namespace soloist {

struct Misbehaviour {
  // Called with what AllToAll has brought.
  std::function<void(void* recv, int64_t bytes_per_rank)> after_all_to_all;
  // Called before an AllToAll; an error is its result, and nothing is exchanged.
  std::function<absl::Status(Communicator& comm)> before_all_to_all;
  std::string transport;  // empty: its own
};

class CommWrapper final : public Communicator {
 public:
  CommWrapper(std::unique_ptr<Communicator> comm, Misbehaviour how) : comm_(std::move(comm)), how_(std::move(how)) {}
  int rank() const override { return comm_->rank(); }
  int size() const override { return comm_->size(); }
  std::string transport() const override { return how_.transport.empty() ? comm_->transport() : how_.transport; }
  absl::Status AllToAll(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) override {
    if (how_.before_all_to_all) {
      if (absl::Status status = how_.before_all_to_all(*comm_); !status.ok()) return status;
    }
    const absl::Status status = comm_->AllToAll(send, recv, bytes_per_rank, stream);
    if (status.ok() && how_.after_all_to_all) how_.after_all_to_all(recv, bytes_per_rank);
    return status;
  }
  absl::Status AllToAllV(const void* send, std::span<const int64_t> send_bytes, std::span<const int64_t> send_offsets,
                         void* recv, std::span<const int64_t> recv_bytes, std::span<const int64_t> recv_offsets,
                         Stream& stream) override {
    return comm_->AllToAllV(send, send_bytes, send_offsets, recv, recv_bytes, recv_offsets, stream);
  }
  absl::Status AllReduceSum(float* data, int64_t count, Stream& stream) override {
    return comm_->AllReduceSum(data, count, stream);
  }
  absl::Status AllGather(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) override {
    return comm_->AllGather(send, recv, bytes_per_rank, stream);
  }
  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& stream) override {
    return comm_->Broadcast(data, bytes, root, stream);
  }
  absl::Status Send(const void* data, int64_t bytes, int to, Stream& stream) override {
    return comm_->Send(data, bytes, to, stream);
  }
  absl::Status Recv(void* data, int64_t bytes, int from, Stream& stream) override {
    return comm_->Recv(data, bytes, from, stream);
  }
  absl::Status Barrier(Stream& stream) override { return comm_->Barrier(stream); }
  void Abort(const absl::Status& reason) override { comm_->Abort(reason); }
  absl::Status error() const override { return comm_->error(); }

 private:
  const std::unique_ptr<Communicator> comm_;
  const Misbehaviour how_;
};

inline CommFactory Wrapped(CommFactory make, Misbehaviour how) {
  return [make = std::move(make), how = std::move(how)](
             int rank, int size, BootstrapStore& store, Device& device,
             absl::Duration timeout) -> absl::StatusOr<std::unique_ptr<Communicator>> {
    auto comm = make(rank, size, store, device, timeout);
    if (!comm.ok()) return comm.status();
    return std::make_unique<CommWrapper>(*std::move(comm), how);
  };
}

}  // namespace soloist

#endif  // SOLOIST_TESTS_CLUSTER_COMM_WRAPPER_H_
