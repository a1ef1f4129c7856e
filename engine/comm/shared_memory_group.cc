#include "engine/comm/shared_memory_group.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace soloist {
namespace {

constexpr uint32_t kAborted = 1;
constexpr uint32_t kFull = 2;

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns false once `deadline` (monotonic; null: never) has passed.
bool FutexWait(std::atomic<uint32_t>& word, uint32_t seen, const timespec* deadline) {
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
  const long result = syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_BITSET_PRIVATE, seen, deadline,
                              nullptr, FUTEX_BITSET_MATCH_ANY);
  return result == 0 || errno != ETIMEDOUT;
}

void FutexWakeAll(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

std::string DescribeCall(const CommCall& call) {
  if (call.op == CommOp::kBroadcast) {
    return absl::StrCat(CommOpName(call.op), " of ", call.bytes, " bytes from rank ", call.root);
  }
  if (call.op == CommOp::kBarrier || call.op == CommOp::kAllToAllV) return CommOpName(call.op);
  return absl::StrCat(CommOpName(call.op), " of ", call.bytes, " bytes");
}

}  // namespace

const char* CommOpName(CommOp op) {
  switch (op) {
    case CommOp::kNone:
      return "no operation";
    case CommOp::kAllToAll:
      return "AllToAll";
    case CommOp::kAllToAllV:
      return "AllToAllV";
    case CommOp::kAllReduceSum:
      return "AllReduceSum";
    case CommOp::kAllGather:
      return "AllGather";
    case CommOp::kBroadcast:
      return "Broadcast";
    case CommOp::kBarrier:
      return "Barrier";
    case CommOp::kSend:
      return "Send";
    case CommOp::kRecv:
      return "Recv";
  }
  return "unknown operation";
}

// Spinning longer than a futex call costs (some microseconds) gains nothing, and where ranks share cores it takes the
// core from the rank that is waited for.
SharedMemoryGroup::SharedMemoryGroup(int size, const CommOptions& options)
    : size_(size),
      timeout_(options.timeout),
      spins_(size <= UsableCores() ? 400 : 0),
      ranks_(static_cast<size_t>(size)),
      mailboxes_(static_cast<size_t>(size) * static_cast<size_t>(size)) {}

template <typename Done>
absl::Status SharedMemoryGroup::WaitFor(Word& word, Done done) {
  for (int i = 0; i < spins_; ++i) {
    const uint32_t now = word.load();
    if (done(now)) return absl::OkStatus();
    if ((now & kAborted) != 0) return error();
    Pause();
  }
  timespec deadline{};
  const bool bounded = timeout_ != absl::InfiniteDuration();
  if (bounded) {
    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline = absl::ToTimespec(absl::DurationFromTimespec(deadline) + timeout_);
  }
  bool in_time = true;
  while (true) {
    const uint32_t now = word.load();
    // Done goes before aborted: the last operation before a rank leaves has succeeded for all.
    if (done(now)) return absl::OkStatus();
    if ((now & kAborted) != 0) return error();
    if (!in_time) return absl::DeadlineExceededError("");
    in_time = FutexWait(word, now, bounded ? &deadline : nullptr);
  }
}

absl::Status SharedMemoryGroup::Meet(int rank, bool check) {
  const uint32_t before = word_.load() & ~kAborted;
  ranks_[rank].meetings.fetch_add(1);
  if (arrived_.fetch_add(1) + 1 == size_) {
    arrived_.store(0);
    if (check) {
      if (absl::Status status = CheckCalls(); !status.ok()) {
        Abort(status);
        return error();
      }
    }
    word_.fetch_add(2);
    FutexWakeAll(word_);
    return absl::OkStatus();
  }
  absl::Status status = WaitFor(word_, [before](uint32_t now) { return (now & ~kAborted) != before; });
  if (absl::IsDeadlineExceeded(status) && !aborted()) {
    Abort(absl::DeadlineExceededError(absl::StrCat(DescribeCall(ranks_[rank].call), " (call ", ranks_[rank].sequence,
                                                   "): after ", absl::FormatDuration(timeout_), " rank ", rank,
                                                   " still waits for ", DescribeMissing(rank))));
  }
  return status.ok() ? status : error();
}

std::string SharedMemoryGroup::DescribeMissing(int rank) const {
  const uint64_t mine = ranks_[rank].meetings.load();
  std::string out;
  for (int other = 0; other < size_; ++other) {
    if (ranks_[other].meetings.load() >= mine) continue;
    absl::StrAppend(&out, out.empty() ? "" : ", ", "rank ", other);
    const CommOp doing = ranks_[other].doing.load();
    if (doing != CommOp::kNone) absl::StrAppend(&out, " (in ", CommOpName(doing), ")");
  }
  return out;
}

absl::Status SharedMemoryGroup::CheckCalls() const {
  const Rank& first = ranks_[0];
  for (int other = 1; other < size_; ++other) {
    const Rank& rank = ranks_[other];
    if (rank.call.op == first.call.op && rank.call.bytes == first.call.bytes && rank.call.root == first.call.root &&
        rank.sequence == first.sequence) {
      continue;
    }
    return absl::InternalError(absl::StrCat("ranks differ: rank 0 is in ", DescribeCall(first.call), " (call ",
                                            first.sequence, "), rank ", other, " in ", DescribeCall(rank.call),
                                            " (call ", rank.sequence, ")"));
  }
  return absl::OkStatus();
}

bool SharedMemoryGroup::StartTouching(int rank) {
  ranks_[rank].touching.store(1);
  if (!aborted()) return true;
  StopTouching(rank);
  return false;
}

void SharedMemoryGroup::StopTouching(int rank) {
  ranks_[rank].touching.store(0);
  if (aborted()) FutexWakeAll(ranks_[rank].touching);
}

absl::Status SharedMemoryGroup::Leave(int rank) {
  for (int other = 0; other < size_; ++other) {
    if (other == rank) continue;
    // No deadline: a copy ends.
    while (ranks_[other].touching.load() != 0) FutexWait(ranks_[other].touching, 1, nullptr);
  }
  ranks_[rank].doing.store(CommOp::kNone);
  return error();
}

absl::Status SharedMemoryGroup::Begin(int rank, const CommCall& call) {
  if (aborted()) return error();
  Rank& self = ranks_[rank];
  self.call = call;
  ++self.sequence;
  self.doing.store(call.op);
  if (!Meet(rank, /*check=*/true).ok() || !StartTouching(rank)) return Leave(rank);
  return absl::OkStatus();
}

absl::Status SharedMemoryGroup::End(int rank, const absl::Status& status) {
  StopTouching(rank);
  if (!status.ok()) Abort(status);
  if (!status.ok() || !Meet(rank, /*check=*/false).ok()) return Leave(rank);
  ranks_[rank].doing.store(CommOp::kNone);
  return absl::OkStatus();
}

absl::Status SharedMemoryGroup::Send(int rank, const void* data, int64_t bytes, int to) {
  CHECK(to >= 0 && to < size_ && to != rank);
  if (aborted()) return error();
  ranks_[rank].doing.store(CommOp::kSend);
  Mailbox& box = mailbox(rank, to);
  box.data = data;
  box.bytes = bytes;
  box.state.fetch_or(kFull);
  FutexWakeAll(box.state);
  absl::Status status = WaitFor(box.state, [](uint32_t now) { return (now & kFull) == 0; });
  if (absl::IsDeadlineExceeded(status) && !aborted()) {
    Abort(absl::DeadlineExceededError(absl::StrCat("Send of ", bytes, " bytes: after ", absl::FormatDuration(timeout_),
                                                   " rank ", rank, " still waits for rank ", to)));
  }
  if (!status.ok()) return Leave(rank);
  ranks_[rank].doing.store(CommOp::kNone);
  return status;
}

absl::Status SharedMemoryGroup::Recv(int rank, void* data, int64_t bytes, int from) {
  CHECK(from >= 0 && from < size_ && from != rank);
  if (aborted()) return error();
  ranks_[rank].doing.store(CommOp::kRecv);
  Mailbox& box = mailbox(from, rank);
  absl::Status status = WaitFor(box.state, [](uint32_t now) { return (now & kFull) != 0; });
  if (absl::IsDeadlineExceeded(status) && !aborted()) {
    Abort(absl::DeadlineExceededError(absl::StrCat("Recv of ", bytes, " bytes: after ", absl::FormatDuration(timeout_),
                                                   " rank ", rank, " still waits for rank ", from)));
  }
  if (!status.ok() || !StartTouching(rank)) return Leave(rank);
  if (box.bytes != bytes) {
    StopTouching(rank);
    Abort(absl::InternalError(absl::StrCat("Send and Recv differ: rank ", from, " sends ", box.bytes, " bytes to rank ",
                                           rank, ", which expects ", bytes)));
    return Leave(rank);
  }
  if (bytes > 0) std::memcpy(data, box.data, static_cast<size_t>(bytes));
  StopTouching(rank);
  box.state.fetch_and(~kFull);
  FutexWakeAll(box.state);
  ranks_[rank].doing.store(CommOp::kNone);
  return absl::OkStatus();
}

void SharedMemoryGroup::Abort(const absl::Status& reason) {
  CHECK(!reason.ok());
  {
    const std::lock_guard lock(mutex_);
    if (!error_.ok()) return;
    error_ = reason;
    // Under the lock: a second rank whose time is over finds the error set and leaves with its buffers, so a late rank
    // must see the bit by then.
    word_.fetch_or(kAborted);
  }
  FutexWakeAll(word_);
  for (Mailbox& box : mailboxes_) {
    box.state.fetch_or(kAborted);
    FutexWakeAll(box.state);
  }
}

absl::Status SharedMemoryGroup::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

}  // namespace soloist
