#include "engine/comm/comm_queue.h"

#include <iterator>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/status.h"

namespace soloist {

std::string MicroBatchName(std::string_view name, int micro_batch) {
  return std::string(name) + (micro_batch == 0 ? " A" : " B");
}

absl::StatusOr<CommTimes::Span*> CommTimes::Add(const char* name, int micro_batch, Device& device) {
  if (used_ == std::ssize(spans_)) {
    Span span;
    for (std::unique_ptr<Event>* event : {&span.begin, &span.end, &span.wait_begin, &span.wait_end}) {
      ASSIGN_OR_RETURN(*event, device.CreateEvent());
    }
    spans_.push_back(std::move(span));
  }
  Span& span = spans_[used_++];
  span.name = name;
  span.micro_batch = micro_batch;
  return &span;
}

int64_t CommTimes::busy_ns() const {
  int64_t ns = 0;
  for (int64_t i = 0; i < used_; ++i) ns += spans_[i].end->NsSince(*spans_[i].begin);
  return ns;
}

int64_t CommTimes::wait_ns() const {
  int64_t ns = 0;
  for (int64_t i = 0; i < used_; ++i) ns += spans_[i].wait_end->NsSince(*spans_[i].wait_begin);
  return ns;
}

CommQueue::~CommQueue() {
  for (const Flight& flight : flights_) CHECK(!flight.started);
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  started_.notify_all();
  thread_.join();
  stream_->Synchronize().IgnoreError();
}

void CommQueue::BeginStep(bool overlaps, CommTimes* times) {
  CHECK(times != nullptr || !overlaps);
  for (const Flight& flight : flights_) CHECK(!flight.started);
  overlaps_ = overlaps;
  times_ = times;
  if (times_ != nullptr) times_->Clear();
  // The thread is idle.
  step_status_ = absl::OkStatus();
}

absl::Status CommQueue::RunInLine(int micro_batch, const char* name, const Job& job, Stream& stream) {
  if (times_ == nullptr) return job(stream);
  ASSIGN_OR_RETURN(const CommTimes::Span* span, times_->Add(name, micro_batch, device_));
  device_.Record(*span->wait_begin, stream);
  device_.Record(*span->begin, stream);
  RETURN_IF_ERROR(job(stream));
  device_.Record(*span->end, stream);
  device_.Record(*span->wait_end, stream);
  return absl::OkStatus();
}

absl::Status CommQueue::StartThread() {
  if (thread_.joinable()) return absl::OkStatus();
  ASSIGN_OR_RETURN(stream_, device_.CreateStream());
  for (Flight& flight : flights_) {
    ASSIGN_OR_RETURN(flight.ready, device_.CreateEvent());
  }
  thread_ = std::thread([this] { Run(); });
  return absl::OkStatus();
}

absl::Status CommQueue::Start(int micro_batch, const char* name, Job job, Stream& stream) {
  if (!overlaps_) return RunInLine(micro_batch, name, job, stream);
  RETURN_IF_ERROR(StartThread());
  Flight& flight = flights_[micro_batch];
  CHECK(!flight.started);
  ASSIGN_OR_RETURN(flight.span, times_->Add(name, micro_batch, device_));
  device_.Record(*flight.ready, stream);
  flight.job = std::move(job);
  flight.done = false;
  flight.started = true;
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(micro_batch);
  }
  started_.notify_one();
  return absl::OkStatus();
}

absl::Status CommQueue::Finish(int micro_batch, Stream& stream) {
  Flight& flight = flights_[micro_batch];
  if (!flight.started) return absl::OkStatus();
  const int64_t start_ns = trace_ != nullptr ? Clock::Real().NowNs() : 0;
  device_.Record(*flight.span->wait_begin, stream);
  AwaitDone(flight);
  if (flight.status.ok()) {
    device_.Wait(stream, *flight.span->end);
    device_.Record(*flight.span->wait_end, stream);
  }
  Trace(TraceTrack::kCompute, "wait", micro_batch, start_ns);
  return flight.status;
}

void CommQueue::Abandon(const absl::Status& reason) {
  bool drains = false;  // behind a job that has failed no other one runs
  {
    const std::lock_guard lock(mutex_);
    drains = !step_status_.ok();
  }
  for (Flight& flight : flights_) {
    if (!flight.started) continue;
    if (!drains) comm_.Abort(reason);
    AwaitDone(flight);
  }
}

void CommQueue::AwaitDone(Flight& flight) {
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [&] { return flight.done; });
  flight.started = false;
}

void CommQueue::Run() {
  const absl::Status bound = device_.BindThread();
  std::unique_lock lock(mutex_);
  while (true) {
    started_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    Flight& flight = flights_[queue_.front()];
    queue_.pop_front();
    if (step_status_.ok()) {
      lock.unlock();
      absl::Status status = bound.ok() ? RunJob(flight) : bound;
      lock.lock();
      step_status_ = std::move(status);
    }
    flight.status = step_status_;
    flight.done = true;
    finished_.notify_all();
  }
}

absl::Status CommQueue::RunJob(Flight& flight) {
  const int64_t start_ns = trace_ != nullptr ? Clock::Real().NowNs() : 0;
  device_.Wait(*stream_, *flight.ready);
  device_.Record(*flight.span->begin, *stream_);
  const absl::Status status = flight.job(*stream_);
  device_.Record(*flight.span->end, *stream_);
  Trace(TraceTrack::kCommunication, flight.span->name, flight.span->micro_batch, start_ns);
  return status;
}

void CommQueue::Trace(TraceTrack track, const char* name, int micro_batch, int64_t start_ns) const {
  if (trace_ == nullptr) return;
  trace_->Span(track, MicroBatchName(name, micro_batch), start_ns, Clock::Real().NowNs());
}

}  // namespace soloist
