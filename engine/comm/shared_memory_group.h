// SharedMemoryGroup: where the rank threads of one process meet. Private to shared_memory_communicator.cc.
//
// A collective is: publish what I bring, meet, copy what I am to receive straight from the others' buffers, meet again
// (now the buffers may be reused). A meeting is one futex word for all ranks, so the last to arrive wakes all with one
// system call; waiting spins shortly only where every rank can have a core.
//
// Leaving early on an abort: a rank may return to its caller, who frees the buffers, only once nobody copies from them.
// So a rank raises `touching` before it copies and then looks at the abort bit once more, while a leaving rank, which
// has seen the abort bit, waits for all `touching` flags. All four accesses are sequentially consistent: one of the two
// sees the other.
#ifndef SOLOIST_ENGINE_COMM_SHARED_MEMORY_GROUP_H_
#define SOLOIST_ENGINE_COMM_SHARED_MEMORY_GROUP_H_

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/comm/comm_op.h"
#include "engine/comm/communicator.h"

namespace soloist {

// What one rank brings to a collective. Written by the rank before the first meeting, read by all between the two.
struct CommCall {
  CommOp op = CommOp::kNone;
  int64_t bytes = 0;  // per rank; 0 for AllToAllV, whose sizes each receiver checks
  int root = 0;
  const void* send = nullptr;
  void* data = nullptr;  // in place: AllReduceSum
  const int64_t* send_bytes = nullptr;
  const int64_t* send_offsets = nullptr;
};

class SharedMemoryGroup {
 public:
  SharedMemoryGroup(int size, const CommOptions& options);

  int size() const { return size_; }
  const CommCall& call(int rank) const { return ranks_[rank].call; }

  // Publishes `call` and waits until all ranks have. On OK the caller may touch the others' buffers and must then call
  // End; on an error nobody touches the caller's buffers any more.
  absl::Status Begin(int rank, const CommCall& call);
  // Waits until all ranks have ended. `status`: what went wrong in the copy; aborts the group.
  absl::Status End(int rank, const absl::Status& status);

  absl::Status Send(int rank, const void* data, int64_t bytes, int to);
  absl::Status Recv(int rank, void* data, int64_t bytes, int from);

  void Abort(const absl::Status& reason);
  absl::Status error() const;

 private:
  // Bit 0: aborted. The rest counts meetings (or mailbox transitions), and wraps.
  using Word = std::atomic<uint32_t>;

  struct alignas(64) Rank {
    CommCall call;
    uint64_t sequence = 0;              // collectives that this rank has begun
    std::atomic<uint64_t> meetings{0};  // that this rank has come to
    std::atomic<CommOp> doing{CommOp::kNone};
    Word touching{0};  // this rank is copying from (or to) others' buffers
  };
  // One message at a time from one rank to another. state bit 1: full.
  struct alignas(64) Mailbox {
    Word state{0};
    const void* data = nullptr;
    int64_t bytes = 0;
  };

  Mailbox& mailbox(int from, int to) { return mailboxes_[static_cast<size_t>(from) * size_ + to]; }
  bool aborted() const { return (word_.load() & 1) != 0; }
  absl::Status Meet(int rank, bool check);
  // Waits until done(word). DEADLINE_EXCEEDED when the time is over, error() when aborted.
  template <typename Done>
  absl::Status WaitFor(Word& word, Done done);
  absl::Status CheckCalls() const;
  bool StartTouching(int rank);
  void StopTouching(int rank);
  // After an abort: until nobody touches a buffer. Returns error().
  absl::Status Leave(int rank);
  std::string DescribeMissing(int rank) const;

  const int size_;
  const absl::Duration timeout_;
  const int spins_;
  alignas(64) Word word_{0};
  alignas(64) std::atomic<int> arrived_{0};
  std::vector<Rank> ranks_;
  std::vector<Mailbox> mailboxes_;

  // std::mutex: Debian's absl is not built for the thread sanitizer, which would not see its locks.
  mutable std::mutex mutex_;
  absl::Status error_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_SHARED_MEMORY_GROUP_H_
