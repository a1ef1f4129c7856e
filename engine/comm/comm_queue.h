// CommQueue: where the collectives of one rank's steps run. In a step of one micro-batch, in line: on the caller's
// thread and stream. In a step of two, on a thread and a stream of the queue's own, in the order in which they were
// started, while the caller goes on with the other micro-batch.
//
// So a communicator has one enqueuing thread at a time: a step has finished what it started before the next begins.
#ifndef SOLOIST_ENGINE_COMM_COMM_QUEUE_H_
#define SOLOIST_ENGINE_COMM_COMM_QUEUE_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/comm/communicator.h"
#include "engine/trace.h"
#include "kernels/device.h"

namespace soloist {

// The micro-batches of a step are 0 and 1.
inline constexpr int kMaxMicroBatches = 2;
// "dispatch A": for people.
std::string MicroBatchName(std::string_view name, int micro_batch);

// When a step's collectives ran, and when its stream waited for them. Filled while the step is enqueued; read once it
// is done.
class CommTimes {
 public:
  // Between `begin` and `end` the collectives of one job; between the other two, what was enqueued behind it waited.
  struct Span {
    const char* name = "";
    int micro_batch = 0;
    std::unique_ptr<Event> begin, end, wait_begin, wait_end;
  };

  void Clear() { used_ = 0; }
  // Another one, for as long as Clear is not called.
  absl::StatusOr<Span*> Add(const char* name, int micro_batch, Device& device);

  int64_t size() const { return used_; }
  const Span& operator[](int64_t i) const { return spans_[i]; }
  int64_t busy_ns() const;
  int64_t wait_ns() const;

 private:
  std::deque<Span> spans_;  // addresses stay
  int64_t used_ = 0;
};

// One thread, the rank's own, calls it.
class CommQueue {
 public:
  // Collectives, and host work between them, on the stream that it is given.
  using Job = std::function<absl::Status(Stream& stream)>;

  // Both must outlive it.
  CommQueue(Device& device, Communicator& comm) : device_(device), comm_(comm) {}
  // Nothing may be started and not finished.
  ~CommQueue();
  CommQueue(const CommQueue&) = delete;
  CommQueue& operator=(const CommQueue&) = delete;

  // What follows belongs to another step. `overlaps`: its collectives run on the queue's thread. `times` takes its
  // times; null: none are taken, only in line.
  void BeginStep(bool overlaps, CommTimes* times);
  // `job` runs when what was enqueued on `stream` before has run. At most one for each micro-batch is started and not
  // finished. In line, an error is the job's.
  absl::Status Start(int micro_batch, const char* name, Job job, Stream& stream);
  // What is enqueued on `stream` from now on comes after the micro-batch's job, which the host knows to have run (a
  // device may still be at the collectives). Its error, or that of an earlier job of the step: those behind it do not
  // run. OK where none was started.
  absl::Status Finish(int micro_batch, Stream& stream);
  // The step has failed: waits until the thread is out of it. Where a job may still wait for other ranks, aborts the
  // group with `reason`; not where a job has failed, so that a rank whose own fault it is does not blame the group.
  void Abandon(const absl::Status& reason);

  // Where the host runs the collectives: notes those of two micro-batches, and the waits for them. Null: not.
  void set_trace(const RankTrace* trace) { trace_ = trace; }

 private:
  struct Flight {
    bool started = false;
    Job job;
    CommTimes::Span* span = nullptr;
    std::unique_ptr<Event> ready;  // what the job waits for
    // With mutex_.
    bool done = false;
    absl::Status status;
  };

  absl::Status RunInLine(int micro_batch, const char* name, const Job& job, Stream& stream);
  absl::Status StartThread();
  void Run();
  absl::Status RunJob(Flight& flight);
  void AwaitDone(Flight& flight);
  void Trace(TraceTrack track, const char* name, int micro_batch, int64_t start_ns) const;

  Device& device_;
  Communicator& comm_;
  const RankTrace* trace_ = nullptr;
  bool overlaps_ = false;
  CommTimes* times_ = nullptr;
  Flight flights_[kMaxMicroBatches];
  std::unique_ptr<Stream> stream_;  // of the thread

  std::mutex mutex_;
  std::condition_variable started_, finished_;
  std::deque<int> queue_;     // micro-batches
  absl::Status step_status_;  // first error of the step
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_COMM_QUEUE_H_
