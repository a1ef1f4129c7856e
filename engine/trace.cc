#include "engine/trace.h"

#include <cerrno>
#include <cstring>
#include <iterator>
#include <utility>

#include "base/logging.h"
#include "base/status.h"

namespace soloist {

absl::StatusOr<std::shared_ptr<TraceWriter>> TraceWriter::Open(const std::string& path) {
  std::FILE* const file = std::fopen(path.c_str(), "w");
  if (file == nullptr) return Unavailable("trace file {}: {}", path, std::strerror(errno));
  // Room for a flush, so that it is one write.
  std::setvbuf(file, nullptr, _IOFBF, 1 << 20);
  return std::shared_ptr<TraceWriter>(new TraceWriter(file, path));
}

TraceWriter::~TraceWriter() {
  Flush();
  const bool failed = std::ferror(file_) != 0;
  if (std::fclose(file_) != 0 || failed) spdlog::error("trace file {} is not complete", path_);
}

void TraceWriter::Flush() {
  const std::lock_guard lock(mutex_);
  const std::string end = "\n]\n";
  noted_ += end;
  std::fwrite(noted_.data(), 1, noted_.size(), file_);
  std::fflush(file_);
  // What comes next takes the end's place.
  std::fseek(file_, -std::ssize(end), SEEK_CUR);
  noted_.clear();
}

void TraceWriter::Note(const std::string& event) {
  const std::lock_guard lock(mutex_);
  noted_ += std::exchange(empty_, false) ? "\n" : ",\n";
  noted_ += event;
}

void TraceWriter::AddRank(int rank) {
  Note(fmt::format(R"({{"ph":"M","name":"process_name","pid":{},"tid":0,"args":{{"name":"rank {}"}}}})", rank, rank));
  for (const auto& [track, name] :
       {std::pair(TraceTrack::kHost, "host"), std::pair(TraceTrack::kCompute, "compute"),
        std::pair(TraceTrack::kCommunication, "communication"), std::pair(TraceTrack::kResults, "results")}) {
    Note(fmt::format(R"({{"ph":"M","name":"thread_name","pid":{},"tid":{},"args":{{"name":"{}"}}}})", rank,
                     static_cast<int>(track), name));
  }
}

void TraceWriter::Span(int rank, TraceTrack track, std::string_view name, int64_t step, int64_t start_ns,
                       int64_t end_ns) {
  Note(fmt::format(R"({{"ph":"X","name":"{}","pid":{},"tid":{},"ts":{:.3f},"dur":{:.3f},"args":{{"step":{}}}}})", name,
                   rank, static_cast<int>(track), static_cast<double>(start_ns) * 1e-3,
                   static_cast<double>(end_ns - start_ns) * 1e-3, step));
}

}  // namespace soloist
