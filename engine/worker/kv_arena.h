// KvArena: the memory of one home's KV cache.
#ifndef SOLOIST_ENGINE_WORKER_KV_ARENA_H_
#define SOLOIST_ENGINE_WORKER_KV_ARENA_H_

#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/step.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace soloist {

// One KvLayer per layer. BlockPool hands out the ids; this owns the bytes.
class KvArena {
 public:
  static absl::StatusOr<KvArena> Create(const ModelConfig& config, const PlanLimits& limits, DType dtype,
                                        Device& device);
  const std::vector<KvLayer>& layers() const { return layers_; }

 private:
  std::vector<KvLayer> layers_;
  Buffer memory_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_KV_ARENA_H_
