// Scheduler: continuous batching as a policy, with no thread and no clock. Its caller (the step loop, a test) does
//   Add / Cancel ...; plan = Schedule(); engine.Submit(plan); ... result = engine.Await(); Commit(result); TakeEvents()
// with at most two plans between Schedule and Commit.
//
// Per home and step: every sequence that needs one token gets its row first; what the token budget leaves goes to
// prefill chunks, in order of (priority, arrival), running and waiting sequences alike; the step's logit rows bound the
// chunks of prompts that are scored in the same way. A waiting sequence is admitted when the blocks of all its known
// tokens are there, so only decodes ever need more; when those lack one, the running sequence that ranks last is
// preempted: it gives up its blocks and waits as a prompt of all its tokens so far. A waiting sequence makes way for
// itself only at the cost of strictly larger priority numbers. Nobody passes a waiting sequence that does not fit, so
// it cannot starve.
//
// A home's engine runs plans in order, therefore blocks given up while a plan that touches them is in flight may be
// used by the next plan at once, and blocks that a submitted plan fills may be shared by the next one.
//
// When the engine has lost the plans in flight, Recover takes back what was done on their strength: see recover.cc.
#ifndef SOLOIST_SCHEDULER_SCHEDULER_H_
#define SOLOIST_SCHEDULER_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "engine/engine.h"
#include "engine/micro_batches.h"
#include "scheduler/block_pool.h"
#include "scheduler/request.h"
#include "scheduler/sequence.h"
#include "scheduler/step_loop.h"

namespace soloist {

// For one sink, in order.
struct OutputEvent {
  std::shared_ptr<const Request> request;
  std::variant<TokenEvent, FinishEvent, PromptLogprobs> what;
  bool last = false;  // the last event of the request
};

// Whether this engine can ever run the request; INVALID_ARGUMENT says what is wrong, with value and limit. Any thread.
absl::Status CheckRequest(const Request& request, const PlanLimits& limits);

// One thread at a time. Times are what the caller says.
class Scheduler {
 public:
  // The first plan is number first_step. `mask_ready` is called on any thread when AwaitsMasks may have changed.
  Scheduler(const SchedulerOptions& options, const EngineInfo& info, int64_t first_step = 1,
            std::function<void()> mask_ready = {});
  ~Scheduler();

  // `request` has passed CheckRequest and its id is not in use.
  void Add(Request request, int64_t now_ns);
  // output_index -1: all. Unknown ids and finished outputs are ignored. Blocks are given up at once.
  void Cancel(const std::string& request_id, int32_t output_index, FinishReason reason);
  // Ends all outputs. With `lost`, also forgets the plans in flight: their results will never be committed.
  void FinishAll(FinishReason reason, const absl::Status& error, bool lost);

  // The next plan, or nothing if no sequence can do anything before the plan in flight is committed. O(running).
  std::optional<StepPlan> Schedule(int64_t now_ns);
  // An output under a constraint cannot be planned yet, for want of the mask of its next token.
  bool AwaitsMasks();
  // The result of the oldest plan in flight. INTERNAL if it is not of the shape that was asked for.
  absl::Status Commit(const StepResult& result, int64_t now_ns);
  // Events since the last call. Whoever delivers them calls Cancel if a sink refuses.
  std::vector<OutputEvent> TakeEvents();
  // All plans in flight are lost. On homes that were kept, sequences go on behind what was committed; the others wait
  // again as prompts of all their tokens. Requests that run nowhere choose among the homes that are usable now. No
  // token is lost or made twice: rows that were lost are planned again, and sample the same tokens. INTERNAL if
  // `recovery` is not of this engine's shape.
  absl::Status Recover(const Recovery& recovery);

  int32_t plans_in_flight() const { return static_cast<int32_t>(in_flight_.size()); }
  int64_t last_step_device_ns() const { return totals_.last_step_device_ns; }
  int32_t num_requests() const { return static_cast<int32_t>(requests_.size()); }
  // All but schedule_ns.
  LoadSnapshot Load() const;
  // Pools, tables, lists, counters. INTERNAL says what is wrong. `idle`: nothing may be left.
  absl::Status CheckIntegrity(bool idle) const;

 private:
  struct Home {
    explicit Home(const PlanLimits& limits, bool prefix_cache)
        : pool(limits.num_blocks, limits.block_size, prefix_cache) {}
    BlockPool pool;
    std::vector<Sequence*> running;            // sorted by rank
    std::set<Sequence*, RanksBefore> waiting;  // the same
    int64_t to_serve = 0;                      // tokens, of running and waiting
    int32_t budget = 0;                        // tokens left in the step being planned
    int32_t logit_rows = 0;                    // the same
    int32_t previous_rows = 0;
    bool usable = true;    // has a rank; else it is empty
    bool blocked = false;  // its first waiting sequence found no room in the last turn
    // Of the plan being packed; kept for their memory.
    HomePlanParts parts;
    std::vector<Sequence*> planned;
  };
  struct Row {
    Sequence* sequence = nullptr;
    bool scores = false;  // a token of the prompt; else it samples
  };
  struct InFlight {
    int64_t step = 0;
    std::vector<std::vector<Row>> rows;            // [homes][logit rows]
    std::vector<std::vector<int32_t>> registered;  // [homes] blocks that are known because this plan fills them
  };

  // plan_home.cc
  void Rebalance();
  void PlanHome(Home& home, int64_t now_ns);
  bool Admit(Home& home, Sequence& sequence, int64_t now_ns);
  int32_t Reserve(const Home& home) const;
  bool MustWait(const Sequence& sequence) const;
  void Preempt(Home& home, Sequence& sequence);
  void Withdraw(Home& home, Sequence& sequence);
  // Of one that waits: out of its home's list and load, and into another's.
  void Leave(Sequence& sequence);
  void WaitAt(int32_t home, Sequence& sequence);
  void PreemptForTest();
  void PackHome(Home& home, std::vector<Row>& rows);
  void PackSampling(Home& home, Sequence& sequence);
  // `registered`: of the latest plan in flight; null if none is.
  void RegisterBlocks(Home& home, Sequence& sequence, std::vector<int32_t>* registered);

  // load.cc
  void CountTimes(int32_t home, const HomeResult& result);

  // constrain.cc
  void StartConstraint(Sequence& sequence);
  // Takes note of the masks that are ready, and ends the outputs that are complete.
  void TakeMasks();
  // Tokens of the sequence that may be in the next plan, if there is room.
  static int32_t Plannable(const Sequence& sequence);
  static bool Allows(const Sequence& sequence, int32_t token);
  void FinishWithoutToken(Sequence& sequence);
  void Advance(Sequence& sequence, int32_t token);
  static void PackMask(Home& home, const Sequence& sequence);

  // score.cc
  static int32_t FirstLogitRow(const Sequence& sequence);
  static int32_t PlannedLogitRows(const Sequence& sequence);
  static int32_t Chunk(const Home& home, const Sequence& sequence);
  static bool WaitsForScores(const Sequence& sequence);
  static void PackScores(Home& home, Sequence& sequence, std::vector<Row>& rows);
  void CommitScore(RequestState& owner, const HomeResult& result, int32_t row);
  void StartOutputs(RequestState& owner);

  // recover.cc
  void LoseHome(Home& home);
  void ChooseHomesAgain();
  void GoBack(Home& home, int64_t first_lost);
  void ServeAgain(Sequence& sequence);

  Home& HomeOf(const Sequence& sequence) { return homes_[sequence.home]; }
  int32_t ChooseHome(const Request& request) const;
  absl::Status CheckResult(const StepResult& result) const;
  void CommitToken(Sequence& sequence, const HomeResult& result, int32_t row, int64_t now_ns);
  void Finish(Sequence& sequence, FinishReason reason, int32_t stop_token, const absl::Status& error);
  void Unqueue(Home& home, Sequence& sequence);
  void Serve(Sequence& sequence, int64_t tokens);
  void Recycle(InFlight flight);

  const SchedulerOptions options_;
  const PlanLimits limits_;
  const MicroBatchPolicy micro_batches_;
  const std::function<void()> mask_ready_;
  int32_t max_running_ = 0;  // per home
  int32_t token_budget_ = 0;
  std::vector<Home> homes_;
  std::unordered_map<std::string, std::unique_ptr<RequestState>> requests_;
  std::vector<std::unique_ptr<RequestState>> retired_;  // finished, with rows in flight
  std::deque<InFlight> in_flight_;
  std::vector<InFlight> spare_;           // empty, kept for their memory
  std::vector<Sequence*> awaiting_mask_;  // whose constraint computes what may come next
  std::vector<OutputEvent> events_;
  int64_t next_step_;
  int64_t turn_ = 0;  // calls of Schedule
  int64_t next_arrival_ = 0;
  LoadSnapshot totals_;  // counters only
};

}  // namespace soloist

#endif  // SOLOIST_SCHEDULER_SCHEDULER_H_
