#include "engine/model/footprint.h"

#include <utility>

#include "engine/model/weights.h"

namespace soloist {
namespace {

int64_t Elements(const ModelConfig& config, WeightRole role) {
  const auto [rows, cols] = RoleShape(config, role);
  return rows * cols;
}

}  // namespace

Parameters CountParameters(const ModelConfig& c) {
  Parameters p;
  p.attention = c.num_layers * (Elements(c, WeightRole::kAttentionNorm) + Elements(c, WeightRole::kQkv) +
                                Elements(c, WeightRole::kAttentionOutput) + Elements(c, WeightRole::kMoeNorm) +
                                Elements(c, WeightRole::kRouter));
  p.expert = c.num_layers * (Elements(c, WeightRole::kExpertGateUp) + Elements(c, WeightRole::kExpertDown));
  p.embedding = Elements(c, WeightRole::kEmbedding) + Elements(c, WeightRole::kFinalNorm) +
                (c.tie_word_embeddings ? 0 : Elements(c, WeightRole::kLmHead));
  p.total = p.attention + p.embedding + c.num_experts * p.expert;
  p.active = p.attention + p.embedding + c.experts_per_token * p.expert;
  return p;
}

int64_t SharedWeightBytes(const ModelConfig& c) {
  const int64_t hidden = c.hidden_size, q = int64_t{c.num_heads} * c.head_dim,
                kv = int64_t{c.num_kv_heads} * c.head_dim;
  const int64_t layer = 2 * hidden * 4 + 2 * (hidden * (2 * q + 2 * kv) + c.num_experts * hidden);
  return c.num_layers * layer + hidden * 4 + 2 * c.vocab_size * hidden * (c.tie_word_embeddings ? 1 : 2);
}

int64_t ExpertWeightBytes(const ModelConfig& c, int64_t num_local_experts) {
  const int64_t matrices = c.activation == Activation::kSiluGated ? 3 : 2;
  return 2 * c.num_layers * num_local_experts * matrices * c.hidden_size * c.expert_hidden_size;
}

int64_t KvBytesPerToken(const ModelConfig& config, DType dtype) {
  return 2LL * config.num_layers * config.num_kv_heads * config.head_dim * DTypeBytes(dtype);
}

}  // namespace soloist
