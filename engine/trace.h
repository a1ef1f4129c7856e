// TraceWriter: what each rank did when, as a file for Chrome's tracing page or Perfetto: a process per rank, in it a
// track for the host's thread, one for the compute stream, one for communication, and one for the thread that awaits
// results where the device works on its own.
//
// Times are the host's monotonic clock, so that the files of several processes of one host fit together.
#ifndef SOLOIST_ENGINE_TRACE_H_
#define SOLOIST_ENGINE_TRACE_H_

#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/statusor.h"

namespace soloist {

enum class TraceTrack { kHost = 0, kCompute = 1, kCommunication = 2, kResults = 3 };

// Any thread.
class TraceWriter {
 public:
  // UNAVAILABLE names the file and why it cannot be written.
  static absl::StatusOr<std::shared_ptr<TraceWriter>> Open(const std::string& path);
  // Completes the file; a full disk is logged.
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  // Writes what has been noted; the file is then complete as it is, also if the process is killed. Workers do it after
  // every step.
  void Flush();

  // Names the rank's tracks; once, before its spans.
  void AddRank(int rank);
  // `name`: of letters, digits, blanks and underscores. From start to end, Clock::NowNs; about a microsecond.
  void Span(int rank, TraceTrack track, std::string_view name, int64_t step, int64_t start_ns, int64_t end_ns);

 private:
  TraceWriter(std::FILE* file, std::string path) : file_(file), path_(std::move(path)) {}
  void Note(const std::string& event);

  std::mutex mutex_;
  std::FILE* const file_;
  const std::string path_;
  std::string noted_ = "[";
  bool empty_ = true;
};

// One rank's part of a trace. The rank's own thread.
struct RankTrace {
  std::shared_ptr<TraceWriter> writer;
  int rank = 0;
  int64_t step = 0;  // in work

  void Span(TraceTrack track, std::string_view name, int64_t start_ns, int64_t end_ns) const {
    writer->Span(rank, track, name, step, start_ns, end_ns);
  }
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_TRACE_H_
