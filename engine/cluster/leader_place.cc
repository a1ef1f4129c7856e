// Who is in the next group, and which rank has which expert there.
//
// All ranks, each with its own experts, wherever that can be. With OnLoss::kShrink a rank that nobody has taken for
// replace_timeout is given up: those that are left load its experts beside their own (KV caches stay as they are), and
// the group is formed without it. Who dials in then takes the place, loads and allocates while the others work; when it
// is ready they are interrupted, form a group with it, and free what was lent.
#include <algorithm>
#include <chrono>
#include <map>
#include <set>
#include <utility>

#include "base/status.h"
#include "engine/cluster/leader.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

using worker::v1::LeaderMessage;

// How late the end of replace_timeout is noticed.
constexpr std::chrono::milliseconds kLookAgain{50};

}  // namespace

absl::Status Leader::AwaitMembers(Lock& lock) {
  const auto over = [this] { return stopping_ || !final_error_.ok(); };
  while (!lock.WaitUntil(std::chrono::steady_clock::now() + kLookAgain, [&] { return over() || ChooseGroup(); })) {
  }
  return over() ? Cancelled("stopping") : absl::OkStatus();
}

// Sets the next group if there is one by now.
bool Leader::ChooseGroup() {
  std::vector<bool> present;
  std::vector<int> group;
  for (int r = 0; r < info_.num_ranks; ++r) {
    const Slot& slot = slots_[r];
    present.push_back(slot.member != nullptr && slot.member->is_loaded);
    if (present[r]) group.push_back(r);
    if (!present[r] && !MayGoWithout(slot)) return false;
  }
  if (group.empty()) return false;
  const bool all = std::ssize(group) == info_.num_ranks;
  ExpertPlacement placement = all ? all_there_ : ExpertPlacement::ShareOut(all_there_, placement_, present);
  if (const absl::Status room = CheckRoom(group, placement); !room.ok()) {
    cannot_shrink_ = std::string(room.message());
    spdlog::warn("cluster: cannot go on without those that are lost: {}", cannot_shrink_);
    return false;
  }
  if (all) {
    place_ = 0;
  } else if (group != group_ || placement.expert_rank() != placement_.expert_rank()) {
    place_ = ++last_place_;
  }
  group_ = std::move(group);
  placement_ = std::move(placement);
  return true;
}

bool Leader::MayGoWithout(const Slot& slot) const {
  if (options_.on_loss != OnLoss::kShrink || !serving_ || !cannot_shrink_.empty()) return false;
  return slot.given_up || (slot.member == nullptr && slot.lost_ns > 0 &&
                           clock_.NowNs() - slot.lost_ns >= absl::ToInt64Nanoseconds(options_.replace_timeout));
}

// Ranks of one host share its memory. RESOURCE_EXHAUSTED.
absl::Status Leader::CheckRoom(const std::vector<int>& group, const ExpertPlacement& placement) const {
  struct Room {
    int64_t added = 0, free_bytes = 0;
    std::string ranks;
  };
  std::map<std::string, Room> rooms;
  for (const int rank : group) {
    const Member& member = *slots_[rank].member;
    const std::vector<int> now = placement.ExpertsOf(rank);
    const auto is_new = [&](int expert) {
      const bool lent = member.place > 0 && placement_.expert_rank()[expert] == rank;
      return !lent && all_there_.expert_rank()[expert] != rank;
    };
    const int64_t added = std::ranges::count_if(now, is_new);
    if (added == 0) continue;
    Room& room = rooms[member.hello.host_memory() ? member.hello.host() : fmt::format("{}", rank)];
    room.free_bytes = room.ranks.empty() ? member.free_bytes : std::min(room.free_bytes, member.free_bytes);
    room.ranks += fmt::format("{}{}", room.ranks.empty() ? "" : ", ", rank);
    room.added += added;
  }
  for (const auto& [_, room] : rooms) {
    const int64_t bytes = room.added * expectations_.expert_bytes;
    if (bytes <= room.free_bytes) continue;
    return ResourceExhausted("rank {}: {} more experts need {} bytes, {} are free", room.ranks, room.added, bytes,
                             room.free_bytes);
  }
  return absl::OkStatus();
}

absl::Status Leader::PlaceAll(Lock& lock) {
  LeaderMessage place;
  place.mutable_place()->set_number(place_);
  for (const int rank : group_) place.mutable_place()->add_ranks(rank);
  for (const int rank : placement_.expert_rank()) place.mutable_place()->add_expert_rank(rank);
  for (const int rank : group_) {
    Member& member = *slots_[rank].member;
    if (std::exchange(member.asked_place, place_) != place_) Tell(member.link, place);
  }
  const auto taken = [this](const Member& m) { return m.place == place_; };
  lock.Wait([&] {
    return stopping_ || !final_error_.ok() || !All([this](const Member& m) { return m.asked_place == place_; }) ||
           All(taken);
  });
  return All(taken) ? absl::OkStatus() : Unavailable("a rank was lost, or could not take its place");
}

void Leader::OnPlaced(Member& member, const worker::v1::Placed& placed) {
  if (placed.number() != member.asked_place) return;
  if (placed.code() == 0) {
    member.place = placed.number();
    return;
  }
  member.asked_place = member.place = -1;
  const std::string why = fmt::format("rank {} ({}): {}", member.rank, Describe(member.hello), placed.message());
  spdlog::warn("cluster: {}", why);
  if (placed.number() > 0) cannot_shrink_ = why;
}

void Leader::AskToAllocate(Member& member) {
  if (std::exchange(member.asked_to_allocate, true)) return;
  LeaderMessage allocate;
  allocate.mutable_allocate()->set_num_blocks(info_.limits.num_blocks);
  Tell(member.link, allocate);
}

// Those that come back together are waited for together.
int Leader::RankToReturn() const {
  int found = -1;
  for (int r = 0; r < info_.num_ranks; ++r) {
    const Member* member = slots_[r].member.get();
    if (member == nullptr || std::ranges::binary_search(group_, r)) continue;
    if (!member->is_loaded || !member->is_allocated) return -1;
    if (found < 0) found = r;
  }
  return found;
}

// What the new group is, for those who submit steps and those who ask.
void Leader::Publish() {
  auto links = std::make_shared<std::vector<LinkPtr>>(slots_.size());
  for (int r = 0; r < info_.num_ranks; ++r) {
    Slot& slot = slots_[r];
    if (!std::ranges::binary_search(group_, r)) {
      slot.given_up = true;
      spdlog::warn("cluster: without rank {}: {}", r, ExpertsOf(r));
      continue;
    }
    slot.given_up = false;
    (*links)[r] = slot.member->link;
    slot.lost_ns = 0;
  }
  serving_links_ = std::move(links);
  const Member& first = *slots_[group_[0]].member;
  if (serving_ && placement_.expert_rank() == info_.expert_rank) return;
  info_.device = first.hello.device_name();
  info_.weight_bytes_per_rank = first.loaded.weight_bytes();
  info_.expert_rank = placement_.expert_rank();
  published_ = &infos_.emplace_back(info_);
}

std::string Leader::ExpertsOf(int rank) const {
  std::set<int> owners;
  for (const int expert : all_there_.ExpertsOf(rank)) owners.insert(placement_.expert_rank()[expert]);
  return fmt::format("its experts are with rank {}", fmt::join(owners, ", "));
}

}  // namespace soloist
