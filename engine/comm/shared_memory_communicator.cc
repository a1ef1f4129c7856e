// Ranks that are threads of one process: each copies what it is to receive straight from the sender's buffer.
#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "engine/comm/communicator.h"
#include "engine/comm/shared_memory_group.h"

namespace soloist {
namespace {

constexpr int kMaxRanks = 64;

void CopyBytes(void* dst, const void* src, int64_t bytes) {
  if (bytes > 0 && dst != src) std::memcpy(dst, src, static_cast<size_t>(bytes));
}

class SharedMemoryCommunicator final : public Communicator {
 public:
  SharedMemoryCommunicator(std::shared_ptr<SharedMemoryGroup> group, int rank)
      : group_(std::move(group)), rank_(rank) {}
  ~SharedMemoryCommunicator() override {
    group_->Abort(absl::UnavailableError(absl::StrCat("rank ", rank_, " has left")));
  }

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }

  absl::Status AllToAll(const void* send, void* recv, int64_t bytes_per_rank, Stream& /*stream*/) override {
    const absl::Status begun = group_->Begin(rank_, {.op = CommOp::kAllToAll, .bytes = bytes_per_rank, .send = send});
    if (!begun.ok()) return begun;
    // Each rank starts with itself, so that not all read the same sender at a time.
    for (int i = 0; i < size(); ++i) {
      const int source = (rank_ + i) % size();
      CopyBytes(static_cast<char*>(recv) + source * bytes_per_rank,
                static_cast<const char*>(group_->call(source).send) + rank_ * bytes_per_rank, bytes_per_rank);
    }
    return group_->End(rank_, absl::OkStatus());
  }

  absl::Status AllToAllV(const void* send, std::span<const int64_t> send_bytes, std::span<const int64_t> send_offsets,
                         void* recv, std::span<const int64_t> recv_bytes, std::span<const int64_t> recv_offsets,
                         Stream& /*stream*/) override {
    const auto ranks = static_cast<size_t>(size());
    CHECK(send_bytes.size() == ranks && send_offsets.size() == ranks);
    CHECK(recv_bytes.size() == ranks && recv_offsets.size() == ranks);
    const absl::Status begun = group_->Begin(
        rank_,
        {.op = CommOp::kAllToAllV, .send = send, .send_bytes = send_bytes.data(), .send_offsets = send_offsets.data()});
    if (!begun.ok()) return begun;
    absl::Status status;
    for (int i = 0; i < size() && status.ok(); ++i) {
      const int source = (rank_ + i) % size();
      const CommCall& call = group_->call(source);
      if (call.send_bytes[rank_] != recv_bytes[source]) {
        status = absl::InternalError(absl::StrCat("AllToAllV: rank ", source, " sends ", call.send_bytes[rank_],
                                                  " bytes to rank ", rank_, ", which expects ", recv_bytes[source]));
        break;
      }
      CopyBytes(static_cast<char*>(recv) + recv_offsets[source],
                static_cast<const char*>(call.send) + call.send_offsets[rank_], recv_bytes[source]);
    }
    return group_->End(rank_, status);
  }

  // Rank r alone reads and writes slice r of every rank's data: in place without scratch, and the same bits everywhere.
  absl::Status AllReduceSum(float* data, int64_t count, Stream& /*stream*/) override {
    const absl::Status begun = group_->Begin(
        rank_, {.op = CommOp::kAllReduceSum, .bytes = count * static_cast<int64_t>(sizeof(float)), .data = data});
    if (!begun.ok()) return begun;
    constexpr int64_t kBlock = 1024;
    float sum[kBlock];
    const int64_t end = count * (rank_ + 1) / size();
    for (int64_t first = count * rank_ / size(); first < end; first += kBlock) {
      const int64_t n = std::min(kBlock, end - first);
      CopyBytes(sum, Reduced(0) + first, n * static_cast<int64_t>(sizeof(float)));
      for (int source = 1; source < size(); ++source) {
        const float* add = Reduced(source) + first;
        for (int64_t i = 0; i < n; ++i) sum[i] += add[i];
      }
      for (int to = 0; to < size(); ++to) {
        CopyBytes(Reduced(to) + first, sum, n * static_cast<int64_t>(sizeof(float)));
      }
    }
    return group_->End(rank_, absl::OkStatus());
  }

  absl::Status AllGather(const void* send, void* recv, int64_t bytes_per_rank, Stream& /*stream*/) override {
    const absl::Status begun = group_->Begin(rank_, {.op = CommOp::kAllGather, .bytes = bytes_per_rank, .send = send});
    if (!begun.ok()) return begun;
    for (int i = 0; i < size(); ++i) {
      const int source = (rank_ + i) % size();
      CopyBytes(static_cast<char*>(recv) + source * bytes_per_rank, group_->call(source).send, bytes_per_rank);
    }
    return group_->End(rank_, absl::OkStatus());
  }

  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& /*stream*/) override {
    CHECK(root >= 0 && root < size());
    const absl::Status begun =
        group_->Begin(rank_, {.op = CommOp::kBroadcast, .bytes = bytes, .root = root, .send = data});
    if (!begun.ok()) return begun;
    if (rank_ != root) CopyBytes(data, group_->call(root).send, bytes);
    return group_->End(rank_, absl::OkStatus());
  }

  absl::Status Send(const void* data, int64_t bytes, int to, Stream& /*stream*/) override {
    return group_->Send(rank_, data, bytes, to);
  }
  absl::Status Recv(void* data, int64_t bytes, int from, Stream& /*stream*/) override {
    return group_->Recv(rank_, data, bytes, from);
  }

  absl::Status Barrier(Stream& /*stream*/) override {
    const absl::Status begun = group_->Begin(rank_, {.op = CommOp::kBarrier});
    if (!begun.ok()) return begun;
    return group_->End(rank_, absl::OkStatus());
  }

  void Abort(const absl::Status& reason) override { group_->Abort(reason); }
  absl::Status error() const override { return group_->error(); }

 private:
  float* Reduced(int rank) const { return static_cast<float*>(group_->call(rank).data); }

  const std::shared_ptr<SharedMemoryGroup> group_;
  const int rank_;
};

}  // namespace

absl::StatusOr<std::vector<std::unique_ptr<Communicator>>> CreateSharedMemoryCommunicators(int size,
                                                                                           const Device& device,
                                                                                           const CommOptions& options) {
  CHECK(size >= 1 && size <= kMaxRanks);
  if (!device.host_accessible()) {
    return absl::UnimplementedError(absl::StrCat(
        "ranks that exchange through shared memory need devices whose memory the host can reach, not ", device.Name()));
  }
  auto group = std::make_shared<SharedMemoryGroup>(size, options);
  std::vector<std::unique_ptr<Communicator>> out;
  out.reserve(static_cast<size_t>(size));
  for (int rank = 0; rank < size; ++rank) out.push_back(std::make_unique<SharedMemoryCommunicator>(group, rank));
  return out;
}

}  // namespace soloist
