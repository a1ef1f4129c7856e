// Log-probabilities of a prompt's own tokens: the rows that a plan has for them, and what becomes of the results.
//
// Row p of a prompt has token p + 1 as its target. The first output that is not finished computes the rows for all, in
// order and each once; the others wait until all are committed. What lies before the first row that is not planned may
// be computed again without logits (preemption, a lost home) or come from the prefix cache; what lies behind it may
// not. When plans are lost, so are their rows: those are planned again.
#include <algorithm>

#include "base/check.h"
#include "scheduler/scheduler.h"

namespace soloist {

// The first position that has a logit row when it is planned; so has each behind it.
int32_t Scheduler::FirstLogitRow(const Sequence& s) {
  const RequestState& owner = *s.owner;
  return owner.scores_planned < owner.num_scores ? owner.scores_planned : s.total() - 1;
}

int32_t Scheduler::PlannedLogitRows(const Sequence& s) {
  return std::clamp(s.computed + s.planned - FirstLogitRow(s), 0, s.planned);
}

// Tokens that it gets of what the step has left.
int32_t Scheduler::Chunk(const Home& home, const Sequence& s) {
  return std::min({home.budget, Plannable(s), FirstLogitRow(s) - s.computed + home.logit_rows});
}

bool Scheduler::WaitsForScores(const Sequence& s) {
  const RequestState& owner = *s.owner;
  if (owner.scores_committed == owner.num_scores) return false;
  if (owner.max_tokens == 0 && owner.scores_planned == owner.num_scores) return true;
  const auto scorer = std::ranges::find_if(
      owner.outputs, [](const Sequence& output) { return output.state != SequenceState::kFinished; });
  return &*scorer != &s;
}

// Of the rows that are planned for the sequence, the last ones in the plan's token_ids.
void Scheduler::PackScores(Home& home, Sequence& s, std::vector<Row>& rows) {
  RequestState& owner = *s.owner;
  HomePlanParts& parts = home.parts;
  const int32_t end = s.computed + s.planned, last = std::min(end, owner.num_scores);
  for (int32_t& p = owner.scores_planned; p < last; ++p) {
    parts.targets.resize(parts.logit_rows.size(), -1);
    parts.targets.push_back(s.tokens[p + 1]);
    parts.logit_rows.push_back(static_cast<int32_t>(parts.token_ids.size()) - (end - p));
    parts.sampling.push_back({.position = p + 1,
                              .num_top_logprobs = owner.request->sampling.num_prompt_logprobs,
                              .bias_begin = static_cast<int32_t>(parts.bias.size()),
                              .history_begin = static_cast<int32_t>(parts.history.size())});
    rows.push_back({.sequence = &s, .scores = true});
    ++owner.rows_in_flight;
    s.sampled_since_admission = true;
  }
}

void Scheduler::CommitScore(RequestState& owner, const HomeResult& result, int32_t row) {
  if (owner.unfinished == 0) return;
  const int32_t first = ++owner.scores_committed;
  auto* event = events_.empty() ? nullptr : std::get_if<PromptLogprobs>(&events_.back().what);
  if (event == nullptr || events_.back().request != owner.request) {
    PromptLogprobs begun;
    begun.first = first;
    begun.num_top = owner.request->sampling.num_prompt_logprobs;
    events_.push_back({owner.request, std::move(begun), false});
    event = &std::get<PromptLogprobs>(events_.back().what);
  }
  event->tokens.push_back(result.tokens[row]);
  event->logprobs.push_back(result.logprobs[row]);
  if (event->num_top > 0 && !result.top_tokens.empty()) {
    const auto at = static_cast<std::ptrdiff_t>(row) * kMaxTopLogprobs;
    const auto append = [&](auto& to, const auto& from) {
      to.insert(to.end(), from.begin() + at, from.begin() + at + event->num_top);
    };
    append(event->top_tokens, result.top_tokens);
    append(event->top_logprobs, result.top_logprobs);
  }
  if (first == owner.num_scores) StartOutputs(owner);
}

// From here on the outputs sample; or end, if that was all. May free `owner`.
void Scheduler::StartOutputs(RequestState& owner) {
  for (int32_t i = 0, left = owner.unfinished; left > 0; ++i) {
    Sequence& s = owner.outputs[i];
    if (s.state == SequenceState::kFinished) continue;
    --left;
    if (owner.max_tokens == 0) {
      Finish(s, FinishReason::kLength, -1, absl::OkStatus());
    } else {
      StartConstraint(s);
    }
  }
}

}  // namespace soloist
