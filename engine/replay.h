// ReplayEngine: gives the steps of another engine less dispatch room than the worst case needs, and runs again what has
// overflowed. Whoever uses it sees good results only, the same bits as with room for all.
//
// A step whose result says that rows found no room is void, and so are those submitted after it. They are awaited, and
// submitted again in order with room for all. By then the device has lost the result that the first of them refers to:
// such tokens are put into its plan as they were awaited. All keys and values that the void steps wrote are written
// again. What the void step reads must still be there, so a plan that overwrites any of it (blocks of a sequence that
// was preempted meanwhile) is not submitted before the step's result is known.
//
// The other engine's steps have numbers of their own, one more for each step that is run again.
#ifndef SOLOIST_ENGINE_REPLAY_H_
#define SOLOIST_ENGINE_REPLAY_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "engine/dispatch_room.h"
#include "engine/engine.h"

namespace soloist {

// `plan` with every reference to the previous result replaced by its token, previous_tokens[row].
HomePlan WithoutReferences(const HomePlan& plan, std::span<const int32_t> previous_tokens);

// Whether `next` writes a key or value that `plan` reads. `read`: scratch, at least a word for every block of the home,
// zero; left so.
bool OverwritesReadsOf(const HomePlan& next, const HomePlan& plan, int32_t block_size, std::vector<int32_t>& read);

class ReplayEngine final : public Engine {
 public:
  // `engine` is ready, and has done no step yet.
  ReplayEngine(std::unique_ptr<Engine> engine, const DispatchRoomOptions& options);

  const EngineInfo& Info() const override { return engine_->Info(); }
  // May wait for the step before: see above.
  absl::Status Submit(StepPlan plan) override;
  absl::StatusOr<StepResult> Await() override;
  absl::StatusOr<Recovery> Recover(absl::Duration timeout) override;
  std::vector<RankStatus> Ranks() const override;

 private:
  // Submitted to engine_, result not known.
  struct Flight {
    int64_t step = 0;
    int32_t room = 0;
    int32_t max_home_tokens = 0;
    int32_t replays = 0;
    StepPlan plan;  // empty unless it may have to be run again
  };

  absl::Status SubmitInner(StepPlan plan, int32_t room);
  bool Overwrites(const StepPlan& next, const StepPlan& plan);
  // Awaits the oldest flight until its result is good.
  absl::Status Settle();
  absl::Status Replay();

  const std::unique_ptr<Engine> engine_;
  DispatchRoom room_;
  std::deque<Flight> flights_;
  std::deque<StepResult> settled_;                 // good, not yet awaited by the caller
  std::vector<std::vector<int32_t>> last_tokens_;  // [num_homes] of the last result that was good
  std::vector<int32_t> read_;                      // scratch of OverwritesReadsOf
  int64_t last_step_ = 0;
  std::atomic<int64_t> extra_steps_ = 0;  // engine_'s step number less ours
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_REPLAY_H_
