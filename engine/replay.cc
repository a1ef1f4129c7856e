#include "engine/replay.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/check.h"
#include "base/logging.h"
#include "base/status.h"

namespace soloist {
namespace {

template <typename T>
std::vector<T> Copy(std::span<const T> from) {
  return {from.begin(), from.end()};
}

int64_t MostRows(const StepResult& result) {
  int64_t most = 0;
  for (const HomeResult& home : result.homes) {
    for (const int64_t rows : home.expert_rows) most = std::max(most, rows);
  }
  return most;
}

int64_t OverflowRows(const StepResult& result) {
  int64_t rows = 0;
  for (const HomeResult& home : result.homes) rows = std::max(rows, home.overflow_rows);
  return rows;
}

}  // namespace

HomePlan WithoutReferences(const HomePlan& plan, std::span<const int32_t> previous_tokens) {
  HomePlanParts parts{.token_ids = Copy(plan.token_ids()),
                      .positions = Copy(plan.positions()),
                      .slot_mapping = Copy(plan.slot_mapping()),
                      .query_starts = Copy(plan.query_starts()),
                      .seq_lens = Copy(plan.seq_lens()),
                      .block_tables = Copy(plan.block_tables()),
                      .max_blocks = plan.max_blocks(),
                      .logit_rows = Copy(plan.logit_rows()),
                      .sampling = Copy(plan.sampling()),
                      .bias = Copy(plan.bias()),
                      .history = {},
                      .mask_rows = Copy(plan.mask_rows()),
                      .masks = Copy(plan.masks()),
                      .targets = Copy(plan.targets())};
  const auto token_of = [&](int32_t row) {
    CHECK_LT(row, std::ssize(previous_tokens));
    return previous_tokens[row];
  };
  for (int32_t& id : parts.token_ids) {
    if (id < 0) id = token_of(-1 - id);
  }
  // The token of a pending row becomes an entry of the row's history, or one more of the entry that it has.
  const std::span<const TokenHistory> history = plan.history();
  for (size_t r = 0; r < parts.sampling.size(); ++r) {
    SamplingRow& row = parts.sampling[r];
    const int32_t end = r + 1 < parts.sampling.size() ? parts.sampling[r + 1].history_begin : plan.num_history();
    const int32_t begin = std::exchange(row.history_begin, static_cast<int32_t>(parts.history.size()));
    std::copy(history.begin() + begin, history.begin() + end, std::back_inserter(parts.history));
    if (row.pending_row < 0) continue;
    const int32_t token = token_of(std::exchange(row.pending_row, -1));
    const auto entry = std::find_if(parts.history.begin() + row.history_begin, parts.history.end(),
                                    [token](const TokenHistory& h) { return h.token == token; });
    if (entry == parts.history.end()) {
      parts.history.push_back({token, 1});
    } else {
      ++entry->output_count;
    }
  }
  HomePlan out(parts, plan.step(), plan.max_home_tokens(), /*previous_rows=*/0);
  if (plan.is_split()) out.Split(plan.second_begin());
  return out;
}

bool OverwritesReadsOf(const HomePlan& next, const HomePlan& plan, int32_t block_size, std::vector<int32_t>& read) {
  // Calls `mark` with each block of the plan and how many of its slots it reads, from the first on.
  const auto for_blocks = [&](const auto& mark) {
    for (int s = 0; s < plan.num_sequences(); ++s) {
      const int32_t* table = plan.block_tables().data() + static_cast<int64_t>(s) * plan.max_blocks();
      for (int32_t b = 0, left = plan.seq_lens()[s]; left > 0; ++b, left -= block_size) {
        mark(read[table[b]], std::min(left, block_size));
      }
    }
  };
  for_blocks([](int32_t& slots, int32_t used) { slots = std::max(slots, used); });
  const bool overwrites = std::ranges::any_of(next.slot_mapping(), [&](int32_t slot) {
    // The engine will refuse a slot that is not there.
    return slot >= 0 && slot / block_size < std::ssize(read) && slot % block_size < read[slot / block_size];
  });
  for_blocks([](int32_t& slots, int32_t) { slots = 0; });
  return overwrites;
}

ReplayEngine::ReplayEngine(std::unique_ptr<Engine> engine, const DispatchRoomOptions& options)
    : engine_(std::move(engine)),
      room_(options, engine_->Info()),
      last_tokens_(engine_->Info().num_homes),
      read_(engine_->Info().limits.num_blocks, 0) {}

absl::Status ReplayEngine::SubmitInner(StepPlan plan, int32_t room) {
  plan.step += extra_steps_;
  for (HomePlan& home : plan.homes) home.Renumber(plan.step, room);
  return engine_->Submit(std::move(plan));
}

bool ReplayEngine::Overwrites(const StepPlan& next, const StepPlan& plan) {
  for (size_t h = 0; h < std::min(next.homes.size(), plan.homes.size()); ++h) {
    if (OverwritesReadsOf(next.homes[h], plan.homes[h], Info().limits.block_size, read_)) return true;
  }
  return false;
}

absl::Status ReplayEngine::Submit(StepPlan plan) {
  if (std::ssize(flights_) + std::ssize(settled_) >= kMaxInFlight) {
    return FailedPrecondition("{} steps are in flight, limit {}", flights_.size() + settled_.size(), kMaxInFlight);
  }
  if (plan.step != last_step_ + 1) return InvalidArgument("plan: step {} after step {}", plan.step, last_step_);
  for (const HomePlan& home : plan.homes) {
    if (home.step() != plan.step || home.dispatch_rows() != 0) {
      return InvalidArgument("plan: a home says step {} and room for {} dispatch rows, expected {} and 0", home.step(),
                             home.dispatch_rows(), plan.step);
    }
  }
  if (!flights_.empty() && flights_.back().room > 0 && Overwrites(plan, flights_.back().plan)) {
    RETURN_IF_ERROR(Settle());
  }
  Flight flight;
  flight.step = plan.step;
  if (!plan.homes.empty()) flight.max_home_tokens = plan.homes[0].max_home_tokens();
  flight.room = room_.Choose(flight.max_home_tokens);
  if (flight.room > 0 || (!flights_.empty() && flights_.back().room > 0)) flight.plan = plan;
  RETURN_IF_ERROR(SubmitInner(std::move(plan), flight.room));
  last_step_ = flight.step;
  flights_.push_back(std::move(flight));
  return absl::OkStatus();
}

absl::StatusOr<StepResult> ReplayEngine::Await() {
  if (settled_.empty()) RETURN_IF_ERROR(Settle());
  StepResult result = std::move(settled_.front());
  settled_.pop_front();
  return result;
}

absl::Status ReplayEngine::Settle() {
  ASSIGN_OR_RETURN(StepResult result, engine_->Await());
  if (flights_.empty()) return Internal("step {}: a result that nobody waits for", result.step);
  if (const int64_t rows = OverflowRows(result); rows > 0) {
    Flight& flight = flights_.front();
    if (flight.room == 0) return Internal("step {}: {} rows for one expert, more than its tokens", flight.step, rows);
    room_.Observe(flight.max_home_tokens, rows, /*overflowed=*/true);
    spdlog::debug("engine: step {} wanted room for {} rows of an expert and had {}: it runs again", flight.step, rows,
                  flight.room);
    RETURN_IF_ERROR(Replay());
    ASSIGN_OR_RETURN(result, engine_->Await());
    if (OverflowRows(result) > 0) return Internal("step {}: an overflow with room for all", flight.step);
  } else if (room_.Observes(flights_.front().max_home_tokens)) {
    room_.Observe(flights_.front().max_home_tokens, MostRows(result), /*overflowed=*/false);
  }
  result.step = flights_.front().step;
  result.replays = flights_.front().replays;
  for (size_t h = 0; h < last_tokens_.size(); ++h) last_tokens_[h] = result.homes[h].tokens;
  flights_.pop_front();
  settled_.push_back(std::move(result));
  return absl::OkStatus();
}

absl::Status ReplayEngine::Replay() {
  for (size_t i = 1; i < flights_.size(); ++i) RETURN_IF_ERROR(engine_->Await().status());
  extra_steps_ += std::ssize(flights_);
  for (Flight& flight : flights_) {
    StepPlan plan = std::move(flight.plan);
    if (&flight == &flights_.front()) {
      for (size_t h = 0; h < plan.homes.size(); ++h) {
        plan.homes[h] = WithoutReferences(plan.homes[h], last_tokens_[h]);
      }
    }
    flight.plan = StepPlan();
    flight.room = 0;
    ++flight.replays;
    RETURN_IF_ERROR(SubmitInner(std::move(plan), /*room=*/0));
  }
  return absl::OkStatus();
}

absl::StatusOr<Recovery> ReplayEngine::Recover(absl::Duration timeout) {
  ASSIGN_OR_RETURN(Recovery recovery, engine_->Recover(timeout));
  flights_.clear();
  settled_.clear();
  for (std::vector<int32_t>& tokens : last_tokens_) tokens.clear();
  extra_steps_ = recovery.next_step - (last_step_ + 1);
  recovery.next_step = last_step_ + 1;
  return recovery;
}

std::vector<RankStatus> ReplayEngine::Ranks() const {
  std::vector<RankStatus> ranks = engine_->Ranks();
  const int64_t extra = extra_steps_;
  for (RankStatus& rank : ranks) rank.last_step = std::max<int64_t>(rank.last_step - extra, 0);
  return ranks;
}

}  // namespace soloist
