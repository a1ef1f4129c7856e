#include "engine/model/families.h"

#include "base/status.h"
#include "fmt/format.h"

namespace soloist {
namespace {

// The table.
const ModelFamily* const kFamilies[] = {&kMixtralFamily, &kSoloistMoeFamily};

}  // namespace

absl::StatusOr<const ModelFamily*> FindFamily(std::string_view architecture) {
  std::string supported;
  for (const ModelFamily* family : kFamilies) {
    if (architecture == family->architecture) return family;
    supported += fmt::format("{}{}", supported.empty() ? "" : ", ", family->architecture);
  }
  return InvalidArgument("architecture '{}' is not supported; supported: {}", architecture, supported);
}

std::vector<TensorPart> CommonParts(const ModelConfig& c, WeightRole role, int64_t layer) {
  const std::string prefix = fmt::format("model.layers.{}.", layer);
  const auto matrix = [](std::string name, int64_t rows, int64_t cols) {
    return TensorPart{.name = std::move(name), .shape = {rows, cols}, .rows = rows};
  };
  const auto vector = [](std::string name, int64_t size) {
    return TensorPart{.name = std::move(name), .shape = {size}, .rows = 1};
  };
  const int64_t q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  switch (role) {
    case WeightRole::kEmbedding:
      return {matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size)};
    case WeightRole::kLmHead:
      return {
          matrix(c.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight", c.vocab_size, c.hidden_size)};
    case WeightRole::kFinalNorm:
      return {vector("model.norm.weight", c.hidden_size)};
    case WeightRole::kAttentionNorm:
      return {vector(prefix + "input_layernorm.weight", c.hidden_size)};
    case WeightRole::kMoeNorm:
      return {vector(prefix + "post_attention_layernorm.weight", c.hidden_size)};
    case WeightRole::kQkv:
      return {matrix(prefix + "self_attn.q_proj.weight", q, c.hidden_size),
              matrix(prefix + "self_attn.k_proj.weight", kv, c.hidden_size),
              matrix(prefix + "self_attn.v_proj.weight", kv, c.hidden_size)};
    case WeightRole::kAttentionOutput:
      return {matrix(prefix + "self_attn.o_proj.weight", c.hidden_size, q)};
    default:
      return {};
  }
}

}  // namespace soloist
