#include "engine/comm/nccl_session.h"

#include <sched.h>

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "engine/comm/nccl_log.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

constexpr auto kPollPeriod = std::chrono::milliseconds(5);
// Of one call that holds the communicator while another wants to abort it. NCCL's calls do not block, so this is long.
constexpr absl::Duration kPatience = absl::Seconds(2);
constexpr absl::Duration kFinalizeLimit = absl::Seconds(5);
constexpr auto kCloseLimit = std::chrono::seconds(10);
// How far apart the ranks' deadlines may be for one to hear of the others that they wait too.
constexpr absl::Duration kAskLimit = absl::Seconds(1);

absl::Status CudaStatus(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return Internal("{}: {} ({})", what, cudaGetErrorName(error), cudaGetErrorString(error));
}

}  // namespace

absl::Status NcclStatus(ncclResult_t result, const std::string& what) {
  if (result == ncclSuccess) return absl::OkStatus();
  const std::string message =
      fmt::format("{}: NCCL: {} ({})", what, ncclGetErrorString(result), ncclGetLastError(nullptr));
  // Of a peer or the network; the rest is of this process.
  if (result == ncclRemoteError || result == ncclSystemError) return absl::UnavailableError(message);
  return absl::InternalError(message);
}

std::string NcclCall::ToString() const {
  std::string out = name;
  if (bytes >= 0) out += fmt::format(" of {} bytes", bytes);
  if (peer >= 0) out += fmt::format("{}{}", towards, peer);
  if (number > 0) out += fmt::format(" (call {})", number);
  return out;
}

std::shared_ptr<NcclSession> NcclSession::Start(int rank, int size, int device, absl::Duration timeout,
                                                BootstrapStore& store) {
  const std::shared_ptr<NcclSession> session(new NcclSession(rank, size, device, timeout, store));
  session->thread_ = std::thread([session] { session->Run(); });
  return session;
}

NcclSession::NcclSession(int rank, int size, int device, absl::Duration timeout, BootstrapStore& store)
    : rank_(rank), size_(size), device_(device), timeout_(timeout), store_(store) {}

NcclSession::~NcclSession() {
  for (const Pending& pending : pending_) cudaEventDestroy(pending.event);
  for (cudaEvent_t event : spare_events_) cudaEventDestroy(event);
}

absl::Status NcclSession::error() const {
  const std::lock_guard lock(state_mutex_);
  return error_;
}

absl::Status NcclSession::Fail(const absl::Status& status) {
  CHECK(!status.ok());
  const std::lock_guard lock(state_mutex_);
  if (error_.ok()) {
    error_ = status;
    failed_ = true;
    changed_.notify_all();
  }
  return error_;
}

absl::Status NcclSession::Init(const ncclUniqueId& id, absl::Time deadline) {
  const NcclCall call{.name = "joining the group"};
  const std::lock_guard lock(nccl_mutex_);
  RETURN_IF_ERROR(error());
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  return Settle(call, ncclCommInitRankConfig(&comm_, size_, id, rank_, &config), deadline);
}

absl::Status NcclSession::Enqueue(const NcclCall& call, cudaStream_t stream,
                                  absl::FunctionRef<ncclResult_t(ncclComm_t)> enqueue) {
  {
    const std::lock_guard lock(nccl_mutex_);
    RETURN_IF_ERROR(error());
    RETURN_IF_ERROR(Settle(call, enqueue(comm_), absl::Now() + timeout_));
  }
  return Track(call, stream);
}

absl::Status NcclSession::Settle(const NcclCall& call, ncclResult_t result, absl::Time deadline) {
  for (int turns = 0; result == ncclInProgress; ++turns) {
    if (failed_) return error();
    if (absl::Now() >= deadline) return Fail(Late(call));
    // Mostly NCCL's thread needs some tens of microseconds; where it connects to peers, much more.
    if (turns < 200) {
      sched_yield();
    } else {
      absl::SleepFor(absl::Microseconds(turns < 1000 ? 50 : 1000));
    }
    if (const ncclResult_t asked = ncclCommGetAsyncError(comm_, &result); asked != ncclSuccess) result = asked;
  }
  if (result == ncclSuccess) return absl::OkStatus();
  return Fail(Describe(call, result));
}

absl::Status NcclSession::Describe(const NcclCall& call, ncclResult_t result) const {
  return NcclStatus(result, fmt::format("{} on rank {}", call.ToString(), rank_));
}

absl::Status NcclSession::Track(const NcclCall& call, cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  absl::Status status = CudaStatus(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
  if (status.ok() && capture != cudaStreamCaptureStatusNone) return status;
  cudaEvent_t event = nullptr;
  {
    const std::lock_guard lock(events_mutex_);
    while (!pending_.empty() && cudaEventQuery(pending_.front().event) == cudaSuccess) {
      spare_events_.push_back(pending_.front().event);
      pending_.pop_front();
    }
    if (!spare_events_.empty()) {
      event = spare_events_.back();
      spare_events_.pop_back();
    }
  }
  if (event == nullptr) {
    status.Update(CudaStatus(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate"));
  }
  // Without events_mutex_: CUDA waits here while the stream's queue is full.
  if (status.ok()) status = CudaStatus(cudaEventRecord(event, stream), "cudaEventRecord");
  if (event != nullptr) {
    const std::lock_guard lock(events_mutex_);
    pending_.push_back({event, absl::Now(), call});
  }
  return status.ok() ? status : Fail(Annotate(status, call.ToString()));
}

void NcclSession::Run() {
  if (const absl::Status bound = CudaStatus(cudaSetDevice(device_), "cudaSetDevice"); !bound.ok()) {
    Fail(bound).IgnoreError();
  }
  NcclLog& log = NcclLog::OfProcess();
  while (true) {
    {
      std::unique_lock lock(state_mutex_);
      if (changed_.wait_for(lock, kPollPeriod, [this] { return closing_ || !error_.ok(); })) break;
    }
    log.Forward();
    ReadAsyncError();
    CheckAges();
  }
  End();
  log.Forward();
  const std::lock_guard lock(state_mutex_);
  ended_ = true;
  changed_.notify_all();
}

void NcclSession::ReadAsyncError() {
  const std::unique_lock lock(nccl_mutex_, std::try_to_lock);
  // Whoever holds it reads the error itself.
  if (!lock.owns_lock() || comm_ == nullptr) return;
  ncclResult_t result = ncclSuccess;
  const ncclResult_t asked = ncclCommGetAsyncError(comm_, &result);
  if (asked != ncclSuccess) result = asked;
  if (result == ncclSuccess || result == ncclInProgress) return;
  Fail(Describe({.name = "collectives in flight"}, result)).IgnoreError();
}

// Asks CUDA only when the oldest call is late: while it is healthy, Track has seen it end long before.
void NcclSession::CheckAges() {
  NcclCall late;
  {
    const std::unique_lock lock(events_mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return;
    while (true) {
      if (pending_.empty() || absl::Now() - pending_.front().enqueued < timeout_) return;
      const cudaError_t error = cudaEventQuery(pending_.front().event);
      if (error == cudaErrorNotReady) break;
      if (error != cudaSuccess) {
        Fail(CudaStatus(error, pending_.front().call.ToString())).IgnoreError();
        return;
      }
      spare_events_.push_back(pending_.front().event);
      pending_.pop_front();
    }
    late = pending_.front().call;
  }
  Fail(Late(late)).IgnoreError();
}

absl::Status NcclSession::Late(const NcclCall& call) {
  std::string whom;
  if (call.peer >= 0) whom = fmt::format(" for rank {}", call.peer);
  if (call.number > 0) whom = WhoIsMissing(call);
  return DeadlineExceeded("{}: after {} rank {} still waits{}", call.ToString(), absl::FormatDuration(timeout_), rank_,
                          whom);
}

// Each rank whose deadline has passed writes down where it waits: who has not written is who is waited for.
std::string NcclSession::WhoIsMissing(const NcclCall& call) {
  const auto key = [](int rank) { return fmt::format("nccl/late/{}", rank); };
  const std::string mine = call.ToString();
  if (!store_.Set(key(rank_), mine).ok()) return "";
  const absl::Time deadline = absl::Now() + kAskLimit;
  std::string missing, elsewhere;
  for (int rank = 0; rank < size_; ++rank) {
    if (rank == rank_) continue;
    const auto theirs = store_.Get(key(rank), std::max(deadline - absl::Now(), absl::Milliseconds(50)));
    if (absl::IsDeadlineExceeded(theirs.status())) {
      missing += fmt::format("{}rank {}", missing.empty() ? " for " : ", ", rank);
    } else if (!theirs.ok()) {
      return "";
    } else if (*theirs != mine) {
      elsewhere += fmt::format("; rank {} waits in {}", rank, *theirs);
    }
  }
  return missing + elsewhere;
}

void NcclSession::End() {
  std::unique_lock lock(nccl_mutex_, std::defer_lock);
  // In the end without it: whoever has held it so long is stuck in NCCL, and the abort gets it out.
  const absl::Time patience = absl::Now() + kPatience;
  while (!lock.try_lock() && absl::Now() < patience) absl::SleepFor(absl::Milliseconds(1));
  if (comm_ == nullptr) return;
  const NcclCall finish{.name = "leaving the group"};
  if (error().ok() && Settle(finish, ncclCommFinalize(comm_), absl::Now() + kFinalizeLimit).ok()) {
    ncclCommDestroy(comm_);
  } else {
    ncclCommAbort(comm_);
  }
  comm_ = nullptr;
}

void NcclSession::Close() {
  bool ended = false;
  {
    std::unique_lock lock(state_mutex_);
    closing_ = true;
    changed_.notify_all();
    ended = changed_.wait_for(lock, kCloseLimit, [this] { return ended_; });
  }
  if (ended) {
    thread_.join();
  } else {
    spdlog::error("rank {}: NCCL has not ended in {} s and is left behind; a graph with its collectives may be alive",
                  rank_, std::chrono::seconds(kCloseLimit).count());
    thread_.detach();
  }
}

}  // namespace soloist
