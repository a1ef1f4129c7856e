// The communicator over NCCL: how the ranks meet, and each collective as NCCL's.
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status.h"
#include "engine/comm/nccl_communicator.h"
#include "engine/comm/nccl_log.h"
#include "engine/comm/nccl_session.h"
#include "kernels/cuda/sum_ranks.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

// Of AllReduceSum: what one rank brings to one of its all-gathers.
constexpr int64_t kChunkBytes = 256 * 1024;
constexpr int64_t kChunkFloats = kChunkBytes / static_cast<int64_t>(sizeof(float));
constexpr int64_t kWarmUpBytes = 16;

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(int rank, int size, std::shared_ptr<NcclSession> session, Buffer scratch)
      : rank_(rank), size_(size), session_(std::move(session)), scratch_(std::move(scratch)) {}
  ~NcclCommunicator() override { session_->Close(); }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string transport() const override { return transport_; }

  absl::Status AllToAll(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) override {
    const NcclCall call = Collective("AllToAll", bytes_per_rank);
    if (bytes_per_rank == 0) return error();
    cudaStream_t cuda = CudaStreamOf(stream);
    return session_->Enqueue(call, cuda, [&](ncclComm_t comm) {
      return ncclAlltoAll(send, recv, static_cast<size_t>(bytes_per_rank), ncclInt8, comm, cuda);
    });
  }

  absl::Status AllToAllV(const void* send, std::span<const int64_t> send_bytes, std::span<const int64_t> send_offsets,
                         void* recv, std::span<const int64_t> recv_bytes, std::span<const int64_t> recv_offsets,
                         Stream& stream) override {
    const auto ranks = static_cast<size_t>(size_);
    CHECK(send_bytes.size() == ranks && send_offsets.size() == ranks);
    CHECK(recv_bytes.size() == ranks && recv_offsets.size() == ranks);
    const NcclCall call = Collective("AllToAllV", -1);
    if (send_bytes[rank_] != recv_bytes[rank_]) {
      return session_->Fail(Internal("AllToAllV: rank {} sends {} bytes to itself and expects {}", rank_,
                                     send_bytes[rank_], recv_bytes[rank_]));
    }
    const auto none = [](int64_t bytes) { return bytes == 0; };
    if (std::ranges::all_of(send_bytes, none) && std::ranges::all_of(recv_bytes, none)) return error();
    cudaStream_t cuda = CudaStreamOf(stream);
    return session_->Enqueue(call, cuda, [&](ncclComm_t comm) {
      ncclResult_t result = ncclGroupStart();
      if (result != ncclSuccess) return result;
      for (int i = 0; i < size_ && result == ncclSuccess; ++i) {
        const int to = (rank_ + i) % size_, from = (rank_ - i + size_) % size_;
        if (send_bytes[to] > 0) {
          result = ncclSend(static_cast<const char*>(send) + send_offsets[to], static_cast<size_t>(send_bytes[to]),
                            ncclInt8, to, comm, cuda);
        }
        if (recv_bytes[from] > 0 && result == ncclSuccess) {
          result = ncclRecv(static_cast<char*>(recv) + recv_offsets[from], static_cast<size_t>(recv_bytes[from]),
                            ncclInt8, from, comm, cuda);
        }
      }
      // Also after an error, which it then returns: a group that was started must be ended.
      const ncclResult_t ended = ncclGroupEnd();
      return result != ncclSuccess ? result : ended;
    });
  }

  // NCCL's own sum has another order of ranks for each part of the data. So: gather, then add.
  absl::Status AllReduceSum(float* data, int64_t count, Stream& stream) override {
    const NcclCall call = Collective("AllReduceSum", count * static_cast<int64_t>(sizeof(float)));
    if (count == 0 || size_ == 1) return error();
    cudaStream_t cuda = CudaStreamOf(stream);
    auto* gathered = static_cast<float*>(scratch_.data());
    for (int64_t first = 0; first < count; first += kChunkFloats) {
      const int64_t n = std::min(kChunkFloats, count - first);
      RETURN_IF_ERROR(session_->Enqueue(call, cuda, [&](ncclComm_t comm) {
        return ncclAllGather(data + first, gathered, static_cast<size_t>(n), ncclFloat32, comm, cuda);
      }));
      if (const cudaError_t launched = cuda::SumRanks(data + first, gathered, size_, n, cuda);
          launched != cudaSuccess) {
        return session_->Fail(Internal("{}: {}", call.ToString(), cudaGetErrorString(launched)));
      }
    }
    return absl::OkStatus();
  }

  absl::Status AllGather(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) override {
    return Gather(Collective("AllGather", bytes_per_rank), send, recv, bytes_per_rank, stream);
  }

  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& stream) override {
    CHECK(root >= 0 && root < size_);
    const NcclCall call = Collective("Broadcast", bytes);
    if (bytes == 0) return error();
    cudaStream_t cuda = CudaStreamOf(stream);
    return session_->Enqueue(call, cuda, [&](ncclComm_t comm) {
      return ncclBroadcast(data, data, static_cast<size_t>(bytes), ncclInt8, root, comm, cuda);
    });
  }

  absl::Status Send(const void* data, int64_t bytes, int to, Stream& stream) override {
    CHECK(to >= 0 && to < size_ && to != rank_);
    if (bytes == 0) return error();
    cudaStream_t cuda = CudaStreamOf(stream);
    const NcclCall call{.name = "Send", .bytes = bytes, .towards = " to rank ", .peer = to};
    return session_->Enqueue(call, cuda, [&](ncclComm_t comm) {
      return ncclSend(data, static_cast<size_t>(bytes), ncclInt8, to, comm, cuda);
    });
  }

  absl::Status Recv(void* data, int64_t bytes, int from, Stream& stream) override {
    CHECK(from >= 0 && from < size_ && from != rank_);
    if (bytes == 0) return error();
    cudaStream_t cuda = CudaStreamOf(stream);
    const NcclCall call{.name = "Recv", .bytes = bytes, .towards = " from rank ", .peer = from};
    return session_->Enqueue(call, cuda, [&](ncclComm_t comm) {
      return ncclRecv(data, static_cast<size_t>(bytes), ncclInt8, from, comm, cuda);
    });
  }

  // In stream order: what follows on this rank's stream runs when all ranks' streams have come here.
  absl::Status Barrier(Stream& stream) override {
    auto* bytes = static_cast<char*>(scratch_.data());
    return Gather(Collective("Barrier", -1), bytes + rank_, bytes, 1, stream);
  }

  void Abort(const absl::Status& reason) override { session_->Fail(reason).IgnoreError(); }
  absl::Status error() const override { return session_->error(); }

  // Makes NCCL connect all pairs of ranks, and the rings that gathers and broadcasts use: so that the first step does
  // not wait for it, and the log tells the transport.
  absl::Status WarmUp(Stream& stream) {
    char* send = static_cast<char*>(scratch_.data());
    char* recv = send + size_ * kWarmUpBytes;
    RETURN_IF_ERROR(AllToAll(send, recv, kWarmUpBytes, stream));
    RETURN_IF_ERROR(AllGather(send, recv, kWarmUpBytes, stream));
    RETURN_IF_ERROR(Broadcast(send, kWarmUpBytes, 0, stream));
    while (cudaStreamQuery(CudaStreamOf(stream)) == cudaErrorNotReady) {
      RETURN_IF_ERROR(error());
      absl::SleepFor(absl::Milliseconds(1));
    }
    RETURN_IF_ERROR(stream.Synchronize());
    return error();
  }
  void set_transport(std::string transport) { transport_ = std::move(transport); }

 private:
  static cudaStream_t CudaStreamOf(Stream& stream) { return static_cast<cudaStream_t>(stream.native_handle()); }
  NcclCall Collective(const char* name, int64_t bytes) {
    return {.name = name, .bytes = bytes, .number = ++collectives_};
  }
  absl::Status Gather(const NcclCall& call, const void* send, void* recv, int64_t bytes, Stream& stream) {
    if (bytes == 0) return error();
    cudaStream_t cuda = CudaStreamOf(stream);
    return session_->Enqueue(call, cuda, [&](ncclComm_t comm) {
      return ncclAllGather(send, recv, static_cast<size_t>(bytes), ncclInt8, comm, cuda);
    });
  }

  const int rank_;
  const int size_;
  const std::shared_ptr<NcclSession> session_;
  const Buffer scratch_;
  int64_t collectives_ = 0;
  std::string transport_ = "local";
};

// Waits until every rank has said that it is here. What it says: "22803 on HOST, process 17, cuda:0 NVIDIA H200".
absl::Status Meet(int rank, int size, BootstrapStore& store, const Device& device, absl::Time deadline,
                  absl::Duration timeout) {
  int version = 0;
  RETURN_IF_ERROR(NcclStatus(ncclGetVersion(&version), "ncclGetVersion"));
  const auto key = [](int of) { return fmt::format("nccl/here/{}", of); };
  char host[256] = "";
  gethostname(host, sizeof(host) - 1);
  const std::string mine = fmt::format("{} on {}, process {}, {}", version, host, getpid(), device.Name());
  if (const absl::Status set = store.Set(key(rank), mine); !set.ok()) {
    return Annotate(set, fmt::format("rank {} joins ({})", rank, mine));
  }
  std::string missing;
  for (int other = 0; other < size; ++other) {
    const auto theirs = store.Get(key(other), std::max(deadline - absl::Now(), absl::Milliseconds(50)));
    if (absl::IsDeadlineExceeded(theirs.status())) {
      missing += fmt::format("{}rank {}", missing.empty() ? "" : ", ", other);
      continue;
    }
    RETURN_IF_ERROR(Annotate(theirs.status(), fmt::format("rank {} waits for rank {} to join", rank, other)));
    if (std::atoi(theirs->c_str()) != version) {
      return FailedPrecondition("ranks have different versions of NCCL: rank {} has {}; rank {} has {}", rank, mine,
                                other, *theirs);
    }
  }
  if (missing.empty()) return absl::OkStatus();
  return DeadlineExceeded("joining the group: after {} rank {} still waits for {}", absl::FormatDuration(timeout), rank,
                          missing);
}

// Rank 0 makes the id, which says where it listens.
absl::StatusOr<ncclUniqueId> ShareId(int rank, BootstrapStore& store, absl::Time deadline) {
  ncclUniqueId id;
  if (rank == 0) {
    RETURN_IF_ERROR(NcclStatus(ncclGetUniqueId(&id), "ncclGetUniqueId on rank 0"));
    RETURN_IF_ERROR(store.Set("nccl/id", absl::BytesToHexString(absl::string_view(id.internal, sizeof(id.internal)))));
    return id;
  }
  ASSIGN_OR_RETURN(const std::string hex, store.Get("nccl/id", deadline - absl::Now()));
  const std::string bytes = absl::HexStringToBytes(hex);
  if (bytes.size() != sizeof(id.internal)) {
    return Internal("nccl/id has {} bytes, expected {}", bytes.size(), sizeof(id.internal));
  }
  std::copy(bytes.begin(), bytes.end(), id.internal);
  return id;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> CreateNcclCommunicator(int rank, int size, BootstrapStore& store,
                                                                     Device& device, const NcclOptions& options) {
  if (size < 1 || rank < 0 || rank >= size) return InvalidArgument("rank {} of {}", rank, size);
  if (const char* blocking = std::getenv("NCCL_COMM_BLOCKING"); blocking != nullptr && std::atoi(blocking) == 1) {
    return InvalidArgument("NCCL_COMM_BLOCKING={}: deadlines would not hold; unset it", blocking);
  }
  const absl::Duration timeout = options.comm.timeout;
  const absl::Time begin = absl::Now(), deadline = begin + timeout;
  RETURN_IF_ERROR(device.BindThread());
  ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.CreateStream());
  if (stream->native_handle() == nullptr) return InvalidArgument("NCCL needs a GPU, not {}", device.Name());
  int cuda_device = 0;
  if (const cudaError_t error = cudaGetDevice(&cuda_device); error != cudaSuccess) {
    return Internal("cudaGetDevice: {}", cudaGetErrorString(error));
  }
  ASSIGN_OR_RETURN(Buffer scratch, device.Allocate(size * kChunkBytes));

  const NcclLog& log = NcclLog::OfProcess();
  const int64_t log_begin = log.size();
  RETURN_IF_ERROR(Meet(rank, size, store, device, deadline, timeout));
  ASSIGN_OR_RETURN(const ncclUniqueId id, ShareId(rank, store, deadline));
  const auto session = NcclSession::Start(rank, size, cuda_device, timeout, store);
  auto comm = std::make_unique<NcclCommunicator>(rank, size, session, std::move(scratch));
  RETURN_IF_ERROR(session->Init(id, deadline));
  if (size > 1) {
    RETURN_IF_ERROR(comm->WarmUp(*stream));
    const NcclPaths paths = ParseNcclLog(log.Since(log_begin));
    comm->set_transport(paths.slowest.empty() ? "unknown" : paths.slowest);
    spdlog::info("NCCL: rank {} of {} joined in {}, slowest transport {} ({})", rank, size,
                 absl::FormatDuration(absl::Trunc(absl::Now() - begin, absl::Milliseconds(1))), comm->transport(),
                 paths.summary);
  }
  return comm;
}

}  // namespace soloist
