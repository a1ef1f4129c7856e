#include "scheduler/scheduler.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace soloist {
namespace {

// How far a home's load may be above the least loaded one's, in steps of prefill and on top of what the hit saves,
// before a cached prefix no longer draws requests there: else one common system prompt would put all load on one home.
constexpr int64_t kHitDetourSteps = 8;

void CountToken(Sequence& s, int32_t token, int32_t output_count) {
  const auto [it, inserted] = s.history_index.emplace(token, static_cast<int32_t>(s.history.size()));
  if (inserted) s.history.push_back({token, 0});
  s.history[it->second].output_count += output_count;
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options, const EngineInfo& info, int64_t first_step)
    : options_(options), info_(info), limits_(info.limits), next_step_(first_step) {
  token_budget_ = std::max(1, std::min(options.max_tokens_per_step, limits_.max_tokens));
  // One token each, so that a decode never waits.
  max_running_ = std::max(1, std::min({options.max_sequences, limits_.max_sequences, token_budget_}));
  homes_.reserve(info.num_homes);
  for (int32_t h = 0; h < info.num_homes; ++h) homes_.emplace_back(limits_, options.prefix_cache);
  totals_.expert_tokens.resize(static_cast<size_t>(info.num_layers) * info.num_experts);
}

Scheduler::~Scheduler() = default;

int32_t Scheduler::ChooseHome(const Request& request) const {
  const int32_t max_blocks = static_cast<int32_t>(request.prompt.size() - 1) / limits_.block_size;
  int64_t least = homes_[0].to_serve;
  for (const Home& home : homes_) least = std::min(least, home.to_serve);
  int32_t best = -1;
  int64_t best_hit = 0;
  for (int32_t h = 0; h < static_cast<int32_t>(homes_.size()); ++h) {
    const Home& home = homes_[h];
    const int64_t hit = static_cast<int64_t>(home.pool.CountCached(request.prompt, request.cache_salt, max_blocks)) *
                        limits_.block_size;
    if (home.to_serve > least + hit + kHitDetourSteps * token_budget_) continue;
    if (best < 0 || hit > best_hit || (hit == best_hit && home.to_serve < homes_[best].to_serve)) {
      best = h;
      best_hit = hit;
    }
  }
  return best;
}

void Scheduler::Add(Request request, int64_t now_ns) {
  auto state = std::make_unique<RequestState>();
  const SamplingParams& p = request.sampling;
  state->arrival = next_arrival_++;
  state->priority = request.priority;
  state->max_tokens = p.max_tokens;
  state->unfinished = request.num_outputs;
  state->history_of_prompt = p.repetition_penalty != 1;
  state->track_history = p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0;
  for (const auto& [token, bias] : p.logit_bias) {
    state->bias.push_back({token, bias <= -100 ? -HUGE_VALF : bias});  // OpenAI: -100 is a ban
  }
  state->stops = p.stop_token_ids;
  for (const int32_t token : options_.eos_token_ids) {
    if (!p.ignore_eos && token >= 0 && token < limits_.vocab_size) state->stops.push_back(token);
  }
  const int32_t home = ChooseHome(request);
  const std::string id = request.id;
  state->request = std::make_shared<const Request>(std::move(request));
  const std::vector<int32_t>& prompt = state->request->prompt;
  state->outputs.resize(state->unfinished);
  for (int32_t i = 0; i < state->unfinished; ++i) {
    Sequence& s = state->outputs[i];
    s.owner = state.get();
    s.output_index = i;
    s.home = home;
    s.tokens = prompt;
    s.num_prompt = static_cast<int32_t>(prompt.size());
    s.times.arrival_ns = now_ns;
    s.to_serve = s.num_prompt + state->max_tokens;
    homes_[home].to_serve += s.to_serve;
    if (state->history_of_prompt) {
      for (const int32_t token : prompt) CountToken(s, token, 0);
    }
    homes_[home].waiting.insert(&s);
  }
  ++totals_.waiting_requests;
  CHECK(requests_.emplace(id, std::move(state)).second);
}

void Scheduler::Cancel(const std::string& request_id, int32_t output_index, FinishReason reason) {
  const auto it = requests_.find(request_id);
  if (it == requests_.end()) return;
  std::vector<Sequence>& outputs = it->second->outputs;
  // The last Finish takes the request out of requests_, and may free it.
  for (int32_t i = 0, left = it->second->unfinished; i < static_cast<int32_t>(outputs.size()) && left > 0; ++i) {
    if (outputs[i].state == SequenceState::kFinished) continue;
    --left;
    if (output_index != -1 && output_index != i) continue;
    Finish(outputs[i], reason, -1, absl::OkStatus());
    if (left == 0) return;
  }
}

void Scheduler::FinishAll(FinishReason reason, const absl::Status& error, bool lost) {
  std::vector<RequestState*> states;
  for (const auto& [id, state] : requests_) states.push_back(state.get());
  std::ranges::sort(states, {}, &RequestState::arrival);
  for (RequestState* state : states) {
    for (int32_t i = 0, left = state->unfinished; left > 0; ++i) {
      if (state->outputs[i].state == SequenceState::kFinished) continue;
      --left;
      Finish(state->outputs[i], reason, -1, error);
    }
  }
  if (!lost) return;
  in_flight_.clear();
  retired_.clear();
}

void Scheduler::Unqueue(Home& home, Sequence& s) {
  if (s.state == SequenceState::kRunning) std::erase(home.running, &s);
  if (s.state == SequenceState::kWaiting) home.waiting.erase(&s);
  home.pool.Release(s.blocks);
}

void Scheduler::Serve(Sequence& s, int64_t tokens) {
  tokens = std::min(tokens, s.to_serve);
  s.to_serve -= tokens;
  HomeOf(s).to_serve -= tokens;
}

void Scheduler::Finish(Sequence& s, FinishReason reason, int32_t stop_token, const absl::Status& error) {
  RequestState& owner = *s.owner;
  Unqueue(HomeOf(s), s);
  Serve(s, s.to_serve);
  s.state = SequenceState::kFinished;
  FinishEvent event;
  event.output_index = s.output_index;
  event.reason = reason;
  event.stop_token = stop_token;
  event.error = error;
  event.retryable = reason == FinishReason::kError;
  event.times = s.times;
  event.cached_prompt_tokens = s.cached_prompt_tokens;
  event.num_preemptions = s.num_preemptions;
  const bool last = --owner.unfinished == 0;
  events_.push_back({owner.request, std::move(event), last});
  if (!last) return;
  ++totals_.finished_requests;
  if (!owner.admitted) --totals_.waiting_requests;
  const auto it = requests_.find(owner.request->id);
  owner.request.reset();
  if (owner.rows_in_flight > 0) retired_.push_back(std::move(it->second));
  requests_.erase(it);
}

std::optional<StepPlan> Scheduler::Schedule(int64_t now_ns) {
  // Then a pending token is always in the result of the step before.
  CHECK_LE(plans_in_flight(), Engine::kMaxInFlight - 1);
  ++turn_;
  PreemptForTest();
  Rebalance();
  int32_t max_home_tokens = 0;
  for (Home& home : homes_) {
    PlanHome(home, now_ns);
    max_home_tokens = std::max(max_home_tokens, token_budget_ - home.budget);
  }
  if (max_home_tokens == 0) return std::nullopt;
  InFlight flight;
  flight.step = next_step_;
  if (!spare_rows_.empty()) {
    flight.rows = std::move(spare_rows_.back());
    spare_rows_.pop_back();
  }
  flight.rows.resize(homes_.size());
  StepPlan plan;
  plan.step = next_step_;
  plan.homes.reserve(homes_.size());
  for (size_t h = 0; h < homes_.size(); ++h) {
    Home& home = homes_[h];
    PackHome(home, flight.rows[h]);
    plan.homes.emplace_back(home.parts, next_step_, max_home_tokens, home.previous_rows);
    home.previous_rows = static_cast<int32_t>(flight.rows[h].size());
    for (Sequence* s : home.running) {
      if (s->planned > 0) RegisterBlocks(home, *s);
    }
  }
  in_flight_.push_back(std::move(flight));
  ++next_step_;
  return plan;
}

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

absl::Status Scheduler::Commit(const StepResult& result, int64_t now_ns) {
  RETURN_IF_ERROR(CheckResult(result));
  InFlight flight = std::move(in_flight_.front());
  in_flight_.pop_front();
  for (size_t h = 0; h < homes_.size(); ++h) {
    for (size_t r = 0; r < flight.rows[h].size(); ++r) {
      Sequence& s = *flight.rows[h][r];
      --s.pending;
      --s.owner->rows_in_flight;
      if (s.state != SequenceState::kFinished) CommitToken(s, result.homes[h], static_cast<int32_t>(r), now_ns);
    }
    flight.rows[h].clear();
    const std::vector<int64_t>& experts = result.homes[h].expert_rows;
    for (size_t i = 0; i < std::min(experts.size(), totals_.expert_tokens.size()); ++i) {
      totals_.expert_tokens[i] += experts[i];
    }
  }
  spare_rows_.push_back(std::move(flight.rows));
  std::erase_if(retired_, [](const auto& state) { return state->rows_in_flight == 0; });
  ++totals_.steps;
  totals_.last_step_device_ns = result.device_ns;
  return absl::OkStatus();
}

void Scheduler::CommitToken(Sequence& s, const HomeResult& result, int32_t row, int64_t now_ns) {
  const RequestState& owner = *s.owner;
  const SamplingParams& p = owner.request->sampling;
  const int32_t token = result.tokens[row];
  s.tokens.push_back(token);
  if (owner.track_history) CountToken(s, token, 1);
  if (s.times.first_token_ns == 0) s.times.first_token_ns = now_ns;
  s.times.last_token_ns = now_ns;
  ++totals_.generated_tokens;

  TokenEvent event;
  event.output_index = s.output_index;
  event.token = token;
  event.logprob = result.logprobs[row];
  for (int32_t i = 0; i < p.num_top_logprobs && !result.top_tokens.empty(); ++i) {
    const size_t at = static_cast<size_t>(row) * kMaxTopLogprobs + i;
    if (result.top_tokens[at] < 0) break;
    event.top_logprobs.emplace_back(result.top_tokens[at], result.top_logprobs[at]);
  }
  if (p.return_logits && !result.raw_logits.empty()) {
    const auto from = result.raw_logits.begin() + static_cast<int64_t>(row) * limits_.vocab_size;
    event.logits.assign(from, from + limits_.vocab_size);
  }
  events_.push_back({owner.request, std::move(event), false});

  if (s.state == SequenceState::kRunning) RegisterBlocks(HomeOf(s), s);
  const int32_t outputs = static_cast<int32_t>(s.tokens.size()) - s.num_prompt;
  // The ban keeps stop tokens away before min_tokens; if it left nothing else to sample, it does not end the output.
  if (outputs > p.min_tokens && std::ranges::find(owner.stops, token) != owner.stops.end()) {
    Finish(s, FinishReason::kStop, token, absl::OkStatus());
  } else if (outputs >= owner.max_tokens) {
    Finish(s, FinishReason::kLength, -1, absl::OkStatus());
  }
}

std::vector<OutputEvent> Scheduler::TakeEvents() { return std::exchange(events_, {}); }

LoadSnapshot Scheduler::Load() const {
  LoadSnapshot load = totals_;
  for (const Home& home : homes_) {
    load.homes.push_back({.running_sequences = static_cast<int32_t>(home.running.size()),
                          .waiting_sequences = static_cast<int32_t>(home.waiting.size()),
                          .total_blocks = home.pool.total(),
                          .used_blocks = home.pool.used(),
                          .cached_blocks = home.pool.cached()});
  }
  load.running_requests = num_requests() - load.waiting_requests;
  return load;
}

absl::Status Scheduler::CheckIntegrity(bool idle) const {
  if (idle && (!requests_.empty() || !retired_.empty() || !in_flight_.empty())) {
    return Internal("scheduler: idle with {} requests, {} retired, {} plans in flight", requests_.size(),
                    retired_.size(), in_flight_.size());
  }
  for (size_t h = 0; h < homes_.size(); ++h) {
    const Home& home = homes_[h];
    std::vector<const std::vector<int32_t>*> tables;
    int64_t to_serve = 0;
    for (const Sequence* s : home.running) {
      if (s->state != SequenceState::kRunning) return Internal("scheduler: home {} runs what is not running", h);
      if (s->computed > static_cast<int64_t>(s->blocks.size()) * limits_.block_size) {
        return Internal("scheduler: home {}: {} tokens in {} blocks", h, s->computed, s->blocks.size());
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
    if (idle && home.pool.used() != 0) return Internal("scheduler: home {}: {} blocks leaked", h, home.pool.used());
    RETURN_IF_ERROR(home.pool.CheckIntegrity(tables));
  }
  return absl::OkStatus();
}

}  // namespace soloist
