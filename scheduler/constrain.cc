// Outputs under a constraint: when they may be planned, and what they do with a token.
//
// The mask of a row depends on the token before it, and is computed elsewhere once that token is committed. So such an
// output has no row in the plan that is submitted before its last one is known: it samples in every other step at
// most. Its mask stays until the token is committed, whatever happens to the plans meanwhile (preemption, a lost rank).
#include <algorithm>
#include <cmath>

#include "base/status.h"
#include "scheduler/scheduler.h"

namespace soloist {

void Scheduler::StartConstraint(Sequence& s) {
  if (s.owner->request->constraint == nullptr) return;
  s.constraint = s.owner->request->constraint->Start(mask_ready_);
  awaiting_mask_.push_back(&s);
}

bool Scheduler::AwaitsMasks() {
  TakeMasks();
  return !awaiting_mask_.empty();
}

void Scheduler::TakeMasks() {
  std::vector<Sequence*> ended;
  std::erase_if(awaiting_mask_, [&ended](Sequence* s) {
    s->next = s->constraint->Poll();
    if (s->next != nullptr && (s->next->complete || !s->next->status.ok())) ended.push_back(s);
    return s->next != nullptr;
  });
  for (Sequence* s : ended) {
    if (s->next->status.ok()) {
      Finish(*s, FinishReason::kStop, -1, absl::OkStatus());
    } else {
      const absl::Status error = s->next->status;
      Finish(*s, FinishReason::kError, -1, error);
    }
  }
}

int32_t Scheduler::Plannable(const Sequence& s) {
  const RequestState& owner = *s.owner;
  if (owner.max_tokens == 0) return owner.scores_planned < owner.num_scores ? owner.num_scores - s.computed : 0;
  if (s.num_sampled() >= owner.max_tokens) return 0;
  const bool may_sample = owner.request->constraint == nullptr || (s.pending == 0 && s.next != nullptr);
  return may_sample ? s.remaining() : s.remaining() - 1;
}

// What is sampled where nothing is left may be any token.
bool Scheduler::Allows(const Sequence& s, int32_t token) {
  if (!AllowsToken(s.next->mask, token)) return false;
  const RequestState& owner = *s.owner;
  const bool banned =
      std::ranges::any_of(owner.bias, [token](const LogitBias& b) { return b.token == token && b.bias == -HUGE_VALF; });
  const bool too_early = s.num_sampled() < owner.request->sampling.min_tokens &&
                         std::ranges::find(owner.stops, token) != owner.stops.end();
  return !banned && !too_early;
}

void Scheduler::FinishWithoutToken(Sequence& s) {
  const int32_t made = s.num_sampled();
  Finish(s, FinishReason::kError, -1,
         InvalidArgument("after {} tokens, logit_bias and min_tokens ban every token that the output's form allows",
                         made));
}

void Scheduler::Advance(Sequence& s, int32_t token) {
  s.next = nullptr;
  s.constraint->Advance(token);
  awaiting_mask_.push_back(&s);
}

void Scheduler::PackMask(Home& home, const Sequence& s) {
  if (s.constraint == nullptr) return;
  home.parts.mask_rows.push_back(static_cast<int32_t>(home.parts.sampling.size()) - 1);
  home.parts.masks.insert(home.parts.masks.end(), s.next->mask.begin(), s.next->mask.end());
}

}  // namespace soloist
