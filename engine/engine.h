// Engine: START HERE. The scheduler's whole view of the machine: submit a StepPlan, await its StepResult.
//
// Implementations: in-process (ranks are threads; engine/worker/in_process_engine.h), simulated (a cost model, no
// device; engine/simulated_engine.h); later a cluster of worker processes.
#ifndef SOLOIST_ENGINE_ENGINE_H_
#define SOLOIST_ENGINE_ENGINE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/step.h"

namespace soloist {

// Derived once the weights are loaded; never changes (a new plan makes a new Engine).
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
  std::vector<int> expert_rank;  // [num_experts] rank that owns the expert, in every layer
};

enum class RankState { kStarting, kReady, kFailed };

struct RankStatus {
  int rank = 0;
  RankState state = RankState::kStarting;
  int64_t last_step = 0;      // last step that it has finished
  int64_t last_step_ns = 0;   // when, Clock::NowNs; 0: never
  int64_t busy_since_ns = 0;  // start of the step in work; 0: idle
  std::string message;        // why it failed
};

// Submit and Await are for one thread (the step loop). Info and Ranks are for any.
class Engine {
 public:
  static constexpr int kMaxInFlight = 2;

  virtual ~Engine() = default;
  virtual const EngineInfo& Info() const = 0;

  // At most kMaxInFlight plans submitted and not awaited (FAILED_PRECONDITION beyond). Plans are validated:
  // INVALID_ARGUMENT, and then nothing was submitted. plan.step must be one more than the last. References to "the
  // previous result" mean the step before.
  virtual absl::Status Submit(StepPlan plan) = 0;
  // The oldest result, waiting for it. An error is final for this engine: all later calls return it.
  virtual absl::StatusOr<StepResult> Await() = 0;

  virtual std::vector<RankStatus> Ranks() const = 0;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_ENGINE_H_
