#include "engine/cluster/absent_communicator.h"

#include "base/status.h"

namespace soloist {
namespace {

class AbsentCommunicator final : public Communicator {
 public:
  AbsentCommunicator(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }

  absl::Status AllToAll(const void*, void*, int64_t, Stream&) override { return error(); }
  absl::Status AllToAllV(const void*, std::span<const int64_t>, std::span<const int64_t>, void*,
                         std::span<const int64_t>, std::span<const int64_t>, Stream&) override {
    return error();
  }
  absl::Status AllReduceSum(float*, int64_t, Stream&) override { return error(); }
  absl::Status AllGather(const void*, void*, int64_t, Stream&) override { return error(); }
  absl::Status Broadcast(void*, int64_t, int, Stream&) override { return error(); }
  absl::Status Send(const void*, int64_t, int, Stream&) override { return error(); }
  absl::Status Recv(void*, int64_t, int, Stream&) override { return error(); }
  absl::Status Barrier(Stream&) override { return error(); }
  void Abort(const absl::Status&) override {}
  absl::Status error() const override { return Unavailable("rank {} has not joined its group of {}", rank_, size_); }

 private:
  const int rank_;
  const int size_;
};

}  // namespace

std::unique_ptr<Communicator> CreateAbsentCommunicator(int rank, int size) {
  return std::make_unique<AbsentCommunicator>(rank, size);
}

}  // namespace soloist
