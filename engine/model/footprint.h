// How large a model is: parameters, and bytes that a rank of a layout holds. Arithmetic on the config; no device.
#ifndef SOLOIST_ENGINE_MODEL_FOOTPRINT_H_
#define SOLOIST_ENGINE_MODEL_FOOTPRINT_H_

#include <cstdint>

#include "engine/model/config.h"
#include "kernels/tensor.h"

namespace soloist {

struct Parameters {
  int64_t total = 0;
  int64_t active = 0;     // that one token uses: all but the experts that it is not routed to
  int64_t attention = 0;  // all layers, norms and routers with them
  int64_t expert = 0;     // one expert, all layers
  int64_t embedding = 0;  // embedding, head (once if tied), final norm
};
Parameters CountParameters(const ModelConfig& config);

// Bytes of weights in device memory: matrices are BF16, norms F32. Shared: all but the experts.
int64_t SharedWeightBytes(const ModelConfig& config);
int64_t ExpertWeightBytes(const ModelConfig& config, int64_t num_local_experts);
// Keys and values of one token, all layers.
int64_t KvBytesPerToken(const ModelConfig& config, DType dtype);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_FOOTPRINT_H_
