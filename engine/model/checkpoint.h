// Checkpoint: the safetensors shards of a Hugging Face folder as one table of tensors.
#ifndef SOLOIST_ENGINE_MODEL_CHECKPOINT_H_
#define SOLOIST_ENGINE_MODEL_CHECKPOINT_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/safetensors.h"

namespace soloist {

class Checkpoint {
 public:
  // model.safetensors.index.json with its shards, or model.safetensors. Every tensor of the index must be in its shard.
  static absl::StatusOr<Checkpoint> Open(const std::string& model_dir);

  struct Entry {
    const SafetensorsFile* file = nullptr;
    const StoredTensor* tensor = nullptr;
  };
  // NOT_FOUND, or INVALID_ARGUMENT if shape or type are not what is asked for (types: BF16, F16, F32).
  absl::StatusOr<Entry> Find(std::string_view name, const std::vector<int64_t>& shape) const;

 private:
  std::string dir_;
  std::vector<std::unique_ptr<const SafetensorsFile>> files_;
  std::map<std::string, Entry, std::less<>> entries_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_CHECKPOINT_H_
