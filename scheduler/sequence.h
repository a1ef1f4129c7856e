// Sequence: one output of a request, from admission to its last token. Owned by the Scheduler alone; with its request
// it is all that is needed to compute it again elsewhere.
#ifndef SOLOIST_SCHEDULER_SEQUENCE_H_
#define SOLOIST_SCHEDULER_SEQUENCE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"
#include "engine/step.h"
#include "scheduler/block_pool.h"
#include "scheduler/request.h"
#include "scheduler/token_constraint.h"

namespace soloist {

struct RequestState;

enum class SequenceState {
  kWaiting,  // holds no blocks; new or preempted
  kRunning,  // holds the blocks of all its known tokens
  kFinished
};

struct Sequence {
  RequestState* owner = nullptr;
  int32_t output_index = 0;
  SequenceState state = SequenceState::kWaiting;
  int32_t home = 0;

  std::vector<int32_t> tokens;  // prompt, then the committed output
  int32_t num_prompt = 0;
  int32_t pending = 0;       // tokens sampled by submitted plans and not yet committed: 0 or 1 between two steps
  int32_t pending_row = -1;  // the latest pending token's row in the result of pending_step
  int64_t pending_step = 0;

  std::vector<int32_t> blocks;  // KV of position p: blocks[p / block_size]
  int32_t computed = 0;         // leading tokens whose KV is in the blocks once the submitted plans have run
  int32_t registered = 0;       // leading blocks known to the prefix index, or passed over as duplicates
  ChainId chain = 0;            // after them

  // What each of the last plans found, to go back to when it is lost. Plan n's: marks[n % kMaxInFlight].
  struct Mark {
    int64_t step = 0;
    int32_t computed = 0;
    int32_t registered = 0;
    ChainId chain = 0;
  };
  std::array<Mark, Engine::kMaxInFlight> marks;
  int64_t admitted_step = 0;  // the plan of its last admission

  // Distinct tokens for the penalties; empty unless one is active.
  std::vector<TokenHistory> history;
  std::unordered_map<int32_t, int32_t> history_index;  // token -> entry

  // See constrain.cc.
  std::unique_ptr<TokenConstraint> constraint;  // null: none
  const NextTokens* next = nullptr;             // the constraint's; null while it is being computed

  // Of the step being planned.
  int32_t planned = 0;
  bool sampled_since_admission = false;
  int64_t preempted_turn = 0;
  int32_t blocked_need = 0;  // available blocks without which another try at admission is pointless

  int64_t to_serve = 0;  // its share of the home's load
  RequestTimes times;
  int32_t cached_prompt_tokens = 0;
  int32_t num_preemptions = 0;
  bool admitted_once = false;

  int32_t total() const { return static_cast<int32_t>(tokens.size()) + pending; }
  int32_t remaining() const { return total() - computed; }
  int32_t num_sampled() const { return total() - num_prompt; }
};

struct RequestState {
  std::shared_ptr<const Request> request;  // released with the last OnFinish
  int64_t arrival = 0;                     // order of arrival
  int32_t priority = 0;
  int32_t max_tokens = 0;
  int32_t unfinished = 0;      // outputs
  int32_t rows_in_flight = 0;  // rows of submitted plans that point to `outputs`
  bool admitted = false;       // an output has run
  // See score.cc. Leading rows of the prompt that are scored; of those, in submitted plans; of those, committed.
  int32_t num_scores = 0;
  int32_t scores_planned = 0;
  int32_t scores_committed = 0;
  bool track_history = false;
  bool history_of_prompt = false;
  std::vector<LogitBias> bias;    // the request's
  std::vector<int32_t> stops;     // tokens that end an output
  std::vector<Sequence> outputs;  // [num_outputs], never resized
};

// Who goes first: strict priority, then order of arrival.
struct RanksBefore {
  bool operator()(const Sequence* a, const Sequence* b) const {
    return std::tie(a->owner->priority, a->owner->arrival, a->output_index) <
           std::tie(b->owner->priority, b->owner->arrival, b->output_index);
  }
};

}  // namespace soloist

#endif  // SOLOIST_SCHEDULER_SEQUENCE_H_
