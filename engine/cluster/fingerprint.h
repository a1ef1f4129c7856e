// Fingerprints: by which the leader and its workers see that they run the same program on the same model. 64-bit FNV-1a
// in 16 hexadecimal digits: against mistakes, not against an adversary.
#ifndef SOLOIST_ENGINE_CLUSTER_FINGERPRINT_H_
#define SOLOIST_ENGINE_CLUSTER_FINGERPRINT_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace soloist {

class Fingerprint {
 public:
  void Add(std::string_view bytes);
  void Add(int64_t number);
  std::string Hex() const;

 private:
  uint64_t state_ = 0xcbf29ce484222325u;
};

// Of the running executable's bytes (not of the shared libraries that it uses).
absl::StatusOr<std::string> ExecutableFingerprint();
// Of the folder's config.json, byte for byte.
absl::StatusOr<std::string> ConfigFingerprint(const std::string& model_dir);
// Of the folder's safetensors files: names, sizes and headers (every tensor's name, type, shape and place). Weights
// that were changed in place, same sizes, go unnoticed: reading all bytes would take as long as loading them.
absl::StatusOr<std::string> CheckpointFingerprint(const std::string& model_dir);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_FINGERPRINT_H_
