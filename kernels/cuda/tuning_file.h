// TuningFile: measured choices (matrix algorithms) kept between runs in one JSON file, so that a start with known
// shapes searches nothing. {"format": 1, "sections": {SECTION: {KEY: VALUE}}}; a section is one device + library +
// driver.
//
// Several processes (ranks) may share the file: Save merges what it has into what is there and renames a new file over
// it, so that a reader sees a whole file always. Whatever else is in the file is kept.
#ifndef SOLOIST_KERNELS_CUDA_TUNING_FILE_H_
#define SOLOIST_KERNELS_CUDA_TUNING_FILE_H_

#include <map>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace soloist::cuda {

// Thread-compatible.
class TuningFile {
 public:
  // Reads the values of `section` from `path`; an empty path: nothing is kept. A missing file has none; a damaged one
  // has none either, is logged, and is replaced by the next Save.
  TuningFile(std::string path, std::string section);

  std::optional<std::string> Find(const std::string& key) const;
  // In memory until Save.
  void Set(const std::string& key, std::string value);
  // Writes if anything was Set since the last Save. UNAVAILABLE with the path and the system's reason.
  absl::Status Save();

 private:
  std::string path_;
  std::string section_;
  std::map<std::string, std::string> values_;
  std::map<std::string, std::string> unsaved_;
};

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_TUNING_FILE_H_
