// What the worker writes of itself to a trace.
#include <cstring>
#include <string>
#include <utility>

#include "base/clock.h"
#include "engine/comm/tracing_communicator.h"
#include "engine/worker/worker.h"

namespace soloist {

void Worker::CreateTrace() {
  if (options_.trace == nullptr) return;
  trace_ = {.writer = options_.trace, .rank = comm_->rank()};
  trace_.writer->AddRank(trace_.rank);
  comm_ = Traced(std::move(comm_));
}

std::unique_ptr<Communicator> Worker::Traced(std::unique_ptr<Communicator> comm) {
  return TracesGroups() ? CreateTracingCommunicator(std::move(comm), trace_) : std::move(comm);
}

void Worker::TraceSubmitBegins(int64_t step, int64_t now_ns) {
  if (trace_.writer == nullptr) return;
  trace_.step = step;
  if (submit_end_ns_ > 0) trace_.Span(TraceTrack::kHost, "wait_for_plan", submit_end_ns_, now_ns);
  group_start_ns_ = now_ns;
}

void Worker::TraceGroup(const char* group, int micro_batch) {
  if (!TracesGroups()) return;
  const int64_t now_ns = Clock::Real().NowNs();
  const std::string name = micro_batch < 0 ? group : MicroBatchName(group, micro_batch);
  trace_.Span(TraceTrack::kCompute, name, group_start_ns_, now_ns);
  group_start_ns_ = now_ns;
}

void Worker::TraceSubmitEnds(int64_t start_ns, int64_t now_ns) {
  if (trace_.writer == nullptr) return;
  trace_.Span(TraceTrack::kHost, "submit", start_ns, now_ns);
  trace_.writer->Flush();
  submit_end_ns_ = Clock::Real().NowNs();
}

// The device's times are its own: its last work was done about when the host saw it.
void Worker::TraceFinish(const Slot& slot, int64_t start_ns) const {
  if (trace_.writer == nullptr || TracesGroups()) return;
  const int64_t end_ns = Clock::Real().NowNs();
  const auto span = [&](TraceTrack track, const char* name, int64_t from_ns, int64_t to_ns) {
    trace_.writer->Span(trace_.rank, track, name, slot.step, from_ns, to_ns);
  };
  span(TraceTrack::kResults, "wait_for_device", start_ns, end_ns);
  const StepEvents& events = EventsOf(finished_);
  const int64_t step_ns = end_ns - events.end->NsSince(*events.start);
  int64_t at_ns = step_ns;
  if (slot.groups.empty()) span(TraceTrack::kCompute, "step", at_ns, end_ns);
  const Event* from = events.start.get();
  for (size_t i = 0; i < slot.groups.size(); ++i) {
    const int64_t ns = slot.group_ends[i]->NsSince(*from);
    from = slot.group_ends[i].get();
    const bool travels = std::strcmp(slot.groups[i], "dispatch") == 0 || std::strcmp(slot.groups[i], "combine") == 0;
    span(travels ? TraceTrack::kCommunication : TraceTrack::kCompute, slot.groups[i], at_ns, at_ns + ns);
    at_ns += ns;
  }
  for (int64_t i = 0; i < slot.comm_times.size(); ++i) {
    const CommTimes::Span& job = slot.comm_times[i];
    const std::string name = MicroBatchName(job.name, job.micro_batch);
    span(TraceTrack::kCommunication, name.c_str(), step_ns + job.begin->NsSince(*events.start),
         step_ns + job.end->NsSince(*events.start));
  }
  trace_.writer->Flush();
}

}  // namespace soloist
