#include "scheduler/inbox.h"

#include <chrono>
#include <utility>

#include "base/status.h"

namespace soloist {

absl::Status Inbox::Add(Request request, int64_t now_ns) {
  {
    const std::lock_guard lock(mutex_);
    if (!health_.ok()) return Unavailable("the engine has failed: {}", health_.message());
    if (draining_ || batch_.stop) return Unavailable("draining: no new requests are taken");
    const int64_t queue = static_cast<int64_t>(batch_.arrivals.size()) + load_.waiting_requests;
    if (queue >= max_queue_)
      return ResourceExhausted("the queue is full: {} requests wait, limit {}", queue, max_queue_);
    if (!ids_.insert(request.id).second) return AlreadyExists("a request with id {} is in work", request.id);
    ++unfinished_;
    batch_.arrivals.push_back({std::move(request), now_ns});
  }
  arrived_.notify_one();
  return absl::OkStatus();
}

void Inbox::Cancel(Cancellation cancellation) {
  {
    const std::lock_guard lock(mutex_);
    // Only what can have an effect, so that the list is bounded by the requests in work.
    if (!ids_.contains(cancellation.request_id)) return;
    batch_.cancellations.push_back(std::move(cancellation));
  }
  arrived_.notify_one();
}

void Inbox::Drain() {
  const std::lock_guard lock(mutex_);
  draining_ = true;
}

bool Inbox::draining() const {
  const std::lock_guard lock(mutex_);
  return draining_;
}

void Inbox::Stop() {
  {
    const std::lock_guard lock(mutex_);
    batch_.stop = true;
  }
  arrived_.notify_one();
}

void Inbox::Wake() {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  arrived_.notify_one();
}

bool Inbox::AwaitWake(absl::Duration timeout) {
  std::unique_lock lock(mutex_);
  const bool woken = arrived_.wait_for(lock, absl::ToChronoNanoseconds(timeout), [this] { return woken_; });
  woken_ = false;
  return woken;
}

absl::Status Inbox::AwaitIdle(absl::Duration timeout) {
  std::unique_lock lock(mutex_);
  const auto idle = [this] { return unfinished_ == 0; };
  // A deadline beyond the clock's range would wrap around.
  const absl::Duration bounded = std::min(timeout, absl::Hours(24 * 365));
  if (idle_.wait_for(lock, absl::ToChronoNanoseconds(bounded), idle)) return absl::OkStatus();
  return DeadlineExceeded("{} requests are still running or waiting after {}", unfinished_,
                          absl::FormatDuration(timeout));
}

LoadSnapshot Inbox::Load() const {
  const std::lock_guard lock(mutex_);
  LoadSnapshot load = load_;
  load.waiting_requests += static_cast<int32_t>(batch_.arrivals.size());
  return load;
}

absl::Status Inbox::health() const {
  const std::lock_guard lock(mutex_);
  return health_;
}

EngineCondition Inbox::condition() const {
  const std::lock_guard lock(mutex_);
  return condition_;
}

Inbox::Batch Inbox::Take(bool wait) {
  std::unique_lock lock(mutex_);
  if (wait) {
    arrived_.wait(
        lock, [this] { return woken_ || batch_.stop || !batch_.arrivals.empty() || !batch_.cancellations.empty(); });
  }
  woken_ = false;
  const bool stop = batch_.stop;
  Batch taken = std::exchange(batch_, Batch{});
  batch_.stop = stop;
  // They wait in the scheduler now; exact again with the next Publish.
  load_.waiting_requests += static_cast<int32_t>(taken.arrivals.size());
  return taken;
}

void Inbox::Publish(LoadSnapshot load) {
  const std::lock_guard lock(mutex_);
  load_ = std::move(load);
}

void Inbox::Release(const std::string& request_id) {
  const std::lock_guard lock(mutex_);
  ids_.erase(request_id);
}

void Inbox::Finished() {
  const std::lock_guard lock(mutex_);
  if (--unfinished_ == 0) idle_.notify_all();
}

void Inbox::Fail(const absl::Status& why, int64_t now_ns) {
  const std::lock_guard lock(mutex_);
  health_ = why;
  condition_ = {EngineCondition::State::kFailed, now_ns, std::string(why.message())};
}

void Inbox::Recovering(const absl::Status& why, int64_t now_ns) {
  const std::lock_guard lock(mutex_);
  condition_ = {EngineCondition::State::kRecovering, now_ns, std::string(why.message())};
}

void Inbox::Recovered(int64_t now_ns) {
  const std::lock_guard lock(mutex_);
  condition_ = {EngineCondition::State::kRunning, now_ns, ""};
}

}  // namespace soloist
