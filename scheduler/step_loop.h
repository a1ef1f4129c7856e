// StepLoop: the one thread that touches the Scheduler and the Engine: take arrivals, schedule, submit, await, commit.
#ifndef SOLOIST_SCHEDULER_STEP_LOOP_H_
#define SOLOIST_SCHEDULER_STEP_LOOP_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "engine/engine.h"
#include "engine/micro_batches.h"
#include "scheduler/request.h"

namespace soloist {

struct SchedulerOptions {
  int32_t max_tokens_per_step = 512;  // token budget per home and step (decodes first, the rest for prefill chunks)
  int32_t max_sequences = 256;        // running per home
  int32_t max_queue = 1024;           // waiting requests, beyond: RESOURCE_EXHAUSTED
  bool prefix_cache = true;
  MicroBatches micro_batches = MicroBatches::kAuto;
  std::vector<int32_t> eos_token_ids;  // the model's end tokens
  // For tests: preempts a running sequence every N steps (0: never) and checks integrity at each idle moment.
  int32_t force_preempt_every = 0;
  bool check_integrity_when_idle = false;
};

// Counters and gauges; a consistent snapshot, taken between two steps.
struct LoadSnapshot {
  struct Home {
    int32_t running_sequences = 0;
    int32_t waiting_sequences = 0;  // assigned to this home, not yet running (preempted ones too)
    int32_t total_blocks = 0;       // 0: the home has no rank at present
    int32_t used_blocks = 0;        // referenced by sequences
    int32_t cached_blocks = 0;      // free for eviction, still holding a known prefix
  };
  // Sums over the profiled steps of a home's rank.
  struct Profile {
    int64_t steps = 0;
    std::vector<GroupTime> groups;
  };
  // Sums over all steps of a home's rank; see HomeResult.
  struct Times {
    int64_t device_ns = 0;
    int64_t idle_ns = 0;
    int64_t enqueue_ns = 0;
    int64_t comm_ns = 0;
    int64_t comm_wait_ns = 0;
    std::shared_ptr<const Profile> profile;  // null: no step was profiled (EngineOptions::profile_every)
  };
  std::vector<Home> homes;
  std::vector<Times> times;  // [homes]
  int32_t running_requests = 0;
  int32_t waiting_requests = 0;
  int64_t steps = 0;
  int64_t prompt_tokens = 0;  // computed or cached, once per request
  int64_t generated_tokens = 0;
  int64_t prefix_cache_queries = 0;  // tokens looked up
  int64_t prefix_cache_hits = 0;     // tokens found
  int64_t preemptions = 0;
  int64_t recoveries = 0;          // of the engine, from lost ranks
  int64_t requeued_sequences = 0;  // running ones whose KV cache was lost with their home
  int64_t replays = 0;             // steps that were run in vain, for want of dispatch room (engine/replay.h)
  int64_t finished_requests = 0;
  std::vector<int64_t> expert_tokens;  // [num_layers, num_experts] choices since start
  int64_t last_step_device_ns = 0;
  int64_t schedule_ns = 0;  // total time in Schedule + Commit
};

// How the engine stands, as the loop sees it.
struct EngineCondition {
  enum class State { kRunning, kRecovering, kFailed };
  State state = State::kRunning;
  int64_t since_ns = 0;  // Clock::NowNs
  std::string message;   // kRecovering: what was lost; kFailed: why
};

// When the engine has lost a rank (UNAVAILABLE), the loop calls Engine::Recover until the ranks are whole again; no
// request ends for it. Meanwhile requests are accepted as ever, and cancellations take effect.
//
// All methods are for any thread. Starts its thread at creation.
class StepLoop {
 public:
  // `engine` and `clock` must outlive it.
  static absl::StatusOr<std::unique_ptr<StepLoop>> Create(const SchedulerOptions& options, Engine& engine,
                                                          const Clock& clock);
  virtual ~StepLoop() = default;  // cancels what is left (FinishReason::kCancelled), joins

  // Never blocks on the engine. INVALID_ARGUMENT: the request can never run (both numbers in the message, e.g. prompt +
  // max_tokens against the context limit or the KV blocks of a home); RESOURCE_EXHAUSTED: queue full (its length in the
  // message); UNAVAILABLE: draining or the engine failed. After OK the sink gets exactly one OnFinish per output.
  virtual absl::Status Add(Request request) = 0;
  // Queues a cancellation; unknown ids are ignored. Takes effect within two steps, or 0.1 s while the engine recovers.
  // output_index -1: all outputs.
  // `reason` is what OnFinish says: kCancelled, or kStop when the server found a stop string.
  virtual void Cancel(const std::string& request_id, int32_t output_index, FinishReason reason) = 0;

  // Refuses new requests from now on; running and waiting ones go on.
  virtual void Drain() = 0;
  virtual bool draining() const = 0;
  // Waits until nothing is running or waiting; DEADLINE_EXCEEDED says how many are left.
  virtual absl::Status AwaitIdle(absl::Duration timeout) = 0;

  virtual LoadSnapshot Load() const = 0;
  // OK, or why the engine has failed for good. OK while it recovers.
  virtual absl::Status health() const = 0;
  virtual EngineCondition condition() const = 0;
};

}  // namespace soloist

#endif  // SOLOIST_SCHEDULER_STEP_LOOP_H_
