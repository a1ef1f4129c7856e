// What becomes of everything when the engine has lost the plans in flight, and perhaps some homes' KV caches.
//
// On a home that was kept, slots that lost plans were to write hold anything; all others hold what they held. What the
// first lost plan found had been written by then, so the sequences that it ran or admitted go back to that and write
// their slots again. One that the plan after it admitted may stand on shared blocks that the first was to fill: it
// waits again. Blocks that are known because a lost plan was to fill them are known no more, whoever holds them now.
//
// Which homes there are may have changed: those that wait are dealt out anew, so that nobody waits for a home that is
// gone, and a home that is back does not stand idle beside long queues. All outputs of a request keep one home.
#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "base/status.h"
#include "scheduler/scheduler.h"

namespace soloist {

absl::Status Scheduler::Recover(const Recovery& recovery) {
  if (recovery.home_kept.size() != homes_.size() || recovery.home_usable.size() != homes_.size() ||
      recovery.next_step < 1) {
    return Internal("a recovery of {} and {} homes that goes on at step {}; expected {} homes and at least step 1",
                    recovery.home_kept.size(), recovery.home_usable.size(), recovery.next_step, homes_.size());
  }
  if (std::ranges::find(recovery.home_usable, true) == recovery.home_usable.end()) {
    return Internal("a recovery without a home that is usable");
  }
  const int64_t first_lost = in_flight_.empty() ? next_step_ : in_flight_.front().step;
  for (size_t h = 0; h < homes_.size(); ++h) {
    Home& home = homes_[h];
    home.usable = recovery.home_usable[h];
    if (recovery.home_kept[h] && home.usable) {
      GoBack(home, first_lost);
      for (const InFlight& flight : in_flight_) home.pool.Unregister(flight.registered[h]);
    } else {
      LoseHome(home);
    }
    home.previous_rows = 0;
  }
  retired_.clear();
  for (const auto& [id, state] : requests_) {
    state->rows_in_flight = 0;
    state->scores_planned = state->scores_committed;
    for (Sequence& s : state->outputs) {
      s.pending = 0;
      // The numbers of steps may come again.
      s.marks = {};
      s.admitted_step = 0;
    }
  }
  for (; !in_flight_.empty(); in_flight_.pop_front()) Recycle(std::move(in_flight_.front()));
  ChooseHomesAgain();
  next_step_ = recovery.next_step;
  ++totals_.recoveries;
  return absl::OkStatus();
}

void Scheduler::GoBack(Home& home, int64_t first_lost) {
  const std::vector<Sequence*> running = home.running;
  for (Sequence* s : running) {
    if (s->admitted_step > first_lost) {
      Withdraw(home, *s);
      ServeAgain(*s);
      continue;
    }
    for (int64_t step = first_lost; step < next_step_; ++step) {
      const Sequence::Mark& mark = s->marks[step % Engine::kMaxInFlight];
      if (mark.step != step) continue;
      s->computed = mark.computed;
      s->registered = mark.registered;
      s->chain = mark.chain;
      ServeAgain(*s);
      break;
    }
  }
}

void Scheduler::LoseHome(Home& home) {
  home.pool.Clear();
  const std::vector<Sequence*> running = home.running;
  totals_.requeued_sequences += std::ssize(running);
  for (Sequence* s : running) {
    s->blocks.clear();
    Withdraw(home, *s);
    ServeAgain(*s);
  }
}

void Scheduler::ChooseHomesAgain() {
  std::vector<RequestState*> waiting;
  for (const auto& [id, state] : requests_) {
    const auto runs = [](const Sequence& s) { return s.state == SequenceState::kRunning; };
    if (std::ranges::none_of(state->outputs, runs)) waiting.push_back(state.get());
  }
  std::ranges::sort(waiting, {}, [](const RequestState* r) { return std::tie(r->priority, r->arrival); });
  const auto for_outputs = [](RequestState& request, const auto& act) {
    for (Sequence& s : request.outputs) {
      if (s.state == SequenceState::kWaiting) act(s);
    }
  };
  for (RequestState* request : waiting) for_outputs(*request, [this](Sequence& s) { Leave(s); });
  for (RequestState* request : waiting) {
    const int32_t home = ChooseHome(*request->request);
    for_outputs(*request, [this, home](Sequence& s) { WaitAt(home, s); });
  }
}

// Its share of the load is again all that it has not computed.
void Scheduler::ServeAgain(Sequence& s) {
  const int64_t left = s.num_prompt + s.owner->max_tokens - s.computed;
  HomeOf(s).to_serve += left - s.to_serve;
  s.to_serve = left;
}

}  // namespace soloist
