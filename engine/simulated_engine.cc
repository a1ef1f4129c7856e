#include "engine/simulated_engine.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace soloist {
namespace {

// Of slots written before the last recovery; 0: never written.
constexpr int64_t kBeforeRecovery = -1;

// Finalizer of splitmix64 (Steele et al., 2014).
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

uint64_t Mix(uint64_t a, uint64_t b) { return Mix(a ^ Mix(b)); }

// Row r's entries of a CSR section.
template <typename T>
std::span<const T> EntriesOf(std::span<const SamplingRow> rows, int r, int32_t SamplingRow::* begin,
                             std::span<const T> all) {
  const size_t first = rows[r].*begin;
  const size_t last = r + 1 < static_cast<int>(rows.size()) ? rows[r + 1].*begin : all.size();
  return all.subspan(first, last - first);
}

// Empty: logit row r has none.
std::span<const int32_t> MaskOf(const HomePlan& plan, int r) {
  const auto found = std::ranges::lower_bound(plan.mask_rows(), r);
  if (found == plan.mask_rows().end() || *found != r) return {};
  return plan.masks().subspan((found - plan.mask_rows().begin()) * plan.mask_words(), plan.mask_words());
}

}  // namespace

uint64_t SimulatedSequence::SlotValue(int32_t token) const {
  return Mix(Mix(prefix_, static_cast<uint32_t>(token)), static_cast<uint32_t>(length_));
}

void SimulatedSequence::Read(uint64_t slot_value) {
  prefix_ = Mix(prefix_, slot_value);
  ++length_;
}

void SimulatedSequence::Append(int32_t token) { Read(SlotValue(token)); }

int32_t SimulatedSequence::Sample(const SamplingRow& row, std::span<const LogitBias> bias,
                                  std::span<const TokenHistory> history, int32_t pending, int32_t vocab_size,
                                  std::span<const int32_t> mask) const {
  uint64_t hash = Mix(Mix(prefix_, row.position), row.output_index);
  if (row.temperature > 0) hash = Mix(Mix(hash, row.seed_low), row.seed_high);
  if (row.repetition_penalty != 1 || row.presence_penalty != 0 || row.frequency_penalty != 0) {
    // A sum, since the entries have no order. The pending token is one more of its kind.
    uint64_t sum = 0;
    bool found = false;
    for (const TokenHistory& entry : history) {
      found |= entry.token == pending;
      sum += Mix(entry.token, entry.output_count + (entry.token == pending ? 1 : 0));
    }
    if (pending >= 0 && !found) sum += Mix(pending, 1);
    hash = Mix(hash, sum);
  }
  const auto banned = [bias, mask](int32_t token) {
    if (!mask.empty() && !AllowsToken(mask, token)) return true;
    return std::ranges::any_of(bias, [token](const LogitBias& b) { return b.token == token && b.bias == -HUGE_VALF; });
  };
  int32_t token = static_cast<int32_t>(hash % vocab_size);
  for (int32_t tries = 0; tries < vocab_size && banned(token); ++tries) token = (token + 1) % vocab_size;
  return token;
}

float SimulatedSequence::Logprob(int32_t token) const {
  return -1.0f - static_cast<float>(Mix(Mix(prefix_, length_), token) % 4096) / 512;
}

int32_t SimulatedSequence::MostLikely(int32_t vocab_size) const {
  return static_cast<int32_t>(Mix(prefix_, length_) % vocab_size);
}

SimulatedEngine::SimulatedEngine(SimulatedOptions options)
    : options_(std::move(options)), present_(options_.num_homes, true), last_tokens_(options_.num_homes) {
  EngineInfo& info = infos_.emplace_back();
  info.model_name = "simulated";
  info.architecture = "Simulated";
  info.device = "none";
  info.num_ranks = info.num_homes = options_.num_homes;
  info.num_layers = options_.num_layers;
  info.num_experts = options_.num_experts;
  info.experts_per_token = options_.experts_per_token;
  info.limits = options_.limits;
  for (int e = 0; e < options_.num_experts; ++e) {
    info.expert_rank.push_back(static_cast<int>(static_cast<int64_t>(e) * options_.num_homes / options_.num_experts));
  }
  info_ = &info;
  if (options_.check_kv) {
    const size_t slots = static_cast<size_t>(options_.limits.num_blocks) * options_.limits.block_size;
    slots_.assign(options_.num_homes, Slots(slots));
  }
}

absl::Status SimulatedEngine::Submit(StepPlan plan) {
  if (!failure_.ok()) return failure_;
  if (static_cast<int>(results_.size()) >= kMaxInFlight) {
    return FailedPrecondition("simulated engine: {} plans in flight already", results_.size());
  }
  if (plan.step != last_submitted_ + 1) {
    return InvalidArgument("simulated engine: plan of step {}, expected {}", plan.step, last_submitted_ + 1);
  }
  if (static_cast<int>(plan.homes.size()) != options_.num_homes) {
    return InvalidArgument("simulated engine: plan for {} homes, expected {}", plan.homes.size(), options_.num_homes);
  }
  int32_t busiest = 0;
  for (const HomePlan& home : plan.homes) busiest = std::max(busiest, home.num_tokens());
  for (int h = 0; h < options_.num_homes; ++h) {
    const HomePlan& home = plan.homes[h];
    RETURN_IF_ERROR(Annotate(home.Validate(options_.limits), "home " + std::to_string(h)));
    // A new scheduler on a used engine may know less of the last result than there is.
    if (home.step() != plan.step || home.max_home_tokens() != busiest ||
        home.previous_rows() > static_cast<int32_t>(last_tokens_[h].size())) {
      return InvalidArgument("home {}: step {}, busiest home {}, previous rows {}; expected {}, {}, up to {}", h,
                             home.step(), home.max_home_tokens(), home.previous_rows(), plan.step, busiest,
                             last_tokens_[h].size());
    }
  }
  StepResult result;
  result.step = plan.step;
  result.device_ns = CostNs(plan);
  result.homes.resize(options_.num_homes);
  for (int h = 0; h < options_.num_homes; ++h) {
    if (!present_[h] && plan.homes[h].num_tokens() > 0) {
      return failure_ = Internal("home {} step {}: {} tokens, and no rank", h, plan.step, plan.homes[h].num_tokens());
    }
    if (absl::Status status = RunHome(h, plan.homes[h], result.homes[h]); !status.ok()) return failure_ = status;
  }
  for (int h = 0; h < options_.num_homes; ++h) last_tokens_[h] = result.homes[h].tokens;
  last_submitted_ = plan.step;
  if (options_.lose) {
    if (auto loss = options_.lose(plan.step, /*awaiting=*/false)) return Lose(plan.step, *std::move(loss));
  }
  results_.push_back(std::move(result));
  return absl::OkStatus();
}

absl::Status SimulatedEngine::RunHome(int home, const HomePlan& plan, HomeResult& result) {
  const std::span<const int32_t> previous = last_tokens_[home];
  const auto ids = plan.token_ids(), slots = plan.slot_mapping(), starts = plan.query_starts(),
             rows = plan.logit_rows();
  const int32_t block_size = options_.limits.block_size;
  int next_row = 0;
  for (int s = 0; s < plan.num_sequences(); ++s) {
    SimulatedSequence sequence;
    const auto table = plan.block_tables().subspan(static_cast<size_t>(s) * plan.max_blocks(), plan.max_blocks());
    const int32_t first = plan.positions()[starts[s]];
    for (int32_t p = 0; p < first && options_.check_kv; ++p) {
      const SimulatedSequence::Slot& slot = slots_[home][table[p / block_size] * block_size + p % block_size];
      if (slot.written_step == 0 || slot.written_step == plan.step()) {
        return Internal("home {} step {}: sequence {} reads position {} of block {}, written in step {}", home,
                        plan.step(), s, p, table[p / block_size], slot.written_step);
      }
      sequence.Read(slot.value);
    }
    for (int32_t i = starts[s]; i < starts[s + 1]; ++i) {
      const int32_t token = ids[i] >= 0 ? ids[i] : previous[-1 - ids[i]];
      if (options_.check_kv) {
        SimulatedSequence::Slot& slot = slots_[home][slots[i]];
        if (slot.written_step == plan.step()) {
          return Internal("home {} step {}: slot {} is written twice", home, plan.step(), slots[i]);
        }
        slot = {sequence.SlotValue(token), plan.step()};
        sequence.Read(slot.value);
      }
      if (next_row < plan.num_logit_rows() && rows[next_row] == i) Sample(plan, next_row++, sequence, previous, result);
    }
  }
  Route(plan, previous, result);
  return absl::OkStatus();
}

void SimulatedEngine::Sample(const HomePlan& plan, int row, const SimulatedSequence& sequence,
                             std::span<const int32_t> previous, HomeResult& result) const {
  const SamplingRow& params = plan.sampling()[row];
  const int32_t vocab = options_.limits.vocab_size;
  const int32_t pending = params.pending_row >= 0 ? previous[params.pending_row] : -1;
  const int32_t target = plan.num_targets() > 0 ? plan.targets()[row] : -1;
  const int32_t token =
      target >= 0 ? target
                  : sequence.Sample(params, EntriesOf(plan.sampling(), row, &SamplingRow::bias_begin, plan.bias()),
                                    EntriesOf(plan.sampling(), row, &SamplingRow::history_begin, plan.history()),
                                    pending, vocab, MaskOf(plan, row));
  result.tokens.push_back(token);
  result.logprobs.push_back(target >= 0 ? sequence.Logprob(target) : -1.0f / static_cast<float>(token + 1));
  const auto wants_top = [](const SamplingRow& r) { return r.num_top_logprobs > 0; };
  const auto wants_logits = [](const SamplingRow& r) { return r.return_logits != 0; };
  if (std::ranges::any_of(plan.sampling(), wants_top)) {
    const int32_t best = target >= 0 ? sequence.MostLikely(vocab) : token;
    for (int i = 0; i < kMaxTopLogprobs; ++i) {
      const bool valid = i < params.num_top_logprobs && i < vocab;
      result.top_tokens.push_back(valid ? (best + i) % vocab : -1);
      result.top_logprobs.push_back(valid ? -1.0f - static_cast<float>(i) : 0.0f);
    }
  }
  if (std::ranges::any_of(plan.sampling(), wants_logits)) {
    result.raw_logits.resize(result.raw_logits.size() + vocab, 0.0f);
    if (params.return_logits != 0) result.raw_logits[result.raw_logits.size() - vocab + token] = 1.0f;
  }
}

void SimulatedEngine::Route(const HomePlan& plan, std::span<const int32_t> previous, HomeResult& result) const {
  result.expert_rows.assign(static_cast<size_t>(options_.num_layers) * options_.num_experts, 0);
  for (const int32_t id : plan.token_ids()) {
    const int32_t token = id >= 0 ? id : previous[-1 - id];
    for (int layer = 0; layer < options_.num_layers; ++layer) {
      const uint64_t first = Mix(token, layer) % options_.num_experts;
      for (int k = 0; k < options_.experts_per_token; ++k) {
        ++result.expert_rows[static_cast<size_t>(layer) * options_.num_experts + (first + k) % options_.num_experts];
      }
    }
  }
}

int64_t SimulatedEngine::CostNs(const StepPlan& plan) const {
  int64_t tokens = 0, keys = 0;
  for (const HomePlan& home : plan.homes) {
    int64_t home_keys = 0;
    for (const int32_t length : home.seq_lens()) home_keys += length;
    keys = std::max(keys, home_keys);
    tokens = std::max<int64_t>(tokens, home.num_tokens());
  }
  return options_.base_ns + options_.per_token_ns * tokens + options_.per_kv_token_ns * keys;
}

absl::StatusOr<StepResult> SimulatedEngine::Await() {
  if (!failure_.ok()) return failure_;
  if (results_.empty()) return FailedPrecondition("simulated engine: nothing is in flight");
  StepResult result = std::move(results_.front());
  results_.pop_front();
  if (options_.delay) options_.delay(result.step, result.device_ns);
  if (options_.fail_at_step > 0 && result.step >= options_.fail_at_step) {
    failure_ = Unavailable("simulated failure at step {}", result.step);
    const std::lock_guard lock(mutex_);
    state_ = RankState::kFailed;
    message_ = "simulated failure";
    for (int r = 0; r < options_.num_homes; ++r) affected_.push_back(r);
    return failure_;
  }
  if (options_.lose) {
    if (auto loss = options_.lose(result.step, /*awaiting=*/true)) return Lose(result.step, *std::move(loss));
  }
  last_awaited_ = result.step;
  const std::lock_guard lock(mutex_);
  last_finished_ = result.step;
  return result;
}

absl::Status SimulatedEngine::Lose(int64_t step, SimulatedLoss loss) {
  results_.clear();
  loss_ = std::move(loss);
  const std::lock_guard lock(mutex_);
  state_ = RankState::kLost;
  affected_ = loss_->homes;
  message_ = fmt::format("lost in step {}, waiting for it to come back", step);
  if (affected_.empty()) return failure_ = Unavailable("step {}: a rank was late", step);
  return failure_ = Unavailable("step {}: ranks {} are lost", step, fmt::join(affected_, ", "));
}

absl::StatusOr<Recovery> SimulatedEngine::Recover(absl::Duration timeout) {
  if (!loss_.has_value()) return FailedPrecondition("simulated engine: no rank is lost");
  if (!loss_->never.ok()) return failure_ = loss_->never;
  if (loss_->late_recovers-- > 0 || (options_.whole && !options_.whole(timeout)))
    return DeadlineExceeded("simulated engine: the ranks are not whole yet");
  const int64_t first_lost = last_awaited_ + 1;
  Recovery recovery;
  recovery.next_step = loss_->next_step > 0 ? loss_->next_step : first_lost;
  recovery.home_kept = present_;
  present_.assign(options_.num_homes, true);
  for (const int home : loss_->homes) recovery.home_kept[home] = false;
  for (const int home : loss_->absent) recovery.home_kept[home] = present_[home] = false;
  recovery.home_usable = present_;
  for (size_t h = 0; h < slots_.size(); ++h) {
    for (SimulatedSequence::Slot& slot : slots_[h]) {
      if (!recovery.home_kept[h] || slot.written_step >= first_lost) slot = {};
      if (slot.written_step > 0) slot.written_step = kBeforeRecovery;  // the numbers may come again
    }
  }
  for (std::vector<int32_t>& tokens : last_tokens_) tokens.clear();
  if (!loss_->expert_rank.empty()) {
    EngineInfo& info = infos_.emplace_back(infos_.back());
    info.expert_rank = loss_->expert_rank;
    info_ = &info;
  }
  last_submitted_ = last_awaited_ = recovery.next_step - 1;
  failure_ = absl::OkStatus();
  const std::lock_guard lock(mutex_);
  last_finished_ = last_submitted_;
  affected_ = loss_->absent;
  message_ = "lost, its experts are with the others";
  loss_.reset();
  return recovery;
}

std::vector<RankStatus> SimulatedEngine::Ranks() const {
  const std::lock_guard lock(mutex_);
  std::vector<RankStatus> ranks(options_.num_homes);
  for (int r = 0; r < options_.num_homes; ++r) {
    ranks[r].rank = r;
    ranks[r].state = RankState::kReady;
    ranks[r].last_step = last_finished_;
  }
  for (const int r : affected_) {
    ranks[r].state = state_;
    ranks[r].message = message_;
  }
  return ranks;
}

}  // namespace soloist
