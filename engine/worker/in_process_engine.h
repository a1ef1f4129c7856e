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
  int32_t block_size = 0;           // tokens per KV block; 0: 16, on CUDA 64
  int32_t max_model_len = 0;        // 0: the model's max_position_embeddings
  int32_t max_tokens_per_step = 0;  // per home; 0: 512, on CUDA 8192
  int32_t max_sequences = 256;      // per home
  int32_t num_blocks = 0;  // per home; 0: what `memory_fraction` of the free memory holds, at most what max_sequences
                           // sequences of max_model_len need
  double memory_fraction = 0;      // of the memory that is free after weights and workspaces, over all ranks of the
                                   // process; 0: 0.5, on CUDA 0.9
  std::string kv_dtype = "auto";   // f32, bf16 or fp8_e4m3; auto: f32, on CUDA bf16
  int64_t masked_max_tokens = 64;  // dispatch layout: see DispatcherOptions
  absl::Duration collective_timeout = absl::Seconds(60);
  // > 0: one rank that does what rank 0 of so many does, exchanging tokens with itself; see DispatcherOptions. For
  // measurements: the tokens mean nothing.
  int slice_ranks = 0;
  bool slice_uniform = false;  // slice only: tokens go to the experts in turn, so that every rank gets as many rows
  int profile_every = 0;       // see WorkerOptions
};

// The options with every "0: ..." and "auto" that depends on the device replaced.
EngineOptions WithDefaults(EngineOptions options);

// Called now and then while loading, from the creating thread: bytes so far, of all.
using LoadCallback = std::function<void(int64_t loaded_bytes, int64_t total_bytes)>;

// Loads, warms up, starts the rank threads, is READY. Errors name the flag-like field or the file. `clock` must outlive
// the engine.
absl::StatusOr<std::unique_ptr<Engine>> CreateInProcessEngine(const EngineOptions& options, const Clock& clock,
                                                              const LoadCallback& on_progress);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_IN_PROCESS_ENGINE_H_
