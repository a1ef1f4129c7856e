// ModelFamily: what one architecture calls its fields and tensors. The next family is one file and one line in the
// table.
#ifndef SOLOIST_ENGINE_MODEL_FAMILIES_H_
#define SOLOIST_ENGINE_MODEL_FAMILIES_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/model/json_fields.h"
#include "engine/model/weights.h"

namespace soloist {

// Rows [first_row, first_row + rows) of a role's matrix are this tensor of the checkpoint, or slice `index` of its
// first dimension.
struct TensorPart {
  std::string name;
  std::vector<int64_t> shape;  // of the whole tensor
  int64_t index = -1;          // >= 0: expert of a tensor that holds all of them, [experts, rows, cols]
  int64_t rows = 0;
};

struct ModelFamily {
  const char* architecture;
  // Fills the fields that are not common to all; reports into `fields`.
  void (*parse)(JsonFields& fields, ModelConfig& config);
  // The parts of a role's matrix, in row order.
  std::vector<TensorPart> (*parts)(const ModelConfig& config, WeightRole role, int64_t layer, int64_t expert);
};

// INVALID_ARGUMENT lists what is supported.
absl::StatusOr<const ModelFamily*> FindFamily(std::string_view architecture);

// families/*.cc
extern const ModelFamily kMixtralFamily;
extern const ModelFamily kSoloistMoeFamily;

// Parts that Llama-like names share (embedding, norms, attention); empty for a role that is not among them.
std::vector<TensorPart> CommonParts(const ModelConfig& config, WeightRole role, int64_t layer);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_FAMILIES_H_
