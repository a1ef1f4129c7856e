#include "engine/comm/tracing_communicator.h"

#include <string>
#include <utility>

#include "base/clock.h"

namespace soloist {
namespace {

class TracingCommunicator final : public Communicator {
 public:
  TracingCommunicator(std::unique_ptr<Communicator> comm, const RankTrace& trace)
      : comm_(std::move(comm)), trace_(trace) {}

  int rank() const override { return comm_->rank(); }
  int size() const override { return comm_->size(); }
  std::string transport() const override { return comm_->transport(); }
  absl::Status AllToAll(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) override {
    return Note("all_to_all", [&] { return comm_->AllToAll(send, recv, bytes_per_rank, stream); });
  }
  absl::Status AllToAllV(const void* send, std::span<const int64_t> send_bytes, std::span<const int64_t> send_offsets,
                         void* recv, std::span<const int64_t> recv_bytes, std::span<const int64_t> recv_offsets,
                         Stream& stream) override {
    return Note("all_to_all_v", [&] {
      return comm_->AllToAllV(send, send_bytes, send_offsets, recv, recv_bytes, recv_offsets, stream);
    });
  }
  absl::Status AllReduceSum(float* data, int64_t count, Stream& stream) override {
    return Note("all_reduce", [&] { return comm_->AllReduceSum(data, count, stream); });
  }
  absl::Status AllGather(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) override {
    return Note("all_gather", [&] { return comm_->AllGather(send, recv, bytes_per_rank, stream); });
  }
  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& stream) override {
    return Note("broadcast", [&] { return comm_->Broadcast(data, bytes, root, stream); });
  }
  absl::Status Send(const void* data, int64_t bytes, int to, Stream& stream) override {
    return Note("send", [&] { return comm_->Send(data, bytes, to, stream); });
  }
  absl::Status Recv(void* data, int64_t bytes, int from, Stream& stream) override {
    return Note("recv", [&] { return comm_->Recv(data, bytes, from, stream); });
  }
  absl::Status Barrier(Stream& stream) override {
    return Note("barrier", [&] { return comm_->Barrier(stream); });
  }
  void Abort(const absl::Status& reason) override { comm_->Abort(reason); }
  absl::Status error() const override { return comm_->error(); }

 private:
  template <typename Call>
  absl::Status Note(const char* name, const Call& call) {
    const int64_t start_ns = Clock::Real().NowNs();
    absl::Status status = call();
    trace_.Span(TraceTrack::kCommunication, name, start_ns, Clock::Real().NowNs());
    return status;
  }

  const std::unique_ptr<Communicator> comm_;
  const RankTrace& trace_;
};

}  // namespace

std::unique_ptr<Communicator> CreateTracingCommunicator(std::unique_ptr<Communicator> comm, const RankTrace& trace) {
  return std::make_unique<TracingCommunicator>(std::move(comm), trace);
}

}  // namespace soloist
