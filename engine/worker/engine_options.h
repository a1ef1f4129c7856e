// EngineOptions: what an engine over ranks is asked to be, whether its ranks are threads or processes, and what follows
// from that for each rank.
#ifndef SOLOIST_ENGINE_WORKER_ENGINE_OPTIONS_H_
#define SOLOIST_ENGINE_WORKER_ENGINE_OPTIONS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "engine/model/config.h"
#include "engine/model/weights.h"
#include "engine/placement/parallel_plan.h"
#include "kernels/device.h"
#include "kernels/tensor.h"

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
  double memory_fraction = 0;     // of the memory that is free after weights and workspaces, over all ranks of the
                                  // process; 0: 0.5, on CUDA 0.9
  std::string kv_dtype = "auto";  // f32, bf16 or fp8_e4m3; auto: f32, on CUDA bf16
  // Dispatch layout, see DispatcherOptions; -1: 64, on CPUs less where rows are long (MaskedMaxTokens).
  int64_t masked_max_tokens = -1;
  absl::Duration collective_timeout = absl::Seconds(60);
  // > 0: one rank that does what rank 0 of so many does, exchanging tokens with itself; see DispatcherOptions. For
  // measurements: the tokens mean nothing.
  int slice_ranks = 0;
  bool slice_uniform = false;  // slice only: tokens go to the experts in turn, so that every rank gets as many rows
  int profile_every = 0;       // see WorkerOptions
  std::string trace_file;      // ranks of this process: where they write what they do, see TraceWriter; empty: nowhere
};

// The options with every "0: ..." and "auto" that depends on the device replaced.
EngineOptions WithDefaults(EngineOptions options);

// INVALID_ARGUMENT names the field, its value and what is allowed. After WithDefaults.
absl::Status CheckEngineOptions(const EngineOptions& options, const ModelConfig& config);

// Which rank owns which expert, of `groups` ranks that share them.
absl::StatusOr<ExpertPlacement> PlaceExperts(const EngineOptions& options, const ModelConfig& config, int groups);
// Of a name in EngineOptions that is not "auto".
DType KvDType(std::string_view kv_dtype);
// `load_format` as in EngineOptions.
absl::StatusOr<std::unique_ptr<const WeightSource>> OpenWeights(const ModelConfig& config, const std::string& model_dir,
                                                                const std::string& load_format, uint64_t dummy_seed);

// Most tokens on a home for the masked layout. On CUDA 64: it spares a host wait and can be captured. On CPUs so many
// that no two ranks exchange more than 16 KiB: beyond, the bytes of rows that are not there cost more than the second
// round trip of exact counts (measured over shared memory and TCP, docs/measurements).
int64_t MaskedMaxTokens(const EngineOptions& options, const ModelConfig& config, const ExpertPlacement& placement);

// All but the device, the weights' bytes and the number of blocks.
EngineInfo DescribeEngine(const EngineOptions& options, const ModelConfig& config, const ExpertPlacement& placement);

// KV blocks per home: num_blocks, or what memory and use allow. `free_bytes`: for each home. RESOURCE_EXHAUSTED if not
// one fits.
absl::StatusOr<int32_t> ChooseBlocks(const EngineOptions& options, const EngineInfo& info, int64_t free_bytes);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_ENGINE_OPTIONS_H_
