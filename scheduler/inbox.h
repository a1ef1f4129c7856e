// Inbox: the thread-safe half of the step loop. What any thread hands in or asks goes through it; the loop's thread
// takes it out between two steps and publishes what it has done.
#ifndef SOLOIST_SCHEDULER_INBOX_H_
#define SOLOIST_SCHEDULER_INBOX_H_

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "scheduler/request.h"
#include "scheduler/step_loop.h"

namespace soloist {

class Inbox {
 public:
  struct Arrival {
    Request request;
    int64_t arrival_ns = 0;
  };
  struct Cancellation {
    std::string request_id;
    int32_t output_index = -1;
    FinishReason reason = FinishReason::kCancelled;
  };
  struct Batch {
    std::vector<Arrival> arrivals;
    std::vector<Cancellation> cancellations;  // apply after the arrivals
    bool stop = false;
  };

  Inbox(int32_t max_queue, LoadSnapshot first, int64_t now_ns) : max_queue_(max_queue), load_(std::move(first)) {
    condition_.since_ns = now_ns;
  }

  // Any thread.
  absl::Status Add(Request request, int64_t now_ns);
  void Cancel(Cancellation cancellation);
  void Drain();
  bool draining() const;
  void Stop();
  // Ends a wait of the loop's thread, or its next one.
  void Wake();
  absl::Status AwaitIdle(absl::Duration timeout);
  LoadSnapshot Load() const;
  absl::Status health() const;
  EngineCondition condition() const;

  // The loop's thread. With `wait`, sleeps until there is something, or a Wake.
  Batch Take(bool wait);
  // Sleeps until a Wake, or for `timeout`; false after that.
  bool AwaitWake(absl::Duration timeout);
  void Publish(LoadSnapshot load);
  // Before the request's last OnFinish: its id is free again.
  void Release(const std::string& request_id);
  // After the request's last OnFinish.
  void Finished();
  void Fail(const absl::Status& why, int64_t now_ns);
  void Recovering(const absl::Status& why, int64_t now_ns);
  void Recovered(int64_t now_ns);

 private:
  const int32_t max_queue_;
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  std::condition_variable idle_;
  // All below: mutex_.
  Batch batch_;
  std::unordered_set<std::string> ids_;  // of all requests accepted and not released
  int64_t unfinished_ = 0;               // requests accepted and not finished
  LoadSnapshot load_;
  absl::Status health_;
  EngineCondition condition_;
  bool draining_ = false;
  bool woken_ = false;  // since the last Take or AwaitWake
};

}  // namespace soloist

#endif  // SOLOIST_SCHEDULER_INBOX_H_
