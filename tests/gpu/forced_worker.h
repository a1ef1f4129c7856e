// A Worker of one rank that is fed given tokens: teacher forcing, through plans of chunks or of decodes.
#ifndef SOLOIST_TESTS_GPU_FORCED_WORKER_H_
#define SOLOIST_TESTS_GPU_FORCED_WORKER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/model/config.h"
#include "engine/model/weights.h"
#include "engine/worker/worker.h"
#include "kernels/device.h"

namespace soloist {

struct ForcedOptions {
  DeviceOptions device;
  DType kv_dtype = DType::kBF16;
  int32_t block_size = 64;
  int32_t max_tokens = 2048;  // of a step
  int32_t max_sequences = 256;
  int32_t max_model_len = 2048;
  bool graphs = true;
};

// What the model says about every position of a sequence.
struct Forced {
  std::vector<float> logits;     // [positions, vocab]
  std::vector<int32_t> experts;  // [num_layers, positions, top_k]
};

// Whether position i of `positions` went to the same experts in all layers.
bool SameExperts(const ModelConfig& config, const Forced& a, const Forced& b, int64_t i, int64_t positions);

class ForcedWorker {
 public:
  // ADD_FAILUREs and null if anything fails.
  static std::unique_ptr<ForcedWorker> Create(const ModelConfig& config, const WeightSource& source,
                                              const ForcedOptions& options);
  // The model in a folder.
  static std::unique_ptr<ForcedWorker> Load(const std::string& model_dir, const ForcedOptions& options);

  // The logits of every position of one sequence, computed in chunks of `chunk` rows.
  Forced Logits(const std::vector<int32_t>& tokens, int32_t chunk);

  // Log-probabilities of tokens[i] given those before it, for i in [first[s], size) of each sequence s. All sequences
  // run together: first as chunks of up to `chunk` rows in all, and (decode_from[s], size) one token per step and
  // sequence. The next token is forced by a bias, so decode steps run as graphs where there are any.
  std::vector<std::vector<float>> Logprobs(const std::vector<std::vector<int32_t>>& sequences,
                                           const std::vector<int32_t>& first, const std::vector<int32_t>& decode_from,
                                           int32_t chunk);
  const ModelConfig& config() const { return config_; }

 private:
  ForcedWorker() = default;
  // Adds rows [begin, end) of a sequence whose blocks start at block `first_block`.
  void AddRows(HomePlanParts& parts, const std::vector<int32_t>& tokens, int32_t begin, int32_t end,
               int32_t first_block) const;
  // Pads tables, runs.
  HomeResult Run(HomePlanParts parts);

  ModelConfig config_;
  ForcedOptions options_;
  PlanLimits limits_;
  std::unique_ptr<DeviceFactory> factory_;
  SharedWeights shared_;
  std::unique_ptr<Worker> worker_;
  std::unique_ptr<Stream> stream_;
  int64_t step_ = 0;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_GPU_FORCED_WORKER_H_
