#include "engine/model/config.h"

#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include "base/status.h"
#include "engine/model/families.h"
#include "engine/model/json_fields.h"

namespace soloist {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("{}: cannot be opened", path);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file.good() && !file.eof()) return DataLoss("{}: cannot be read", path);
  return std::move(text).str();
}

// Bounds that keep every product of two sizes far from overflow.
constexpr int64_t kMaxDim = 1 << 20;

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json, std::string_view source_name) {
  ASSIGN_OR_RETURN(const nlohmann::json object, ParseJsonObject(json, source_name));
  const auto names = object.find("architectures");
  if (names == object.end() || !names->is_array() || names->size() != 1 || !names->front().is_string()) {
    return InvalidArgument("{}: architectures must be a list of one name", source_name);
  }
  ModelConfig config;
  config.architecture = names->front().get<std::string>();
  auto family = FindFamily(config.architecture);
  if (!family.ok()) return Annotate(family.status(), source_name);

  JsonFields fields(object, source_name);
  config.num_layers = fields.Int("num_hidden_layers", 1, 1024);
  config.hidden_size = fields.Int("hidden_size", 1, kMaxDim);
  config.num_heads = fields.Int("num_attention_heads", 1, 4096);
  config.num_kv_heads = fields.Int("num_key_value_heads", 1, config.num_heads, config.num_heads);
  config.vocab_size = fields.Int("vocab_size", 1, 1 << 24);
  config.max_position_embeddings = fields.Int("max_position_embeddings", 1, 1 << 24);
  config.rope_theta = fields.Number("rope_theta", 0, 1e12, 10000.0);
  config.rms_norm_eps = static_cast<float>(fields.Number("rms_norm_eps", 0, 1, 1e-5));
  config.sliding_window = fields.Int("sliding_window", 1, 1 << 24, 0);
  config.tie_word_embeddings = fields.Bool("tie_word_embeddings", false);
  config.bos_token_id = static_cast<int32_t>(fields.Int("bos_token_id", 0, config.vocab_size - 1, -1));
  config.eos_token_ids = fields.TokenIds("eos_token_id", config.vocab_size);
  fields.Refuse("rope_scaling", nullptr, "scaled positions are not supported");
  fields.Refuse("attention_bias", false, "attention biases are not supported");
  fields.Refuse("quantization_config", nullptr, "quantized checkpoints are not supported");
  if (!fields.status().ok()) return fields.status();
  if (config.num_heads % config.num_kv_heads != 0) {
    return InvalidArgument("{}: num_attention_heads {} is not a multiple of num_key_value_heads {}", source_name,
                           config.num_heads, config.num_kv_heads);
  }
  if (fields.Find("head_dim") == nullptr && config.hidden_size % config.num_heads != 0) {
    return InvalidArgument("{}: hidden_size {} is not a multiple of num_attention_heads {} and there is no head_dim",
                           source_name, config.hidden_size, config.num_heads);
  }
  config.head_dim = fields.Int("head_dim", 1, 4096, config.hidden_size / config.num_heads);
  if (config.head_dim % 2 != 0) {
    return InvalidArgument("{}: head_dim is {}, allowed: even numbers (rope rotates pairs)", source_name,
                           config.head_dim);
  }
  (*family)->parse(fields, config);
  if (!fields.status().ok()) return fields.status();
  if (config.experts_per_token > config.num_experts) {
    return InvalidArgument("{}: {} experts per token, but there are {} experts", source_name, config.experts_per_token,
                           config.num_experts);
  }
  return config;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& model_dir) {
  const std::string path = model_dir + "/config.json";
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ParseModelConfig(text, path);
}

absl::StatusOr<GenerationDefaults> ParseGenerationDefaults(std::string_view json, std::string_view source_name) {
  ASSIGN_OR_RETURN(const nlohmann::json object, ParseJsonObject(json, source_name));
  JsonFields fields(object, source_name);
  GenerationDefaults defaults;
  const auto take = [&](const char* name, double min, double max, std::optional<float>& value) {
    if (fields.Find(name) != nullptr) value = static_cast<float>(fields.Number(name, min, max));
  };
  take("temperature", -1e-9, 100, defaults.temperature);
  take("top_p", 0, 1, defaults.top_p);
  take("min_p", -1e-9, 1, defaults.min_p);
  take("repetition_penalty", 0, 100, defaults.repetition_penalty);
  if (fields.Find("top_k") != nullptr) defaults.top_k = static_cast<int32_t>(fields.Int("top_k", 0, 1 << 24));
  // do_sample false says greedy, whatever temperature stands beside it.
  if (fields.Find("do_sample") != nullptr && !fields.Bool("do_sample", false)) defaults.temperature = 0.0f;
  defaults.eos_token_ids = fields.TokenIds("eos_token_id", 1 << 24);
  if (!fields.status().ok()) return fields.status();
  return defaults;
}

absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const std::string& model_dir) {
  const std::string path = model_dir + "/generation_config.json";
  if (!std::filesystem::exists(path)) return GenerationDefaults{};
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ParseGenerationDefaults(text, path);
}

}  // namespace soloist
