// MixtralForCausalLM (Mixtral 8x7B and its like): gated SiLU experts, three matrices each, a tensor per expert and
// matrix.
#include "engine/model/families.h"
#include "fmt/format.h"

namespace soloist {
namespace {

void Parse(JsonFields& fields, ModelConfig& config) {
  config.num_experts = fields.Int("num_local_experts", 1, 4096);
  config.experts_per_token = fields.Int("num_experts_per_tok", 1, 64);
  config.expert_hidden_size = fields.Int("intermediate_size", 1, 1 << 20);
  config.activation = Activation::kSiluGated;
  fields.Refuse("hidden_act", "silu", "only silu is supported");
}

std::vector<TensorPart> Parts(const ModelConfig& c, WeightRole role, int64_t layer, int64_t expert) {
  const std::string moe = fmt::format("model.layers.{}.block_sparse_moe.", layer);
  const auto of_expert = [&](const char* matrix, int64_t rows, int64_t cols) {
    return TensorPart{
        .name = fmt::format("{}experts.{}.{}.weight", moe, expert, matrix), .shape = {rows, cols}, .rows = rows};
  };
  switch (role) {
    case WeightRole::kRouter:
      return {{.name = moe + "gate.weight", .shape = {c.num_experts, c.hidden_size}, .rows = c.num_experts}};
    case WeightRole::kExpertGateUp:
      return {of_expert("w1", c.expert_hidden_size, c.hidden_size),
              of_expert("w3", c.expert_hidden_size, c.hidden_size)};
    case WeightRole::kExpertDown:
      return {of_expert("w2", c.hidden_size, c.expert_hidden_size)};
    default:
      return CommonParts(c, role, layer);
  }
}

}  // namespace

const ModelFamily kMixtralFamily = {.architecture = "MixtralForCausalLM", .parse = Parse, .parts = Parts};

}  // namespace soloist
