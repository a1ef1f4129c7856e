// Worker: one rank. Owns its device, KV arena, dispatcher and transformer, and runs its part of every StepPlan. The
// same code whether the rank is a thread or (later) a process.
#ifndef SOLOIST_ENGINE_WORKER_WORKER_H_
#define SOLOIST_ENGINE_WORKER_WORKER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/comm/communicator.h"
#include "engine/comm/dispatcher.h"
#include "engine/model/device_weights.h"
#include "engine/model/transformer.h"
#include "engine/step.h"
#include "kernels/device.h"

namespace soloist {

struct WorkerOptions {
  PlanLimits limits;  // of this home
  DType kv_dtype = DType::kF32;
  int64_t masked_max_tokens = 64;  // see DispatcherOptions
  std::vector<int> expert_rank;    // [num_experts]
};

// The memory of one home's KV cache: one KvLayer per layer. BlockPool hands out the ids; this owns the bytes.
class KvArena {
 public:
  static absl::StatusOr<KvArena> Create(const ModelConfig& config, const PlanLimits& limits, DType dtype,
                                        Device& device);
  const std::vector<KvLayer>& layers() const { return layers_; }

 private:
  std::vector<KvLayer> layers_;
  Buffer memory_;
};

// For the rank's own thread. `shared` must outlive it (other ranks read it too).
class Worker {
 public:
  static absl::StatusOr<std::unique_ptr<Worker>> Create(const ModelConfig& config, const WorkerOptions& options,
                                                        const SharedWeights& shared, ExpertWeights experts,
                                                        std::unique_ptr<Device> device,
                                                        std::unique_ptr<Communicator> comm);

  // Validates and runs this rank's part of one step and waits for its result. INVALID_ARGUMENT for a bad plan: then
  // nothing ran, and the caller must abort the group, since the other ranks are waiting. Other errors are the
  // communicator's or the device's.
  absl::StatusOr<HomeResult> Execute(const HomePlan& plan);

  // The last step's router choices, for tests: see Transformer::routed_experts.
  const Transformer& transformer() const { return *transformer_; }
  Communicator& comm() { return *comm_; }

 private:
  Worker() = default;
  absl::Status AllocateStepBuffers();

  ModelConfig config_;
  WorkerOptions options_;
  // Order of destruction: what uses the device goes before it.
  std::unique_ptr<Device> device_;
  std::unique_ptr<Communicator> comm_;
  std::unique_ptr<Stream> stream_;
  ExpertWeights experts_;
  KvArena kv_;
  std::unique_ptr<TokenDispatcher> dispatcher_;
  std::unique_ptr<Transformer> transformer_;

  Buffer plan_;       // the packed plan
  Buffer tokens_[2];  // I32 [max_sequences]: results of this and of the previous step
  int current_tokens_ = 0;
  Buffer routed_;        // I32 [num_layers, num_tokens, top_k] of the last step, for the host
  Buffer logprobs_;      // F32 [max_sequences]
  Buffer top_tokens_;    // I32 [max_sequences, kMaxTopLogprobs]
  Buffer top_logprobs_;  // F32, the same
  Buffer raw_logits_;    // F32 [max_sequences, vocab], allocated when the first plan asks for logits
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_WORKER_H_
