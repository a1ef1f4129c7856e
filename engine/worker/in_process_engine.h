// InProcessEngine: ranks are threads of this process. One rank is the default; 16 ranks own one expert per layer each
// and exchange tokens through shared memory, exactly as processes will.
#ifndef SOLOIST_ENGINE_WORKER_IN_PROCESS_ENGINE_H_
#define SOLOIST_ENGINE_WORKER_IN_PROCESS_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "engine/engine.h"
#include "engine/model/config.h"
#include "kernels/device.h"

namespace soloist {

struct EngineOptions {
  std::string model_dir;
  std::string load_format = "auto";  // auto: safetensors; dummy: weights from `dummy_seed`, config.json only
  uint64_t dummy_seed = 0;
  int num_ranks = 1;             // 1 to num_experts
  std::vector<int> expert_rank;  // [num_experts]; empty: contiguous
  DeviceOptions device;
  int32_t block_size = 16;            // tokens per KV block
  int32_t max_model_len = 0;          // 0: the model's max_position_embeddings
  int32_t max_tokens_per_step = 512;  // per home
  int32_t max_sequences = 256;        // per home
  int32_t num_blocks = 0;  // per home; 0: what `memory_fraction` of the free memory holds, at most what max_sequences
                           // sequences of max_model_len need
  double memory_fraction = 0.5;    // of the memory that is free after the weights, over all ranks of the process
  std::string kv_dtype = "f32";    // f32 or bf16
  int64_t masked_max_tokens = 64;  // dispatch layout: see DispatcherOptions
  absl::Duration collective_timeout = absl::Seconds(60);
};

// Called now and then while loading, from the creating thread: bytes so far, of all.
using LoadCallback = std::function<void(int64_t loaded_bytes, int64_t total_bytes)>;

// Loads, starts the rank threads, is READY. Errors name the flag-like field or the file. `clock` must outlive the
// engine.
absl::StatusOr<std::unique_ptr<Engine>> CreateInProcessEngine(const EngineOptions& options, const Clock& clock,
                                                              const LoadCallback& on_progress);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_IN_PROCESS_ENGINE_H_
