// Worker: one rank. Owns its device, KV arena, dispatcher and transformer, and runs its part of every StepPlan. The
// same code whether the rank is a thread or (later) a process.
//
// A step is enqueued by Submit and answered by Finish, so that the device can go from one step into the next: what a
// step needs of the one before (its tokens) stays on the device. Where the device can capture, decode steps are graphs,
// one per bucket of rows, captured by WarmUp: one copy in, one launch, one copy out.
#ifndef SOLOIST_ENGINE_WORKER_WORKER_H_
#define SOLOIST_ENGINE_WORKER_WORKER_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/comm/communicator.h"
#include "engine/comm/dispatcher.h"
#include "engine/model/device_weights.h"
#include "engine/model/transformer.h"
#include "engine/step.h"
#include "engine/worker/staged_plan.h"
#include "kernels/device.h"

namespace soloist {

struct WorkerOptions {
  PlanLimits limits;  // of this home
  DType kv_dtype = DType::kF32;
  int64_t masked_max_tokens = 64;  // see DispatcherOptions
  std::vector<int> expert_rank;    // [num_experts]
  int loopback_ranks = 0;          // see DispatcherOptions
  std::vector<int32_t> loopback_experts;
  // > 0: every so many steps one runs without a graph and with a point in the stream after each op group; its result
  // says what each took.
  int profile_every = 0;
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

// Submit, Execute and WarmUp: the rank's own thread. Finish: any one thread at a time, after the Submit that it belongs
// to. `shared` must outlive it (other ranks read it too).
class Worker {
 public:
  static constexpr int kMaxInFlight = 2;

  static absl::StatusOr<std::unique_ptr<Worker>> Create(const ModelConfig& config, const WorkerOptions& options,
                                                        const SharedWeights& shared, ExpertWeights experts,
                                                        std::unique_ptr<Device> device,
                                                        std::unique_ptr<Communicator> comm);

  // The KV cache, once the memory that is left after everything else is known; sets the limits' num_blocks. Create does
  // it where the limits have them already.
  absl::Status AllocateKv(int32_t num_blocks);
  // Captures the graphs, if the device can, after a first chunk; `on_progress(done, all)` now and then.
  absl::Status WarmUp(const std::function<void(int, int)>& on_progress);

  // Validates this rank's part of one step and enqueues it; at most kMaxInFlight are submitted and not finished.
  // INVALID_ARGUMENT for a bad plan: then nothing was enqueued, and the caller must abort the group, since the other
  // ranks are waiting. Other errors are the communicator's or the device's.
  absl::Status Submit(const HomePlan& plan);
  // Waits for the oldest submitted step. An error is final.
  absl::StatusOr<HomeResult> Finish();
  // Submit and Finish.
  absl::StatusOr<HomeResult> Execute(const HomePlan& plan);

  // The last step's router choices, for tests: see Transformer::routed_experts.
  const Transformer& transformer() const { return *transformer_; }
  Communicator& comm() { return *comm_; }
  Device& device() { return *device_; }

 private:
  // What one step in flight needs on the host. Two of them, used in turn.
  struct Slot {
    Buffer plan;                         // pinned: the staged plan
    Buffer results;                      // pinned: see ResultLayout
    Buffer raw_logits;                   // pinned, once a plan has asked for logits
    StagedPlan staged;                   // where things are
    std::vector<int32_t> return_logits;  // rows of raw logits that were asked for
    bool wants_top = false;
    int64_t enqueue_ns = 0;
    std::vector<const char*> groups;                 // of a profiled step: group i ends at event i
    std::vector<std::unique_ptr<Event>> group_ends;  // grows to the most groups of a step
  };

  // Kept for two steps longer than their slot, for the time between one step and the next.
  struct StepEvents {
    std::unique_ptr<Event> start, end;
  };

  Worker() = default;
  absl::Status Allocate();
  absl::Status WarmUpChunk();
  int64_t CapacityOf(int64_t max_home_tokens) const;
  PlanRoom GraphRoom(int64_t rows) const;
  absl::Status Enqueue(Slot& slot, const HomePlan& plan);
  // The device's part of a step whose plan lies at `plan`.
  absl::Status EnqueueOps(const StagedPlan& staged, const int32_t* plan, float* raw_logits);
  void MarkGroup(Slot& slot, const char* group);
  HomeResult ReadResult(const Slot& slot) const;
  const StepEvents& EventsOf(int64_t step) const { return events_[step % (2 * kMaxInFlight)]; }

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

  std::vector<int64_t> buckets_;                      // rows, ascending; empty: no graphs
  std::map<int64_t, std::unique_ptr<Graph>> graphs_;  // by bucket
  Buffer graph_plan_;                                 // device: where graphs find their plan
  Buffer eager_plan_;                                 // device: grows with the largest plan
  Buffer previous_;                                   // device, I32 [max_sequences]: tokens of the step before
  Buffer results_;                                    // device: see ResultLayout
  Buffer raw_logits_;  // device, F32 [max_sequences, vocab], once a plan has asked for logits
  Slot slots_[kMaxInFlight];
  StepEvents events_[2 * kMaxInFlight];
  int64_t submitted_ = 0;
  std::atomic<int64_t> finished_{0};
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_WORKER_H_
