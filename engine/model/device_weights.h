// Weights in device memory: what every rank reads (shared, once per process) and what only one rank owns (its experts).
#ifndef SOLOIST_ENGINE_MODEL_DEVICE_WEIGHTS_H_
#define SOLOIST_ENGINE_MODEL_DEVICE_WEIGHTS_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/model/weights.h"
#include "kernels/device.h"
#include "kernels/tensor.h"

namespace soloist {

struct LayerWeights {
  Tensor attention_norm;    // F32 [1, hidden]
  Tensor qkv;               // BF16 [(hq + 2 hkv) * head_dim, hidden]
  Tensor attention_output;  // BF16 [hidden, hq * head_dim]
  Tensor moe_norm;          // F32 [1, hidden]
  Tensor router;            // BF16 [num_experts, hidden]
};

// Read-only after loading; any number of ranks of the process may read it.
struct SharedWeights {
  Tensor embedding;   // BF16 [vocab, hidden]
  Tensor lm_head;     // BF16 [vocab, hidden]; the embedding itself if tied
  Tensor final_norm;  // F32 [1, hidden]
  Tensor cos_sin;     // F32 [max_positions, head_dim]: see Ops::RopeAppendKv
  std::vector<LayerWeights> layers;
  std::vector<Buffer> storage;

  int64_t bytes() const;
};

// The local experts of one rank, ascending by expert id.
struct ExpertWeights {
  struct Layer {
    std::vector<Tensor> w_in;   // BF16 [expert_hidden or 2 * expert_hidden, hidden]
    std::vector<Tensor> w_out;  // BF16 [hidden, expert_hidden]
  };
  std::vector<Layer> layers;
  std::vector<Buffer> storage;

  int64_t bytes() const;
};

// Counted by the loaders, read by whoever shows progress. Bytes as they lie in device memory.
struct LoadProgress {
  std::atomic<int64_t> loaded_bytes{0};
};

// Reads with `threads` threads: in place where the host reaches the device's memory; else through two pinned buffers of
// 8 MiB a thread, and roles with a formula (WeightSource::Uniform) are filled by the device. `max_positions`: rows of
// the rope table. Errors are the source's, or the device's.
absl::StatusOr<SharedWeights> LoadSharedWeights(const ModelConfig& config, const WeightSource& source,
                                                int64_t max_positions, Device& device, int threads,
                                                LoadProgress& progress);
absl::StatusOr<ExpertWeights> LoadExpertWeights(const ModelConfig& config, const WeightSource& source,
                                                const std::vector<int>& experts, Device& device, int threads,
                                                LoadProgress& progress);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_DEVICE_WEIGHTS_H_
