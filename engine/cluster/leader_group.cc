// The leader's group: how the ranks become one, how that is found broken, and how it is made whole again.
#include <algorithm>
#include <chrono>
#include <map>
#include <utility>

#include "base/status.h"
#include "engine/cluster/leader.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

using std::chrono::steady_clock;
using worker::v1::LeaderMessage;

constexpr std::chrono::milliseconds kWatchPeriod{50};
// A watch that was held up for so long knows nothing of the others' silence.
constexpr int64_t kHeldUpNs = 500'000'000;
// Between two attempts to form a group.
constexpr std::chrono::milliseconds kRetryAfter{200};
// Beyond what the communicator itself takes to give up.
constexpr absl::Duration kJoinPatience = absl::Seconds(5);
constexpr int kMaxFailedStarts = 3;

// Larger is faster; those that nobody has heard of are slow.
int Speed(const std::string& transport) {
  static const std::map<std::string, int> kSpeeds = {{"tcp", 0}, {"socket", 0}, {"ib", 1},   {"shm", 2},
                                                     {"p2p", 3}, {"nvlink", 4}, {"local", 5}};
  const auto it = kSpeeds.find(transport);
  return it == kSpeeds.end() ? 0 : it->second;
}

steady_clock::time_point In(absl::Duration duration) {
  return steady_clock::now() + absl::ToChronoNanoseconds(duration);
}

// Waiting longer does not help.
bool IsHopeless(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kResourceExhausted:
      return true;
    default:
      return false;
  }
}

}  // namespace

bool Leader::All(const std::function<bool(const Member&)>& is) const {
  return std::ranges::all_of(group_,
                             [&](int rank) { return slots_[rank].member != nullptr && is(*slots_[rank].member); });
}

void Leader::Fatal(const absl::Status& status) {
  if (!final_error_.ok() || stopping_) return;
  final_error_ = status;
  spdlog::error("cluster: {}", status.message());
  whole_ = false;
  pending_.clear();
  changed_.notify_all();
  done_.notify_all();
}

void Leader::BreakGroup(const std::string& why) {
  if (!group_alive_) return;
  group_alive_ = false;
  whole_ = false;
  if (serving_ && !needs_recovery_) {
    needs_recovery_ = true;
    broken_ = Unavailable("{}", why);
    broken_ns_ = clock_.NowNs();
  }
  pending_.clear();
  LeaderMessage abort;
  abort.mutable_abort_group()->set_epoch(epoch_);
  abort.mutable_abort_group()->set_reason(why);
  for (const Slot& slot : slots_) {
    if (slot.member != nullptr && slot.member->joining_epoch == epoch_) Tell(slot.member->link, abort);
  }
  changed_.notify_all();
  done_.notify_all();
}

void Leader::Coordinate() {
  Lock lock(*this);
  const auto over = [this] { return stopping_ || !final_error_.ok(); };
  while (!over()) {
    if (whole_) {
      lock.Wait([&] { return over() || !whole_ || RankToReturn() >= 0; });
      if (whole_ && !over()) BreakGroup(fmt::format("rank {} takes its place again", RankToReturn()));
      continue;
    }
    const absl::Status status = Assemble(lock);
    if (status.ok() || over()) continue;
    spdlog::debug("cluster: not whole: {}", status.message());
    lock.WaitUntil(steady_clock::now() + kRetryAfter, over);
  }
}

absl::Status Leader::Assemble(Lock& lock) {
  const auto over = [this] { return stopping_ || !final_error_.ok(); };
  LeaveOldGroup(lock);
  RETURN_IF_ERROR(AwaitMembers(lock));
  RETURN_IF_ERROR(PlaceAll(lock));
  RETURN_IF_ERROR(AllocateAll(lock));
  RETURN_IF_ERROR(FormGroup(lock));
  if (const absl::Status checked = CheckGroup(); !checked.ok()) {
    Fatal(checked);
    return checked;
  }
  LeaderMessage warm_up;
  warm_up.mutable_warm_up()->set_epoch(epoch_);
  for (const int rank : group_) Tell(slots_[rank].member->link, warm_up);
  lock.Wait([&] { return over() || !group_alive_ || All([&](const Member& m) { return m.ready_epoch == epoch_; }); });
  if (over() || !group_alive_) return Unavailable("the group broke while it was warming up");
  Publish();
  whole_ = true;
  changed_.notify_all();
  spdlog::info("cluster: {} ranks form group {} over {}", group_.size(), epoch_, slots_[group_[0]].member->transport);
  return absl::OkStatus();
}

// Whoever does not come out of the old group's collectives hangs somewhere else.
void Leader::LeaveOldGroup(Lock& lock) {
  if (epoch_ == 0) return;
  const auto is_out = [this](const Slot& slot) {
    return slot.member == nullptr || slot.member->joining_epoch != epoch_ || slot.member->aborted_epoch == epoch_;
  };
  lock.WaitUntil(In(options_.abort_timeout),
                 [&] { return stopping_ || !final_error_.ok() || std::ranges::all_of(slots_, is_out); });
  if (stopping_) return;
  for (const Slot& slot : slots_) {
    if (is_out(slot)) continue;
    Lose(slot.member,
         fmt::format("it has not left the broken group within {}", absl::FormatDuration(options_.abort_timeout)));
  }
}

absl::Status Leader::AllocateAll(Lock& lock) {
  if (info_.limits.num_blocks == 0) {
    int64_t free_bytes = INT64_MAX;
    for (const int rank : group_) free_bytes = std::min(free_bytes, FreeBytes(*slots_[rank].member));
    absl::StatusOr<int32_t> blocks = ChooseBlocks(options_.engine, info_, free_bytes);
    absl::Status status = blocks.status();
    if (status.ok()) {
      info_.limits.num_blocks = *blocks;
      for (const int rank : group_) status.Update(CheckMemory(*slots_[rank].member));
    }
    if (!status.ok()) {
      Fatal(status);
      return status;
    }
  }
  for (const int rank : group_) AskToAllocate(*slots_[rank].member);
  lock.Wait([&] {
    return stopping_ || !final_error_.ok() || !All([](const Member& m) { return m.asked_to_allocate; }) ||
           All([](const Member& m) { return m.is_allocated; });
  });
  return All([](const Member& m) { return m.is_allocated; }) ? absl::OkStatus()
                                                             : Unavailable("a rank was lost before it could join");
}

absl::Status Leader::FormGroup(Lock& lock) {
  ++epoch_;
  group_alive_ = true;
  join_error_ = absl::OkStatus();
  bootstrap_.Start(epoch_);
  LeaderMessage join;
  join.mutable_join_group()->set_epoch(epoch_);
  for (const int rank : group_) {
    slots_[rank].member->joining_epoch = epoch_;
    Tell(slots_[rank].member->link, join);
  }
  const auto joined = [this](const Member& m) { return m.joined_epoch == epoch_; };
  const bool in_time = lock.WaitUntil(In(options_.engine.collective_timeout + kJoinPatience),
                                      [&] { return stopping_ || !final_error_.ok() || !group_alive_ || All(joined); });
  if (group_alive_ && All(joined)) return absl::OkStatus();
  if (!in_time) {
    std::string late;
    for (const int r : group_) {
      if (slots_[r].member != nullptr && !joined(*slots_[r].member)) late += fmt::format(" {}", r);
    }
    BreakGroup(fmt::format("these ranks have not joined the group in time:{}", late));
  }
  if (join_error_.ok()) return Unavailable("the group broke while it was forming");
  if (!serving_ && (IsHopeless(join_error_) || ++failed_starts_ >= kMaxFailedStarts)) Fatal(join_error_);
  return join_error_;
}

absl::Status Leader::CheckGroup() const {
  const Member& first = *slots_[group_[0]].member;
  const std::string& required = options_.require_transport;
  for (const int rank : group_) {
    const Member& member = *slots_[rank].member;
    if (member.order_hash != first.order_hash) {
      return FailedPrecondition("rank {} ({}) would make other collectives than rank {}: order {}, not {}", member.rank,
                                Describe(member.hello), first.rank, member.order_hash, first.order_hash);
    }
    if (required != "any" && Speed(member.transport) < Speed(required)) {
      return FailedPrecondition("rank {} ({}) exchanges its bytes over {}, slower than the required {}", member.rank,
                                Describe(member.hello), member.transport, required);
    }
  }
  return absl::OkStatus();
}

void Leader::Watch() {
  Lock lock(*this);
  int64_t last_ns = clock_.NowNs();
  while (!stopping_) {
    lock.WaitUntil(steady_clock::now() + kWatchPeriod, [this] { return stopping_; });
    const int64_t now_ns = clock_.NowNs();
    if (now_ns - last_ns > kHeldUpNs) {
      spdlog::warn("cluster: the leader was held up for {} ms", (now_ns - last_ns) / 1'000'000);
      for (const auto& [_, member] : members_) member->last_heard_ns = now_ns;
      for (const auto& step : pending_) {
        step->submitted_ns = now_ns;
        if (step->first_done_ns > 0) step->first_done_ns = now_ns;
      }
    }
    last_ns = now_ns;
    CheckSilence(now_ns);
    CheckSteps(now_ns);
  }
}

void Leader::CheckSilence(int64_t now_ns) {
  const int64_t limit_ns = absl::ToInt64Nanoseconds(options_.silence_timeout);
  std::vector<MemberPtr> silent;
  for (const auto& [_, member] : members_) {
    if (now_ns - member->last_heard_ns > limit_ns) silent.push_back(member);
  }
  for (const MemberPtr& member : silent) {
    Lose(member, fmt::format("silent for {} ms", (now_ns - member->last_heard_ns) / 1'000'000));
  }
}

void Leader::CheckSteps(int64_t now_ns) {
  if (pending_.empty()) return;
  const PendingStep& step = *pending_.front();
  const int64_t late_ns = absl::ToInt64Nanoseconds(options_.step_timeout);
  if (step.first_done_ns > 0 && now_ns - step.first_done_ns > late_ns) {
    std::vector<MemberPtr> late;
    for (int r = 0; r < info_.num_ranks; ++r) {
      if (!step.done[r] && slots_[r].member != nullptr) late.push_back(slots_[r].member);
    }
    const std::string why =
        fmt::format("step {}: {} ms behind the first rank", first_pending_, (now_ns - step.first_done_ns) / 1'000'000);
    for (const MemberPtr& member : late) Lose(member, why);
    return;
  }
  const absl::Duration age_limit = options_.engine.collective_timeout + kJoinPatience;
  if (now_ns - step.submitted_ns > absl::ToInt64Nanoseconds(age_limit)) {
    BreakGroup(fmt::format("no rank has finished step {} within {}", first_pending_, absl::FormatDuration(age_limit)));
  }
}

std::string Leader::StateOf(const Slot& slot) const {
  const Member* member = slot.member.get();
  std::string text;
  if (slot.lost_ns > 0) {
    text = fmt::format("lost {:.1f} s ago ({}); ", static_cast<double>(clock_.NowNs() - slot.lost_ns) * 1e-9, slot.why);
  }
  if (slot.given_up && whole_) text += ExpertsOf(static_cast<int>(&slot - slots_.data())) + "; ";
  if (member == nullptr && slot.lost_ns > 0) {
    text += "waiting for a worker to take its place";
    return cannot_shrink_.empty() ? text : text + "; the others cannot take its experts: " + cannot_shrink_;
  }
  if (member == nullptr) return text + "has not joined";
  if (!member->is_loaded) {
    return text + fmt::format("{} is loading, {:.1f} of {:.1f} MB", Describe(member->hello),
                              static_cast<double>(member->loaded_bytes) * 1e-6,
                              static_cast<double>(member->total_bytes) * 1e-6);
  }
  if (member->joined_epoch != epoch_ || epoch_ == 0) return text + "waits for its group";
  if (member->ready_epoch != epoch_) return text + "warms up";
  return text + "is ready";
}

std::string Leader::Missing() const {
  std::string text, absent;
  for (int r = 0; r < info_.num_ranks; ++r) {
    const MemberPtr& member = slots_[r].member;
    if (member == nullptr && slots_[r].lost_ns == 0) absent += fmt::format("{}{}", absent.empty() ? "" : ", ", r);
  }
  if (!absent.empty()) text = fmt::format("no worker has joined as rank {}", absent);
  for (int r = 0; r < info_.num_ranks; ++r) {
    const MemberPtr& member = slots_[r].member;
    if (member == nullptr && slots_[r].lost_ns == 0) continue;
    if (member != nullptr && epoch_ > 0 && member->ready_epoch == epoch_) continue;
    // When all have loaded, the group is what is missing; else those that have not.
    const auto loaded = [](const Slot& slot) { return slot.member != nullptr && slot.member->is_loaded; };
    if (loaded(slots_[r]) && !std::ranges::all_of(slots_, loaded)) continue;
    text += fmt::format("{}rank {} {}", text.empty() ? "" : "; ", r, StateOf(slots_[r]));
  }
  if (!join_error_.ok()) text += fmt::format("; the group could not be formed: {}", join_error_.message());
  for (const std::string& refusal : refusals_) text += fmt::format("; refused: {}", refusal);
  return text;
}

}  // namespace soloist
