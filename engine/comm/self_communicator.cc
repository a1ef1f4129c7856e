// The communicator of a group of one: every collective is a copy, or nothing.
#include <memory>
#include <mutex>
#include <span>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "engine/comm/communicator.h"
#include "kernels/ops.h"

namespace soloist {
namespace {

class SelfCommunicator final : public Communicator {
 public:
  explicit SelfCommunicator(Device& device) : device_(device) {}

  int rank() const override { return 0; }
  int size() const override { return 1; }

  absl::Status AllToAll(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) override {
    return CopyUnlessAborted(send, recv, bytes_per_rank, stream);
  }

  absl::Status AllToAllV(const void* send, std::span<const int64_t> send_bytes, std::span<const int64_t> send_offsets,
                         void* recv, std::span<const int64_t> recv_bytes, std::span<const int64_t> recv_offsets,
                         Stream& stream) override {
    CHECK_EQ(send_bytes.size(), size_t{1});
    CHECK_EQ(send_offsets.size(), size_t{1});
    CHECK_EQ(recv_bytes.size(), size_t{1});
    CHECK_EQ(recv_offsets.size(), size_t{1});
    if (send_bytes[0] != recv_bytes[0]) {
      Abort(absl::InternalError(
          absl::StrCat("AllToAllV: rank 0 sends ", send_bytes[0], " bytes to rank 0, which expects ", recv_bytes[0])));
    }
    return CopyUnlessAborted(static_cast<const char*>(send) + send_offsets[0],
                             static_cast<char*>(recv) + recv_offsets[0], send_bytes[0], stream);
  }

  absl::Status AllReduceSum(float* /*data*/, int64_t /*count*/, Stream& /*stream*/) override { return error(); }

  absl::Status AllGather(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) override {
    return CopyUnlessAborted(send, recv, bytes_per_rank, stream);
  }

  absl::Status Broadcast(void* /*data*/, int64_t /*bytes*/, int root, Stream& /*stream*/) override {
    CHECK_EQ(root, 0);
    return error();
  }

  absl::Status Send(const void* /*data*/, int64_t /*bytes*/, int to, Stream& /*stream*/) override {
    CHECK_MSG(to != 0, "a rank does not send to itself");
    return absl::InternalError(absl::StrCat("Send to rank ", to, " in a group of 1"));
  }

  absl::Status Recv(void* /*data*/, int64_t /*bytes*/, int from, Stream& /*stream*/) override {
    CHECK_MSG(from != 0, "a rank does not receive from itself");
    return absl::InternalError(absl::StrCat("Recv from rank ", from, " in a group of 1"));
  }

  absl::Status Barrier(Stream& /*stream*/) override { return error(); }

  void Abort(const absl::Status& reason) override {
    CHECK(!reason.ok());
    const std::lock_guard lock(mutex_);
    error_.Update(reason);
  }

  absl::Status error() const override {
    const std::lock_guard lock(mutex_);
    return error_;
  }

 private:
  absl::Status CopyUnlessAborted(const void* send, void* recv, int64_t bytes, Stream& stream) {
    absl::Status status = error();
    if (status.ok() && send != recv && bytes > 0) device_.ops().CopyBytes(recv, send, bytes, stream);
    return status;
  }

  Device& device_;
  mutable std::mutex mutex_;
  absl::Status error_;
};

}  // namespace

std::unique_ptr<Communicator> CreateSelfCommunicator(Device& device) {
  return std::make_unique<SelfCommunicator>(device);
}

}  // namespace soloist
