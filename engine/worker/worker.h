// Worker: one rank. Owns its device, KV arena, dispatcher and transformer, and runs its part of every StepPlan. The
// same code whether the rank is a thread or a process.
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
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/comm/communicator.h"
#include "engine/comm/dispatcher.h"
#include "engine/model/device_weights.h"
#include "engine/model/transformer.h"
#include "engine/step.h"
#include "engine/trace.h"
#include "engine/worker/kv_arena.h"
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
  // Not null: what the rank does is written there. Where the host runs the ops itself, every group of ops; on a device
  // whole steps, and the groups of those that are profiled.
  std::shared_ptr<TraceWriter> trace;
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

  // Gives the rank another group: of the same size, with the same place in it. The old one must be idle or aborted, and
  // nobody in Finish. Steps in flight are forgotten; weights and KV stay (slots that those steps were to write may hold
  // anything). Graphs are gone until WarmUp. The rank's own thread.
  absl::Status ReplaceCommunicator(std::unique_ptr<Communicator> comm);
  // Gives the rank a group of any size, with another map of experts: `expert_rank` by ranks of `comm`. The experts that
  // the rank was created with must be its own there, too; `added` brings those that it does not hold yet, by expert,
  // one in each; those that are no longer its own are freed. After an error the rank has no group, holds what it was
  // created with, and waits for another call. For the rest as ReplaceCommunicator.
  absl::Status ReplaceGroup(std::unique_ptr<Communicator> comm, std::vector<int> expert_rank,
                            std::map<int, ExpertWeights> added);
  bool HoldsExpert(int expert) const;

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
    int64_t step = 0;
    int64_t enqueue_ns = 0;
    CommTimes comm_times;                            // empty where they were not taken
    std::vector<const char*> groups;                 // of a profiled step: group i ends at event i
    std::vector<std::unique_ptr<Event>> group_ends;  // grows to the most groups of a step
  };

  // Kept for two steps longer than their slot, for the time between one step and the next.
  struct StepEvents {
    std::unique_ptr<Event> start, end;
  };

  // Room of a graph's plan for penalties, biases and masks of all rows together; a step with more runs without a graph.
  static constexpr int64_t kGraphBias = 16384, kGraphHistory = 65536, kGraphMaskWords = 1 << 20;

  Worker() = default;
  // worker_group.cc
  void LeaveGroup(std::unique_ptr<Communicator> comm);
  absl::Status JoinGroup();
  absl::Status PrepareDevice();
  void GatherExperts();
  absl::Status CreateDispatcher();
  absl::Status CreateTransformer();
  absl::Status Allocate();
  absl::Status WarmUpChunk();
  DispatchCapacity CapacityOf(int64_t max_home_tokens, int64_t dispatch_rows) const;
  // Allocates at least `bytes` unless the buffer has them.
  absl::Status Grow(Buffer& buffer, int64_t bytes, absl::StatusOr<Buffer> (Device::*allocate)(int64_t));
  // worker_graphs.cc
  PlanRoom GraphRoom(int64_t rows) const;
  StagedPlan GraphPlan(const DispatchCapacity& capacity) const;
  // Null: the step runs without one.
  absl::StatusOr<const Graph*> GraphOf(const DispatchCapacity& capacity);
  absl::Status Enqueue(Slot& slot, const HomePlan& plan);
  // The device's part of a step whose plan lies at `plan`. `times`: of its collectives; null: not taken.
  absl::Status EnqueueOps(const StagedPlan& staged, const int32_t* plan, float* raw_logits, CommTimes* times);
  void MarkGroup(Slot& slot, const char* group);
  HomeResult ReadResult(const Slot& slot) const;
  // worker_trace.cc; nothing without a trace.
  void CreateTrace();
  std::unique_ptr<Communicator> Traced(std::unique_ptr<Communicator> comm);
  bool TracesGroups() const { return trace_.writer != nullptr && device_->host_accessible(); }
  void TraceSubmitBegins(int64_t step, int64_t now_ns);
  void TraceGroup(const char* group, int micro_batch = -1);
  void TraceSubmitEnds(int64_t start_ns, int64_t now_ns);
  void TraceFinish(const Slot& slot, int64_t start_ns) const;
  const StepEvents& EventsOf(int64_t step) const { return events_[step % (2 * kMaxInFlight)]; }

  ModelConfig config_;
  WorkerOptions options_;
  // Order of destruction: what uses the device goes before it.
  std::unique_ptr<Device> device_;
  RankTrace trace_;
  int64_t group_start_ns_ = 0, submit_end_ns_ = 0;  // of trace_
  std::unique_ptr<Communicator> comm_;
  std::unique_ptr<Stream> stream_;
  const SharedWeights* shared_ = nullptr;
  std::vector<int> own_ids_;  // experts that it was created with, ascending
  ExpertWeights own_;
  std::map<int, ExpertWeights> added_;  // by expert
  ExpertWeights experts_;               // views of the group's: those of own_ and added_, ascending by expert
  OpLimits prepared_;
  KvArena kv_;
  std::unique_ptr<TokenDispatcher> dispatcher_;
  std::unique_ptr<Transformer> transformer_;

  std::vector<int64_t> buckets_;  // rows, ascending; empty: no graphs
  // By bucket and masked rows.
  std::map<std::pair<int64_t, int64_t>, std::unique_ptr<Graph>> graphs_;
  Buffer graph_plan_;  // device: where graphs find their plan
  Buffer eager_plan_;  // device: grows with the largest plan
  Buffer previous_;    // device, I32 [max_logit_rows]: tokens of the step before
  Buffer results_;     // device: see ResultLayout
  Buffer raw_logits_;  // device, F32 [max_logit_rows, vocab], once a plan has asked for logits
  Slot slots_[kMaxInFlight];
  StepEvents events_[2 * kMaxInFlight];
  int64_t submitted_ = 0;
  std::atomic<int64_t> finished_{0};
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_WORKER_H_
