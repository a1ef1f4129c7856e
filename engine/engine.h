// Engine: START HERE. The scheduler's whole view of the machine: submit a StepPlan, await its StepResult.
//
// Implementations: in-process (ranks are threads; engine/worker/in_process_engine.h), simulated (a cost model, no
// device; engine/simulated_engine.h), a cluster of worker processes (engine/cluster/cluster_engine.h).
#ifndef SOLOIST_ENGINE_ENGINE_H_
#define SOLOIST_ENGINE_ENGINE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/step.h"

namespace soloist {

// What a row of a step costs, over all layers: of the experts, its share as if all ranks had the same.
struct RowCost {
  int64_t linear_flops = 0;  // in products with weights
  int64_t key_flops = 0;     // for each key that it attends to
  int32_t window = 0;        // most keys; 0: all before it and its own
};

// Derived once the weights are loaded. Only expert_rank may ever change: when ranks are lost or come back.
struct EngineInfo {
  std::string model_name;    // folder's base name
  std::string architecture;  // "MixtralForCausalLM"
  std::string device;        // of rank 0
  int num_ranks = 0;
  int num_homes = 0;  // homes that hold sequences; in the solo layout num_ranks
  int num_layers = 0;
  int num_experts = 0;
  int experts_per_token = 0;
  PlanLimits limits;  // the same for every home
  int64_t kv_bytes_per_token = 0;
  int64_t weight_bytes_per_rank = 0;
  int64_t masked_max_tokens = 0;  // most tokens on a home in a step whose dispatch is masked (DispatcherOptions)
  std::vector<int> expert_rank;   // [num_experts] rank that owns the expert, in every layer
  RowCost row_cost;
  // Fewest tokens on the busiest home for which two micro-batches are known to gain (MicroBatchPolicy); 0: none are.
  int64_t overlap_min_tokens = 0;
};

// kLost: not answering; a Recover brings it back or does without it.
enum class RankState { kStarting, kReady, kFailed, kLost };

struct RankStatus {
  int rank = 0;
  RankState state = RankState::kStarting;
  int64_t last_step = 0;      // last step that it has finished
  int64_t last_step_ns = 0;   // when, Clock::NowNs; 0: never
  int64_t busy_since_ns = 0;  // start of the step in work; 0: idle
  std::string message;        // why it failed; of a lost one: since when, and what is being done
};

// What a recovery did.
struct Recovery {
  int64_t next_step = 0;  // number of the next plan
  // [num_homes] whether the home's KV cache is what it was before the first step that was lost (slots that lost steps
  // were to write may hold anything).
  std::vector<bool> home_kept;
  // [num_homes] whether the home has a rank until the next recovery; at least one has. Plans have nothing for those
  // that have none.
  std::vector<bool> home_usable;
};

// Submit, Await and Recover are for one thread (the step loop). Info and Ranks are for any.
class Engine {
 public:
  static constexpr int kMaxInFlight = 2;

  virtual ~Engine() = default;
  // Read it again where expert_rank matters. What an earlier call returned stays valid, and as it was, for the engine's
  // life.
  virtual const EngineInfo& Info() const = 0;

  // At most kMaxInFlight plans submitted and not awaited (FAILED_PRECONDITION beyond). Plans are validated:
  // INVALID_ARGUMENT, and then nothing was submitted. plan.step must be one more than the last. References to "the
  // previous result" mean the step before. UNAVAILABLE, too, for a plan with tokens of a home that has no rank: Recover
  // says which have.
  virtual absl::Status Submit(StepPlan plan) = 0;
  // The oldest result, waiting for it. An error is final for this engine: all later calls return it. Only UNAVAILABLE,
  // a lost rank, is final no longer than until Recover has succeeded; that goes for Submit too.
  virtual absl::StatusOr<StepResult> Await() = 0;
  // After Submit or Await has failed with UNAVAILABLE: a rank was lost, or is there again. Steps in flight are gone on
  // every rank. Blocks until the ranks are whole again or the survivors have taken over; the caller calls it again
  // while it returns DEADLINE_EXCEEDED (neither within `timeout`). Other errors are final. An engine that cannot:
  // FAILED_PRECONDITION (the default).
  virtual absl::StatusOr<Recovery> Recover(absl::Duration /*timeout*/) {
    return absl::FailedPreconditionError("this engine cannot recover");
  }

  virtual std::vector<RankStatus> Ranks() const = 0;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_ENGINE_H_
