#include "engine/comm/gloo_communicator.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "engine/comm/frame_exchange.h"
#include "engine/comm/gloo_bulk.h"
#include "engine/comm/group_control.h"
#include "engine/comm/tcp_mesh.h"

namespace soloist {
namespace {

constexpr int kMaxRanks = 64;
// AllReduceSum of at most so many bytes in all: each rank gets the whole of every rank's, in one step.
constexpr int64_t kGatherBytes = 64 * 1024;

void CopyBytes(void* dst, const void* src, int64_t bytes) {
  if (bytes > 0 && dst != src) std::memcpy(dst, src, static_cast<size_t>(bytes));
}

class GlooCommunicator final : public Communicator {
 public:
  GlooCommunicator(int rank, std::unique_ptr<GlooBulk> bulk, std::unique_ptr<GroupControl> control,
                   std::vector<Socket> data, const GlooOptions& options)
      : rank_(rank),
        bulk_(std::move(bulk)),
        control_(std::move(control)),
        exchange_(rank, std::move(data), *control_, bulk_.get(),
                  bulk_ == nullptr ? GlooOptions::kNever : options.gloo_min_bytes, options.comm.timeout) {
    if (bulk_ != nullptr) control_->set_on_failure([bulk = bulk_.get()] { bulk->Interrupt(); });
  }

  int rank() const override { return rank_; }
  int size() const override { return exchange_.size(); }
  std::string transport() const override { return "tcp"; }

  absl::Status AllToAll(const void* send, void* recv, int64_t bytes_per_rank, Stream& /*stream*/) override {
    const ExchangeCall call = {.op = CommOp::kAllToAll, .bytes = bytes_per_rank};
    return All(call, [&](int peer) -> ExchangePart {
      return {.send = At(send, peer * bytes_per_rank),
              .send_bytes = bytes_per_rank,
              .recv = At(recv, peer * bytes_per_rank),
              .recv_bytes = bytes_per_rank};
    });
  }

  absl::Status AllToAllV(const void* send, std::span<const int64_t> send_bytes, std::span<const int64_t> send_offsets,
                         void* recv, std::span<const int64_t> recv_bytes, std::span<const int64_t> recv_offsets,
                         Stream& /*stream*/) override {
    const auto ranks = static_cast<size_t>(size());
    CHECK(send_bytes.size() == ranks && send_offsets.size() == ranks);
    CHECK(recv_bytes.size() == ranks && recv_offsets.size() == ranks);
    const ExchangeCall call = {.op = CommOp::kAllToAllV, .send_bytes = send_bytes, .recv_bytes = recv_bytes};
    return All(call, [&](int peer) -> ExchangePart {
      return {.send = At(send, send_offsets[peer]),
              .send_bytes = send_bytes[peer],
              .recv = At(recv, recv_offsets[peer]),
              .recv_bytes = recv_bytes[peer]};
    });
  }

  absl::Status AllReduceSum(float* data, int64_t count, Stream& /*stream*/) override {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    return bytes * size() <= kGatherBytes ? SumWhole(data, count) : SumSlices(data, count);
  }

  absl::Status AllGather(const void* send, void* recv, int64_t bytes_per_rank, Stream& /*stream*/) override {
    const ExchangeCall call = {.op = CommOp::kAllGather, .bytes = bytes_per_rank};
    return All(call, [&](int peer) -> ExchangePart {
      return {.send = At(send, 0),
              .send_bytes = bytes_per_rank,
              .recv = At(recv, peer * bytes_per_rank),
              .recv_bytes = bytes_per_rank};
    });
  }

  // The ranks that get nothing from each other exchange headers all the same: nobody returns before all have come.
  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& /*stream*/) override {
    CHECK(root >= 0 && root < size());
    const ExchangeCall call = {.op = CommOp::kBroadcast, .bytes = bytes, .root = root};
    return All(call, [&](int peer) -> ExchangePart {
      if (peer == rank_) return {};
      return {.send = At(data, 0),
              .send_bytes = rank_ == root ? bytes : 0,
              .recv = At(data, 0),
              .recv_bytes = peer == root ? bytes : 0};
    });
  }

  absl::Status Send(const void* data, int64_t bytes, int to, Stream& /*stream*/) override {
    CHECK(to >= 0 && to < size() && to != rank_);
    const ExchangePart part = {.peer = to, .send = At(data, 0), .send_bytes = bytes};
    return exchange_.Run({.op = CommOp::kSend, .bytes = bytes, .root = to}, {&part, 1}, exchange_.NewDeadline());
  }

  absl::Status Recv(void* data, int64_t bytes, int from, Stream& /*stream*/) override {
    CHECK(from >= 0 && from < size() && from != rank_);
    const ExchangePart part = {.peer = from, .recv = At(data, 0), .recv_bytes = bytes};
    return exchange_.Run({.op = CommOp::kRecv, .bytes = bytes, .root = from}, {&part, 1}, exchange_.NewDeadline());
  }

  absl::Status Barrier(Stream& /*stream*/) override {
    return All({.op = CommOp::kBarrier}, [](int) { return ExchangePart{}; });
  }

  void Abort(const absl::Status& reason) override { control_->Abort(reason); }
  absl::Status error() const override { return control_->error(); }

 private:
  static const char* At(const void* data, int64_t offset) { return static_cast<const char*>(data) + offset; }
  static char* At(void* data, int64_t offset) { return static_cast<char*>(data) + offset; }

  // Exchanges part_of(peer) with every peer at once; part_of(rank()) is copied.
  template <typename PartOf>
  absl::Status All(const ExchangeCall& call, PartOf part_of, const Deadline& deadline) {
    parts_.clear();
    for (int peer = 0; peer < size(); ++peer) {
      if (peer == rank_) continue;
      parts_.push_back(part_of(peer));
      parts_.back().peer = peer;
    }
    RETURN_IF_ERROR(exchange_.Run(call, parts_, deadline));
    const ExchangePart own = part_of(rank_);
    CopyBytes(own.recv, own.send, own.recv_bytes);
    return absl::OkStatus();
  }
  template <typename PartOf>
  absl::Status All(const ExchangeCall& call, PartOf part_of) {
    return All(call, part_of, exchange_.NewDeadline());
  }

  // data[first ..+count] = the sum over ranks of terms [size, count], in rank order.
  void AddTerms(float* sum, int64_t count) const {
    CopyBytes(sum, terms_.data(), count * static_cast<int64_t>(sizeof(float)));
    for (int rank = 1; rank < size(); ++rank) {
      const float* term = terms_.data() + rank * count;
      for (int64_t i = 0; i < count; ++i) sum[i] += term[i];
    }
  }

  absl::Status SumWhole(float* data, int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    GrowTerms(count);
    RETURN_IF_ERROR(All({.op = CommOp::kAllReduceSum, .bytes = bytes}, [&](int peer) -> ExchangePart {
      return {.send = At(data, 0), .send_bytes = bytes, .recv = At(terms_.data(), peer * bytes), .recv_bytes = bytes};
    }));
    AddTerms(data, count);
    return absl::OkStatus();
  }

  // Rank r gets everybody's slice r, adds, and gives the sum to all: 2 / size of the bytes of SumWhole, the same bits.
  absl::Status SumSlices(float* data, int64_t count) {
    const auto begin = [&](int rank) { return count * rank / size(); };
    const auto bytes_of = [&](int rank) {
      return (begin(rank + 1) - begin(rank)) * static_cast<int64_t>(sizeof(float));
    };
    const int64_t mine = bytes_of(rank_);
    const Deadline deadline = exchange_.NewDeadline();
    GrowTerms(begin(rank_ + 1) - begin(rank_));
    ExchangeCall call = {.op = CommOp::kAllReduceSum, .bytes = count * static_cast<int64_t>(sizeof(float))};
    RETURN_IF_ERROR(All(
        call,
        [&](int peer) -> ExchangePart {
          return {.send = At(data + begin(peer), 0),
                  .send_bytes = bytes_of(peer),
                  .recv = At(terms_.data(), peer * mine),
                  .recv_bytes = mine};
        },
        deadline));
    float* const sum = data + begin(rank_);
    AddTerms(sum, begin(rank_ + 1) - begin(rank_));
    call.phase = 1;
    return All(
        call,
        [&](int peer) -> ExchangePart {
          return {
              .send = At(sum, 0), .send_bytes = mine, .recv = At(data + begin(peer), 0), .recv_bytes = bytes_of(peer)};
        },
        deadline);
  }

  void GrowTerms(int64_t count) {
    terms_.resize(std::max(terms_.size(), static_cast<size_t>(count) * static_cast<size_t>(size())));
  }

  const int rank_;
  const std::unique_ptr<GlooBulk> bulk_;
  const std::unique_ptr<GroupControl> control_;
  FrameExchange exchange_;
  std::vector<ExchangePart> parts_;
  std::vector<float> terms_;  // of AllReduceSum: [size, count]
};

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> CreateGlooCommunicator(int rank, int size, BootstrapStore& store,
                                                                     Device& device, const GlooOptions& options) {
  CHECK(size >= 1 && size <= kMaxRanks && rank >= 0 && rank < size);
  if (!device.host_accessible()) {
    return Unimplemented("ranks that exchange over TCP need devices whose memory the host can reach, not {}",
                         device.Name());
  }
  const bool gloo = options.gloo_min_bytes != GlooOptions::kNever && options.port_begin == 0;
  const Deadline deadline(options.connect_timeout);
  ASSIGN_OR_RETURN(Mesh mesh,
                   ConnectMesh(rank, size, store,
                               {.host = options.hostname_or_address,
                                .interface = options.interface,
                                .port_begin = options.port_begin,
                                .port_end = options.port_end,
                                .settings = gloo ? absl::StrCat("gloo_min_bytes=", options.gloo_min_bytes) : "no-gloo",
                                .timeout = options.connect_timeout}));
  ASSIGN_OR_RETURN(auto control, GroupControl::Create(rank, std::move(mesh.control)));
  std::unique_ptr<GlooBulk> bulk;
  if (gloo) {
    absl::StatusOr<std::unique_ptr<GlooBulk>> made =
        GlooBulk::Create(rank, size, store, mesh.listen_address, deadline.Left());
    if (!made.ok()) {
      // The ranks that wait for this one need not wait for their deadline.
      control->Abort(made.status());
      return control->error();
    }
    bulk = *std::move(made);
  }
  return std::make_unique<GlooCommunicator>(rank, std::move(bulk), std::move(control), std::move(mesh.data), options);
}

}  // namespace soloist
