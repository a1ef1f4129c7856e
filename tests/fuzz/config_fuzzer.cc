// Bytes from anywhere as config.json and generation_config.json: what is accepted has sizes that can be computed with.
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "engine/model/config.h"
#include "engine/model/families.h"
#include "engine/model/footprint.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  (void)soloist::ParseGenerationDefaults(text, "fuzz");
  const auto config = soloist::ParseModelConfig(text, "fuzz");
  if (!config.ok()) return 0;
  CHECK(config->num_heads % config->num_kv_heads == 0 && config->head_dim % 2 == 0);
  CHECK(config->experts_per_token >= 1 && config->experts_per_token <= config->num_experts);
  const soloist::Parameters parameters = soloist::CountParameters(*config);
  CHECK(parameters.total > 0 && parameters.active > 0 && parameters.active <= parameters.total);
  CHECK(soloist::SharedWeightBytes(*config) > 0);
  CHECK(soloist::ExpertWeightBytes(*config, config->num_experts) > 0);
  CHECK(soloist::KvBytesPerToken(*config, soloist::DType::kF32) > 0);
  const auto family = soloist::FindFamily(config->architecture);
  CHECK_OK(family.status());
  using soloist::WeightRole;
  for (const WeightRole role : {WeightRole::kEmbedding, WeightRole::kLmHead, WeightRole::kQkv, WeightRole::kRouter,
                                WeightRole::kExpertGateUp, WeightRole::kExpertDown}) {
    int64_t rows = 0;
    for (const soloist::TensorPart& part : (*family)->parts(*config, role, 0, 0)) rows += part.rows;
    CHECK_EQ(rows, soloist::RoleShape(*config, role).first);
  }
  return 0;
}
