// What one home does in one step: who runs, who is admitted, who is preempted, and the packed part of the plan.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>
#include <vector>

#include "base/check.h"
#include "scheduler/scheduler.h"

namespace soloist {
namespace {

int32_t BlocksFor(int32_t tokens, int32_t block_size) { return (tokens + block_size - 1) / block_size; }

}  // namespace

void Scheduler::Rebalance() {
  for (size_t to = 0; to < homes_.size(); ++to) {
    Home& room = homes_[to];
    if (!room.usable || !room.waiting.empty() || static_cast<int32_t>(room.running.size()) >= max_running_) continue;
    Home* from = nullptr;
    for (Home& home : homes_) {
      if (!home.blocked || home.waiting.empty() || (*home.waiting.begin())->owner->admitted) continue;
      if (from == nullptr || RanksBefore()(*home.waiting.begin(), *from->waiting.begin())) from = &home;
    }
    if (from == nullptr) return;
    RequestState& owner = *(*from->waiting.begin())->owner;
    const int32_t need = BlocksFor((*from->waiting.begin())->total(), limits_.block_size);
    if (room.pool.available() < need + Reserve(room)) continue;
    for (Sequence& s : owner.outputs) {
      if (s.state != SequenceState::kWaiting) continue;
      Leave(s);
      WaitAt(static_cast<int32_t>(to), s);
    }
    from->blocked = false;
  }
}

void Scheduler::Leave(Sequence& s) {
  Home& home = HomeOf(s);
  home.waiting.erase(&s);
  home.to_serve -= s.to_serve;
}

void Scheduler::WaitAt(int32_t home, Sequence& s) {
  s.home = home;
  s.blocked_need = 0;
  homes_[home].to_serve += s.to_serve;
  homes_[home].waiting.insert(&s);
}

// Room for the decodes that run, so that admission does not at once lead to preemption.
int32_t Scheduler::Reserve(const Home& home) const {
  return home.running.empty() ? 0 : std::max(1, limits_.num_blocks / 64);
}

void Scheduler::PlanHome(Home& home, int64_t now_ns) {
  const int32_t block_size = limits_.block_size;
  home.budget = token_budget_;
  home.logit_rows = limits_.max_logit_rows();
  for (Sequence* s : home.running) s->planned = 0;
  for (size_t i = 0; i < home.running.size(); ++i) {
    Sequence& s = *home.running[i];
    if (s.remaining() != 1 || Plannable(s) != 1) continue;
    bool fits = true;
    while (fits && s.computed / block_size >= static_cast<int32_t>(s.blocks.size())) {
      if (home.pool.Allocate(1, s.blocks)) continue;
      // Never of a lone sequence: requests that do not fit alone were refused.
      CHECK_GT(home.running.size(), 1u);
      fits = home.running.back() != &s;
      Preempt(home, *home.running.back());
    }
    if (!fits) break;
    s.planned = 1;
    --home.budget;
    --home.logit_rows;
  }

  // A sequence that is not planned yet needs a chunk, or waits for its last token to be committed.
  const auto wants_chunk = [&home](const Sequence* s) {
    return s->planned == 0 && s->remaining() > 1 && Chunk(home, *s) > 0;
  };
  home.blocked = false;
  size_t next = 0;
  for (auto it = home.waiting.begin(); home.budget > 0;) {
    while (next < home.running.size() && !wants_chunk(home.running[next])) ++next;
    Sequence* running = next < home.running.size() ? home.running[next] : nullptr;
    Sequence* waiting = !home.blocked && it != home.waiting.end() ? *it : nullptr;
    if (running == nullptr && waiting == nullptr) break;
    Sequence* chosen = running;
    if (waiting != nullptr && (running == nullptr || RanksBefore()(waiting, running))) {
      if (MustWait(*waiting)) {
        ++it;
        continue;
      }
      if (!Admit(home, *waiting, now_ns)) {
        home.blocked = true;
        continue;
      }
      it = home.waiting.erase(it);
      chosen = waiting;
      next = 0;  // `running` has grown somewhere, and may have lost its end
    }
    chosen->planned = Chunk(home, *chosen);
    home.budget -= chosen->planned;
    home.logit_rows -= PlannedLogitRows(*chosen);
  }
}

bool Scheduler::MustWait(const Sequence& s) const {
  // Its next token is not known before a plan in flight is committed, or it has just made way.
  if (s.pending > 0 || s.preempted_turn == turn_ || WaitsForScores(s)) return true;
  // Later outputs share the prompt's blocks instead of computing them again.
  if (!options_.prefix_cache || s.output_index == 0) return false;
  const Sequence& first = s.owner->outputs[0];
  return first.state == SequenceState::kRunning && first.registered < (first.num_prompt - 1) / limits_.block_size;
}

bool Scheduler::Admit(Home& home, Sequence& s, int64_t now_ns) {
  const auto gives_way = [&] {
    return !home.running.empty() && home.running.back()->owner->priority > s.owner->priority;
  };
  const auto full = [&] { return static_cast<int32_t>(home.running.size()) >= max_running_; };
  const bool lone = home.running.empty();
  if (!gives_way() && (full() || (!lone && home.pool.available() < s.blocked_need))) return false;

  const auto tokens = std::span<const int32_t>(s.tokens);
  const int32_t before = home.pool.available();
  // At least one token is left to compute, for its logits; of a prompt that is scored, all that have no score yet.
  const int32_t first_row = FirstLogitRow(s);
  const ChainId chain = home.pool.Match(tokens, s.owner->request->cache_salt, first_row / limits_.block_size, s.blocks);
  const int32_t hits = static_cast<int32_t>(s.blocks.size());
  const int32_t reserve = Reserve(home);
  const int32_t need = BlocksFor(s.total(), limits_.block_size) - hits;
  if (gives_way() && home.pool.available() < need + reserve) {
    int64_t gain = home.pool.available();
    for (auto it = home.running.rbegin(); it != home.running.rend(); ++it) {
      if ((*it)->owner->priority > s.owner->priority) gain += static_cast<int64_t>((*it)->blocks.size());
    }
    while (gain >= need + reserve && gives_way() && home.pool.available() < need + reserve) {
      Preempt(home, *home.running.back());
    }
  }
  if (home.pool.available() >= need + reserve && full() && gives_way()) Preempt(home, *home.running.back());
  if (full() || home.pool.available() < need + reserve) {
    s.blocked_need = need + reserve + (before - home.pool.available());
    home.pool.Release(s.blocks);
    return false;
  }
  CHECK(home.pool.Allocate(need, s.blocks));
  s.blocked_need = 0;
  s.state = SequenceState::kRunning;
  s.computed = hits * limits_.block_size;
  s.registered = hits;
  s.chain = chain;
  s.sampled_since_admission = false;
  s.admitted_step = next_step_;
  home.running.insert(std::ranges::upper_bound(home.running, &s, RanksBefore()), &s);
  Serve(s, s.computed);
  if (!s.admitted_once) {
    s.admitted_once = true;
    if (!std::exchange(s.owner->admitted, true)) --totals_.waiting_requests;
    s.times.first_scheduled_ns = now_ns;
    s.cached_prompt_tokens = s.computed;
    totals_.prefix_cache_queries += options_.prefix_cache && first_row == s.num_prompt - 1 ? s.num_prompt : 0;
    totals_.prefix_cache_hits += s.computed;
    if (s.output_index == 0) totals_.prompt_tokens += s.num_prompt;
  }
  return true;
}

void Scheduler::Preempt(Home& home, Sequence& s) {
  home.budget += s.planned;
  home.logit_rows += PlannedLogitRows(s);
  Withdraw(home, s);
  s.preempted_turn = turn_;
  ++s.num_preemptions;
  ++totals_.preemptions;
}

// Back among those that wait, with nothing computed.
void Scheduler::Withdraw(Home& home, Sequence& s) {
  std::erase(home.running, &s);
  home.pool.Release(s.blocks);
  s.planned = s.computed = s.registered = 0;
  s.chain = 0;
  s.blocked_need = 0;
  s.state = SequenceState::kWaiting;
  home.waiting.insert(&s);
}

void Scheduler::PreemptForTest() {
  if (options_.force_preempt_every <= 0 || next_step_ % options_.force_preempt_every != 0) return;
  for (size_t i = 0; i < homes_.size(); ++i) {
    Home& home = homes_[(static_cast<size_t>(next_step_) + i) % homes_.size()];
    if (home.running.empty()) continue;
    Sequence& victim = *home.running[static_cast<size_t>(next_step_) % home.running.size()];
    // One that has got nowhere since its admission stays, so that every admission makes progress.
    if (!victim.sampled_since_admission) continue;
    Preempt(home, victim);
    return;
  }
}

void Scheduler::RegisterBlocks(Home& home, Sequence& s, std::vector<int32_t>* registered) {
  if (!options_.prefix_cache) return;
  const int32_t block_size = limits_.block_size;
  const int32_t full = std::min<int32_t>(s.computed, s.tokens.size()) / block_size;
  for (; s.registered < full; ++s.registered) {
    const auto tokens =
        std::span<const int32_t>(s.tokens).subspan(static_cast<size_t>(s.registered) * block_size, block_size);
    s.chain = home.pool.Register(s.chain, tokens, s.owner->request->cache_salt, s.blocks[s.registered]);
    if (registered != nullptr) registered->push_back(s.blocks[s.registered]);
  }
}

void Scheduler::PackHome(Home& home, std::vector<Row>& rows) {
  HomePlanParts& parts = home.parts;
  parts.token_ids.clear();
  parts.positions.clear();
  parts.slot_mapping.clear();
  parts.query_starts.assign(1, 0);
  parts.seq_lens.clear();
  parts.block_tables.clear();
  parts.max_blocks = 0;
  parts.logit_rows.clear();
  parts.sampling.clear();
  parts.bias.clear();
  parts.history.clear();
  parts.mask_rows.clear();
  parts.masks.clear();
  parts.targets.clear();
  const int32_t block_size = limits_.block_size;
  // Sequences of one row first: a backend runs them by other kernels than chunks.
  std::vector<Sequence*>& planned = home.planned;
  planned.clear();
  std::ranges::copy_if(home.running, std::back_inserter(planned), [](const Sequence* s) { return s->planned == 1; });
  std::ranges::copy_if(home.running, std::back_inserter(planned), [](const Sequence* s) { return s->planned > 1; });
  for (const Sequence* s : planned) {
    parts.max_blocks = std::max(parts.max_blocks, BlocksFor(s->computed + s->planned, block_size));
  }
  for (Sequence* s : planned) {
    const int32_t end = s->computed + s->planned;
    for (int32_t p = s->computed; p < end; ++p) {
      const bool known = p < static_cast<int32_t>(s->tokens.size());
      if (!known) CHECK_EQ(s->pending_step, next_step_ - 1);
      parts.token_ids.push_back(known ? s->tokens[p] : -1 - s->pending_row);
      parts.positions.push_back(p);
      parts.slot_mapping.push_back(s->blocks[p / block_size] * block_size + p % block_size);
    }
    parts.query_starts.push_back(static_cast<int32_t>(parts.token_ids.size()));
    parts.seq_lens.push_back(end);
    const int32_t used = BlocksFor(end, block_size);
    parts.block_tables.insert(parts.block_tables.end(), s->blocks.begin(), s->blocks.begin() + used);
    parts.block_tables.resize(parts.seq_lens.size() * parts.max_blocks, 0);
    const bool samples = end == s->total();
    Serve(*s, s->planned);
    s->marks[next_step_ % Engine::kMaxInFlight] = {next_step_, s->computed, s->registered, s->chain};
    PackScores(home, *s, rows);
    s->computed = end;
    if (!samples) continue;
    PackSampling(home, *s);
    s->pending_row = static_cast<int32_t>(rows.size());
    s->pending_step = next_step_;
    ++s->pending;
    ++s->owner->rows_in_flight;
    s->sampled_since_admission = true;
    rows.push_back({.sequence = s});
  }
  if (!parts.targets.empty()) parts.targets.resize(parts.logit_rows.size(), -1);
}

void Scheduler::PackSampling(Home& home, Sequence& s) {
  HomePlanParts& parts = home.parts;
  const RequestState& owner = *s.owner;
  const SamplingParams& p = owner.request->sampling;
  parts.logit_rows.push_back(static_cast<int32_t>(parts.token_ids.size()) - 1);
  SamplingRow row;
  row.temperature = p.temperature;
  row.top_p = p.top_p;
  row.min_p = p.min_p;
  row.top_k = p.top_k;
  row.repetition_penalty = p.repetition_penalty;
  row.presence_penalty = p.presence_penalty;
  row.frequency_penalty = p.frequency_penalty;
  row.seed_low = static_cast<uint32_t>(p.seed);
  row.seed_high = static_cast<uint32_t>(p.seed >> 32);
  row.output_index = s.output_index;
  row.position = s.computed;
  row.num_top_logprobs = p.num_top_logprobs;
  row.pending_row = owner.track_history && s.pending > 0 ? s.pending_row : -1;
  row.return_logits = p.return_logits ? 1 : 0;
  row.bias_begin = static_cast<int32_t>(parts.bias.size());
  row.history_begin = static_cast<int32_t>(parts.history.size());
  parts.sampling.push_back(row);
  parts.bias.insert(parts.bias.end(), owner.bias.begin(), owner.bias.end());
  if (s.num_sampled() < p.min_tokens) {
    for (const int32_t token : owner.stops) parts.bias.push_back({token, -HUGE_VALF});
  }
  parts.history.insert(parts.history.end(), s.history.begin(), s.history.end());
  PackMask(home, s);
}

}  // namespace soloist
