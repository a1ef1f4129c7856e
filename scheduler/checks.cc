// What must hold of a result that is committed, and of the scheduler between two steps.
#include <algorithm>
#include <vector>

#include "base/status.h"
#include "scheduler/scheduler.h"

namespace soloist {

absl::Status Scheduler::CheckResult(const StepResult& result) const {
  if (in_flight_.empty() || in_flight_.front().step != result.step) {
    return Internal("result of step {}, expected {}", result.step, in_flight_.empty() ? -1 : in_flight_.front().step);
  }
  if (result.homes.size() != homes_.size()) {
    return Internal("step {}: results of {} homes, expected {}", result.step, result.homes.size(), homes_.size());
  }
  for (size_t h = 0; h < homes_.size(); ++h) {
    const HomeResult& r = result.homes[h];
    const size_t rows = in_flight_.front().rows[h].size();
    if (r.tokens.size() != rows || r.logprobs.size() != rows) {
      return Internal("step {}: home {} has {} tokens and {} log-probabilities for {} rows", result.step, h,
                      r.tokens.size(), r.logprobs.size(), rows);
    }
    if (!r.top_tokens.empty() &&
        (r.top_tokens.size() != rows * kMaxTopLogprobs || r.top_logprobs.size() != rows * kMaxTopLogprobs)) {
      return Internal("step {}: home {} has {} top tokens for {} rows", result.step, h, r.top_tokens.size(), rows);
    }
    if (!r.raw_logits.empty() && r.raw_logits.size() != rows * static_cast<size_t>(limits_.vocab_size)) {
      return Internal("step {}: home {} has {} raw logits for {} rows", result.step, h, r.raw_logits.size(), rows);
    }
    for (size_t i = 0; i < rows; ++i) {
      if (r.tokens[i] >= 0 && r.tokens[i] < limits_.vocab_size) continue;
      return Internal("step {}: home {} row {} sampled token {}, vocabulary {}", result.step, h, i, r.tokens[i],
                      limits_.vocab_size);
    }
  }
  return absl::OkStatus();
}

absl::Status Scheduler::CheckIntegrity(bool idle) const {
  if (idle && (!requests_.empty() || !retired_.empty() || !in_flight_.empty() || !awaiting_mask_.empty())) {
    return Internal("scheduler: idle with {} requests, {} retired, {} plans in flight, {} masks awaited",
                    requests_.size(), retired_.size(), in_flight_.size(), awaiting_mask_.size());
  }
  int64_t rows = 0, counted = 0;
  for (const InFlight& flight : in_flight_) {
    for (const auto& home : flight.rows) rows += std::ssize(home);
  }
  for (const auto& [id, state] : requests_) counted += state->rows_in_flight;
  for (const auto& state : retired_) counted += state->rows_in_flight;
  if (rows != counted) return Internal("scheduler: {} rows in flight, requests count {}", rows, counted);
  for (size_t h = 0; h < homes_.size(); ++h) {
    const Home& home = homes_[h];
    std::vector<const std::vector<int32_t>*> tables;
    int64_t to_serve = 0;
    for (const Sequence* s : home.running) {
      if (s->state != SequenceState::kRunning) return Internal("scheduler: home {} runs what is not running", h);
      if (s->computed > static_cast<int64_t>(s->blocks.size()) * limits_.block_size) {
        return Internal("scheduler: home {}: {} tokens in {} blocks", h, s->computed, s->blocks.size());
      }
      if (s->computed > s->total() || s->registered * limits_.block_size > s->computed) {
        return Internal("scheduler: home {}: {} of {} tokens computed, {} blocks registered", h, s->computed,
                        s->total(), s->registered);
      }
      const RequestState& owner = *s->owner;
      if (owner.scores_planned < owner.num_scores && s->computed > owner.scores_planned) {
        return Internal("scheduler: home {}: {} tokens computed, but only {} of {} rows of the prompt scored", h,
                        s->computed, owner.scores_planned, owner.num_scores);
      }
      tables.push_back(&s->blocks);
      to_serve += s->to_serve;
    }
    for (const Sequence* s : home.waiting) {
      if (s->state != SequenceState::kWaiting || !s->blocks.empty()) {
        return Internal("scheduler: home {}: a waiting sequence holds {} blocks", h, s->blocks.size());
      }
      to_serve += s->to_serve;
    }
    if (to_serve != home.to_serve)
      return Internal("scheduler: home {} load {}, counted {}", h, home.to_serve, to_serve);
    if (!std::ranges::is_sorted(home.running, RanksBefore())) return Internal("scheduler: home {} not sorted", h);
    if (!home.usable && (!home.running.empty() || !home.waiting.empty() || home.pool.cached() > 0)) {
      return Internal("scheduler: home {} has no rank, but {} running and {} waiting sequences and {} known blocks", h,
                      home.running.size(), home.waiting.size(), home.pool.cached());
    }
    if (idle && home.pool.used() != 0) return Internal("scheduler: home {}: {} blocks leaked", h, home.pool.used());
    RETURN_IF_ERROR(home.pool.CheckIntegrity(tables));
  }
  return absl::OkStatus();
}

}  // namespace soloist
