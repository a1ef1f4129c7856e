// ModelConfig: what a model is, from its config.json. Flat and constant once loaded.
#ifndef SOLOIST_ENGINE_MODEL_CONFIG_H_
#define SOLOIST_ENGINE_MODEL_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace soloist {

struct ModelConfig {
  std::string architecture;  // "MixtralForCausalLM"; see families.h
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  // divides num_heads
  int64_t head_dim = 0;      // even
  int64_t num_experts = 0;
  int64_t experts_per_token = 0;  // <= num_experts
  int64_t expert_hidden_size = 0;
  Activation activation = Activation::kSiluGated;
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  double rope_theta = 10000;
  float rms_norm_eps = 1e-5f;
  int64_t sliding_window = 0;  // tokens; 0: none
  bool tie_word_embeddings = false;
  int32_t bos_token_id = -1;  // -1: none
  std::vector<int32_t> eos_token_ids;
};

// generation_config.json: what a request gets that does not say.
struct GenerationDefaults {
  std::optional<float> temperature, top_p, min_p, repetition_penalty;
  std::optional<int32_t> top_k;
  std::vector<int32_t> eos_token_ids;
};

// INVALID_ARGUMENT names file, field, the value found and what is allowed; NOT_FOUND the file.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& model_dir);
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json, std::string_view source_name);
// A missing file gives empty defaults.
absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const std::string& model_dir);
absl::StatusOr<GenerationDefaults> ParseGenerationDefaults(std::string_view json, std::string_view source_name);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_CONFIG_H_
