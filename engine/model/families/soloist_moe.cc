// SoloistMoeForCausalLM: the design's reference model ("paper16"): two-matrix GELU experts; one tensor holds all
// experts of a layer.
#include "engine/model/families.h"
#include "fmt/format.h"

namespace soloist {
namespace {

void Parse(JsonFields& fields, ModelConfig& config) {
  config.num_experts = fields.Int("num_experts", 1, 4096);
  config.experts_per_token = fields.Int("num_experts_per_tok", 1, 64);
  config.expert_hidden_size = fields.Int("moe_intermediate_size", 1, 1 << 20);
  config.activation = Activation::kGelu;
  fields.Refuse("hidden_act", "gelu", "only gelu is supported");
}

std::vector<TensorPart> Parts(const ModelConfig& c, WeightRole role, int64_t layer, int64_t expert) {
  const std::string moe = fmt::format("model.layers.{}.moe.", layer);
  switch (role) {
    case WeightRole::kRouter:
      return {{.name = moe + "router.weight", .shape = {c.num_experts, c.hidden_size}, .rows = c.num_experts}};
    case WeightRole::kExpertGateUp:
      return {{.name = moe + "experts.up_proj.weight",
               .shape = {c.num_experts, c.expert_hidden_size, c.hidden_size},
               .index = expert,
               .rows = c.expert_hidden_size}};
    case WeightRole::kExpertDown:
      return {{.name = moe + "experts.down_proj.weight",
               .shape = {c.num_experts, c.hidden_size, c.expert_hidden_size},
               .index = expert,
               .rows = c.hidden_size}};
    default:
      return CommonParts(c, role, layer);
  }
}

}  // namespace

const ModelFamily kSoloistMoeFamily = {.architecture = "SoloistMoeForCausalLM", .parse = Parse, .parts = Parts};

}  // namespace soloist
