#include "engine/cluster/leader.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <numeric>

#include "base/status.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

using worker::v1::LeaderMessage;

// For workers to take the last word.
constexpr std::chrono::seconds kStopPatience{2};

int64_t Since(const Clock& clock, int64_t start_ns) { return clock.NowNs() - start_ns; }

}  // namespace

bool Leader::Lock::WaitUntil(std::chrono::steady_clock::time_point deadline, const std::function<bool()>& done) {
  Release();
  lock_.lock();
  return leader_.changed_.wait_until(lock_, deadline, done);
}

void Leader::Lock::Wait(const std::function<bool()>& done) {
  Release();
  lock_.lock();
  leader_.changed_.wait(lock_, done);
}

void Leader::Lock::Release() {
  const std::vector<std::function<void()>> after = std::exchange(leader_.after_, {});
  lock_.unlock();
  for (const auto& action : after) action();
}

void Leader::Tell(const LinkPtr& link, const LeaderMessage& message) {
  link->Enqueue(Encode(message));
  After([link] { link->Flush(); });
}

Leader::Leader(ClusterOptions options, EngineInfo info, Expectations expectations, const Clock& clock)
    : options_(std::move(options)),
      info_(std::move(info)),
      expectations_(std::move(expectations)),
      clock_(clock),
      slots_(info_.num_ranks),
      all_there_(ExpertPlacement::FromMap(info_.expert_rank, info_.num_ranks).value()),
      placement_(all_there_) {
  group_.resize(info_.num_ranks);
  std::iota(group_.begin(), group_.end(), 0);
  published_ = &infos_.emplace_back(info_);
  const EngineOptions& engine = options_.engine;
  // Workers may have another working directory.
  std::error_code error;
  const auto absolute = std::filesystem::absolute(engine.model_dir, error);
  config_.set_model_dir(error ? engine.model_dir : absolute.string());
  config_.set_load_format(engine.load_format);
  config_.set_dummy_seed(engine.dummy_seed);
  config_.set_max_model_len(info_.limits.max_model_len);
  config_.set_block_size(info_.limits.block_size);
  config_.set_max_tokens(info_.limits.max_tokens);
  config_.set_max_sequences(info_.limits.max_sequences);
  config_.set_kv_dtype(engine.kv_dtype);
  for (const int rank : info_.expert_rank) config_.add_expert_rank(rank);
  config_.set_masked_max_tokens(info_.masked_max_tokens);
  config_.set_collective_timeout_ms(absl::ToInt64Milliseconds(engine.collective_timeout));
  config_.set_profile_every(engine.profile_every);
}

absl::Status Leader::Listen() {
  ASSIGN_OR_RETURN(server_, ClusterServer::Listen(options_.address, *this));
  address_ = server_->address();
  coordinator_ = std::thread([this] { Coordinate(); });
  watch_ = std::thread([this] { Watch(); });
  return absl::OkStatus();
}

Leader::~Leader() {
  if (server_ == nullptr) return;
  {
    Lock lock(*this);
    stopping_ = true;
    LeaderMessage stop;
    stop.mutable_stop()->set_code(static_cast<int>(final_error_.code()));
    stop.mutable_stop()->set_reason(final_error_.ok() ? "the leader is stopping" : std::string(final_error_.message()));
    for (const auto& [_, member] : members_) {
      Tell(member->link, stop);
      After([link = member->link] { link->EndAfterWrites(); });
    }
    changed_.notify_all();
    done_.notify_all();
  }
  coordinator_.join();
  watch_.join();
  {
    Lock lock(*this);
    lock.WaitUntil(std::chrono::steady_clock::now() + kStopPatience, [this] { return members_.empty(); });
  }
  server_->Shutdown(absl::ZeroDuration());
}

absl::Status Leader::AwaitReady(const ClusterProgress& on_progress) {
  const auto deadline = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(options_.start_timeout);
  for (;;) {
    std::vector<RankProgress> progress;
    {
      Lock lock(*this);
      const auto tick = std::min(deadline, std::chrono::steady_clock::now() + std::chrono::milliseconds(100));
      lock.WaitUntil(tick, [this] { return whole_ || !final_error_.ok(); });
      if (!final_error_.ok()) return final_error_;
      if (whole_) {
        serving_ = true;
        needs_recovery_ = false;
        for (const Slot& slot : slots_) served_ids_.push_back(slot.member->id);
      } else if (std::chrono::steady_clock::now() >= deadline) {
        Fatal(DeadlineExceeded("after {} not all of {} ranks are ready at {}: {}",
                               absl::FormatDuration(options_.start_timeout), info_.num_ranks, address_, Missing()));
        return final_error_;
      }
      for (int r = 0; r < info_.num_ranks; ++r) {
        const MemberPtr& member = slots_[r].member;
        progress.push_back({.rank = r,
                            .joined = member != nullptr,
                            .loaded = member != nullptr && member->is_loaded,
                            .loaded_bytes = member != nullptr ? member->loaded_bytes : 0,
                            .total_bytes = member != nullptr ? member->total_bytes : 0});
      }
    }
    if (on_progress) on_progress(progress);
    if (serving_) return absl::OkStatus();
  }
}

ClusterCosts Leader::Costs() const { return {.steps = steps_, .submit_ns = submit_ns_, .result_ns = result_ns_}; }

absl::Status Leader::Submit(StepPlan plan) {
  const int64_t start_ns = clock_.NowNs();
  RETURN_IF_ERROR(intake_.CheckContents(plan));
  auto step = std::make_unique<PendingStep>();
  step->result.step = plan.step;
  step->result.homes.resize(info_.num_homes);
  step->submitted_ns = start_ns;
  for (const HomePlan& home : plan.homes) step->rows.push_back(home.num_logit_rows());
  std::shared_ptr<const std::vector<LinkPtr>> links;
  int64_t epoch = 0;
  {
    Lock lock(*this);
    if (!final_error_.ok()) return final_error_;
    if (needs_recovery_) return broken_;
    for (int r = 0; r < info_.num_ranks; ++r) {
      const bool there = (*serving_links_)[r] != nullptr;
      if (!there && plan.homes[r].num_tokens() > 0) {
        // Of a scheduler that has not heard of it.
        BreakGroup(
            fmt::format("step {}: {} tokens for home {}, which has no rank", plan.step, plan.homes[r].num_tokens(), r));
        return broken_;
      }
      step->done.push_back(!there);
      step->ranks_left += there ? 1 : 0;
    }
    RETURN_IF_ERROR(intake_.Accept(plan, static_cast<int>(pending_.size())));
    if (pending_.empty()) first_pending_ = plan.step;
    pending_.push_back(std::move(step));
    links = serving_links_;
    epoch = epoch_;
  }
  // A link that breaks meanwhile drops what it is given, and its loss is found as always.
  for (int r = 0; r < info_.num_ranks; ++r) {
    if ((*links)[r] != nullptr) (*links)[r]->Send(EncodeStep(epoch, std::move(plan.homes[r])));
  }
  ++steps_;
  submit_ns_ += Since(clock_, start_ns);
  return absl::OkStatus();
}

absl::StatusOr<StepResult> Leader::Await() {
  std::unique_lock lock(mutex_);
  if (pending_.empty() && final_error_.ok() && !needs_recovery_) return FailedPrecondition("no step is in flight");
  done_.wait(
      lock, [this] { return !final_error_.ok() || needs_recovery_ || stopping_ || pending_.front()->ranks_left == 0; });
  if (!final_error_.ok()) return final_error_;
  if (needs_recovery_) return broken_;
  StepResult result = std::move(pending_.front()->result);
  pending_.pop_front();
  ++first_pending_;
  return result;
}

absl::StatusOr<Recovery> Leader::Recover(absl::Duration timeout) {
  Lock lock(*this);
  if (final_error_.ok() && !needs_recovery_) return FailedPrecondition("no rank was lost: nothing to recover");
  lock.WaitUntil(std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(timeout),
                 [this] { return whole_ || !final_error_.ok(); });
  if (!final_error_.ok()) return final_error_;
  if (!whole_) return DeadlineExceeded("{}", Missing());
  Recovery recovery;
  recovery.next_step = intake_.last_step() + 1;
  for (int r = 0; r < info_.num_ranks; ++r) {
    const bool usable = std::ranges::binary_search(group_, r);
    const int64_t id = usable ? slots_[r].member->id : 0;
    recovery.home_usable.push_back(usable);
    recovery.home_kept.push_back(usable && id == served_ids_[r]);
    served_ids_[r] = id;
  }
  intake_.ForgetResults();
  needs_recovery_ = false;
  const auto used = std::ranges::count(recovery.home_usable, true);
  spdlog::info("cluster: {} of {} ranks go on after {:.2f} s, {} of them replaced", used, info_.num_ranks,
               static_cast<double>(Since(clock_, broken_ns_)) * 1e-9,
               used - std::ranges::count(recovery.home_kept, true));
  return recovery;
}

std::vector<RankStatus> Leader::Ranks() const {
  const std::lock_guard lock(mutex_);
  std::vector<RankStatus> ranks;
  for (int r = 0; r < info_.num_ranks; ++r) {
    const Slot& slot = slots_[r];
    RankStatus status{.rank = r, .message = StateOf(slot)};
    const Member* member = slot.member.get();
    if (member == nullptr) {
      status.state = slot.lost_ns > 0 ? RankState::kLost : RankState::kStarting;
    } else {
      const bool ready = member->ready_epoch > 0;
      status.state = ready ? RankState::kReady : slot.lost_ns > 0 ? RankState::kLost : RankState::kStarting;
      status.last_step = member->last_step;
      status.last_step_ns = member->last_step_ns;
      for (const auto& step : pending_) {
        if (!step->done[r]) {
          status.busy_since_ns = std::max(step->submitted_ns, member->last_step_ns);
          break;
        }
      }
      if (ready && whole_) status.message.clear();
    }
    ranks.push_back(std::move(status));
  }
  return ranks;
}

}  // namespace soloist
