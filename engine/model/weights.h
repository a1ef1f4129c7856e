// WeightSource: a model's matrices by role, from a checkpoint or from a seed. Rows on demand, so that a rank touches
// only its bytes.
#ifndef SOLOIST_ENGINE_MODEL_WEIGHTS_H_
#define SOLOIST_ENGINE_MODEL_WEIGHTS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "kernels/tensor.h"

namespace soloist {

// All matrices are [out, in], row-major.
enum class WeightRole {
  kEmbedding,        // [vocab, hidden]
  kLmHead,           // [vocab, hidden]; the embedding if tied
  kFinalNorm,        // [1, hidden]
  kAttentionNorm,    // [1, hidden]
  kQkv,              // [(hq + 2 hkv) * head_dim, hidden]: q rows, k rows, v rows
  kAttentionOutput,  // [hidden, hq * head_dim]
  kMoeNorm,          // [1, hidden]
  kRouter,           // [experts, hidden]
  kExpertGateUp,  // [2 * expert_hidden, hidden]: gate (w1) rows, then up (w3) rows; two-matrix experts: [expert_hidden,
                  // hidden]
  kExpertDown,    // [hidden, expert_hidden]
};

const char* RoleName(WeightRole role);

// {rows, cols} of a role.
std::pair<int64_t, int64_t> RoleShape(const ModelConfig& config, WeightRole role);

// A matrix that is a formula: element (row, col) = UniformAt(key, row * cols + col, scale); see kernels/uniform.h.
struct UniformWeights {
  uint64_t key = 0;
  float scale = 0;
};

// Thread-safe.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // Rows [row_begin, row_begin + row_count) of the role's matrix, converted (BF16: round to nearest even). `layer` and
  // `expert` are ignored where a role has none. Errors name file and tensor.
  virtual absl::Status Read(WeightRole role, int64_t layer, int64_t expert, int64_t row_begin, int64_t row_count,
                            BFloat16* out) const = 0;
  virtual absl::Status Read(WeightRole role, int64_t layer, int64_t expert, int64_t row_begin, int64_t row_count,
                            float* out) const = 0;
  // The role's formula, if it has one: a device can fill the matrix without reading it from here.
  virtual std::optional<UniformWeights> Uniform(WeightRole /*role*/, int64_t /*layer*/, int64_t /*expert*/) const {
    return std::nullopt;
  }
};

// The safetensors of a Hugging Face folder. Every tensor that the model needs is looked up and checked here.
absl::StatusOr<std::unique_ptr<const WeightSource>> OpenCheckpointSource(const ModelConfig& config,
                                                                         const std::string& model_dir);

// Weights from a seed: norms are 1, the rest uniform with variance 1 / cols (embedding: 1), each element a function of
// (seed, role, layer, expert, index) alone.
absl::StatusOr<std::unique_ptr<const WeightSource>> CreateDummySource(const ModelConfig& config, uint64_t seed);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_WEIGHTS_H_
