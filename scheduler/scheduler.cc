#include "scheduler/scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>
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

Scheduler::Scheduler(const SchedulerOptions& options, const EngineInfo& info, int64_t first_step,
                     std::function<void()> mask_ready)
    : options_(options),
      limits_(info.limits),
      micro_batches_(options.micro_batches, info),
      mask_ready_(std::move(mask_ready)),
      next_step_(first_step) {
  token_budget_ = std::max(1, std::min(options.max_tokens_per_step, limits_.max_tokens));
  // One token each, so that a decode never waits.
  max_running_ = std::max(1, std::min({options.max_sequences, limits_.max_sequences, token_budget_}));
  homes_.reserve(info.num_homes);
  for (int32_t h = 0; h < info.num_homes; ++h) homes_.emplace_back(limits_, options.prefix_cache);
  totals_.expert_tokens.resize(static_cast<size_t>(info.num_layers) * info.num_experts);
  totals_.times.resize(info.num_homes);
}

Scheduler::~Scheduler() = default;

int32_t Scheduler::ChooseHome(const Request& request) const {
  // A prompt that is scored is computed all the same.
  const int32_t last = request.sampling.num_prompt_logprobs < 0 ? static_cast<int32_t>(request.prompt.size()) - 1 : 0;
  const int32_t max_blocks = last / limits_.block_size;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const Home& home : homes_) {
    if (home.usable) least = std::min(least, home.to_serve);
  }
  int32_t best = -1;
  int64_t best_hit = 0;
  for (int32_t h = 0; h < static_cast<int32_t>(homes_.size()); ++h) {
    const Home& home = homes_[h];
    const int64_t hit = static_cast<int64_t>(home.pool.CountCached(request.prompt, request.cache_salt, max_blocks)) *
                        limits_.block_size;
    if (!home.usable || home.to_serve > least + hit + kHitDetourSteps * token_budget_) continue;
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
    if (token < 0 || token >= limits_.vocab_size) continue;
    if (!p.ignore_eos) state->stops.push_back(token);
    // A constraint allows end tokens where the output may end, and nothing can follow them.
    if (p.ignore_eos && request.constraint != nullptr) state->bias.push_back({token, -HUGE_VALF});
  }
  const int32_t home = ChooseHome(request);
  const std::string id = request.id;
  state->request = std::make_shared<const Request>(std::move(request));
  const std::vector<int32_t>& prompt = state->request->prompt;
  if (state->request->sampling.num_prompt_logprobs >= 0) state->num_scores = static_cast<int32_t>(prompt.size()) - 1;
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
  RequestState& added = *state;
  CHECK(requests_.emplace(id, std::move(state)).second);
  if (added.num_scores == 0) StartOutputs(added);
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
  if (s.constraint != nullptr) {
    std::erase(awaiting_mask_, &s);
    s.next = nullptr;
    s.constraint.reset();
  }
  FinishEvent event;
  event.output_index = s.output_index;
  event.reason = reason;
  event.stop_token = stop_token;
  event.error = error;
  event.retryable = reason == FinishReason::kError && !absl::IsInvalidArgument(error);
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
  TakeMasks();
  PreemptForTest();
  Rebalance();
  int32_t max_home_tokens = 0;
  for (Home& home : homes_) {
    PlanHome(home, now_ns);
    max_home_tokens = std::max(max_home_tokens, token_budget_ - home.budget);
  }
  if (max_home_tokens == 0) return std::nullopt;
  InFlight flight;
  if (!spare_.empty()) {
    flight = std::move(spare_.back());
    spare_.pop_back();
  }
  flight.step = next_step_;
  flight.rows.resize(homes_.size());
  flight.registered.resize(homes_.size());
  StepPlan plan;
  plan.step = next_step_;
  plan.homes.reserve(homes_.size());
  for (size_t h = 0; h < homes_.size(); ++h) {
    Home& home = homes_[h];
    PackHome(home, flight.rows[h]);
    plan.homes.emplace_back(home.parts, next_step_, max_home_tokens, home.previous_rows);
    home.previous_rows = static_cast<int32_t>(flight.rows[h].size());
    for (Sequence* s : home.running) {
      if (s->planned > 0) RegisterBlocks(home, *s, &flight.registered[h]);
    }
  }
  micro_batches_.Apply(plan);
  in_flight_.push_back(std::move(flight));
  ++next_step_;
  return plan;
}

void Scheduler::Recycle(InFlight flight) {
  for (auto& rows : flight.rows) rows.clear();
  for (auto& blocks : flight.registered) blocks.clear();
  spare_.push_back(std::move(flight));
}

absl::Status Scheduler::Commit(const StepResult& result, int64_t now_ns) {
  RETURN_IF_ERROR(CheckResult(result));
  InFlight flight = std::move(in_flight_.front());
  in_flight_.pop_front();
  for (size_t h = 0; h < homes_.size(); ++h) {
    for (size_t r = 0; r < flight.rows[h].size(); ++r) {
      Sequence& s = *flight.rows[h][r].sequence;
      --s.owner->rows_in_flight;
      if (flight.rows[h][r].scores) {
        CommitScore(*s.owner, result.homes[h], static_cast<int32_t>(r));
        continue;
      }
      --s.pending;
      if (s.state != SequenceState::kFinished) CommitToken(s, result.homes[h], static_cast<int32_t>(r), now_ns);
    }
    CountTimes(static_cast<int32_t>(h), result.homes[h]);
    const std::vector<int64_t>& experts = result.homes[h].expert_rows;
    for (size_t i = 0; i < std::min(experts.size(), totals_.expert_tokens.size()); ++i) {
      totals_.expert_tokens[i] += experts[i];
    }
  }
  Recycle(std::move(flight));
  std::erase_if(retired_, [](const auto& state) { return state->rows_in_flight == 0; });
  ++totals_.steps;
  totals_.replays += result.replays;
  totals_.last_step_device_ns = result.device_ns;
  return absl::OkStatus();
}

void Scheduler::CommitToken(Sequence& s, const HomeResult& result, int32_t row, int64_t now_ns) {
  const RequestState& owner = *s.owner;
  const SamplingParams& p = owner.request->sampling;
  const int32_t token = result.tokens[row];
  if (s.constraint != nullptr && !Allows(s, token)) return FinishWithoutToken(s);
  s.tokens.push_back(token);
  if (owner.track_history) CountToken(s, token, 1);
  if (s.times.first_token_ns == 0) s.times.first_token_ns = now_ns;
  s.times.last_token_ns = now_ns;
  ++totals_.generated_tokens;

  TokenEvent event;
  event.output_index = s.output_index;
  event.token = token;
  event.logprob = result.logprobs[row];
  event.time_ns = now_ns;
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

  if (s.state == SequenceState::kRunning) {
    RegisterBlocks(HomeOf(s), s, in_flight_.empty() ? nullptr : &in_flight_.back().registered[s.home]);
  }
  const int32_t outputs = static_cast<int32_t>(s.tokens.size()) - s.num_prompt;
  // The ban keeps stop tokens away before min_tokens; if it left nothing else to sample, it does not end the output.
  if (outputs > p.min_tokens && std::ranges::find(owner.stops, token) != owner.stops.end()) {
    Finish(s, FinishReason::kStop, token, absl::OkStatus());
  } else if (outputs >= owner.max_tokens) {
    Finish(s, FinishReason::kLength, -1, absl::OkStatus());
  } else if (s.constraint != nullptr) {
    Advance(s, token);
  }
}

std::vector<OutputEvent> Scheduler::TakeEvents() { return std::exchange(events_, {}); }

}  // namespace soloist
