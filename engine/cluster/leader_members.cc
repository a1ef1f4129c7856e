// The leader's workers: who may join, what they say, and how one is given up.
#include <algorithm>
#include <iterator>

#include "base/status.h"
#include "engine/cluster/leader.h"
#include "spdlog/spdlog.h"

namespace soloist {
namespace {

using worker::v1::LeaderMessage;
using worker::v1::WorkerMessage;

constexpr size_t kRefusalsKept = 4;

}  // namespace

std::string Leader::Describe(const worker::v1::Hello& hello) {
  return fmt::format("pid {} on {}", hello.pid(), hello.host().empty() ? "a host without a name" : hello.host());
}

Leader::MemberPtr Leader::Find(const LinkPtr& link) const {
  const auto found = members_.find(link.get());
  return found == members_.end() ? nullptr : found->second;
}

void Leader::OnMessage(const LinkPtr& link, grpc::ByteBuffer& message) {
  absl::StatusOr<WorkerFrame> frame = DecodeWorkerFrame(message);
  if (frame.ok() && frame->message.has_result()) return OnResult(link, *frame);
  Lock lock(*this);
  const MemberPtr member = Find(link);
  if (!frame.ok()) {
    if (member == nullptr) return Refuse(link, frame.status());
    return Lose(member, std::string(frame.status().message()));
  }
  if (frame->message.has_hello()) {
    if (member != nullptr) return Lose(member, "it has said hello twice");
    return OnHello(link, frame->message.hello());
  }
  // What a refused or lost worker still had to say.
  if (member == nullptr) return;
  member->last_heard_ns = clock_.NowNs();
  OnMemberMessage(member, frame->message);
}

void Leader::OnGone(const LinkPtr& link) {
  Lock lock(*this);
  if (const MemberPtr member = Find(link)) Lose(member, "its stream to the leader has broken");
}

void Leader::OnResult(const LinkPtr& link, const WorkerFrame& frame) {
  const int64_t start_ns = clock_.NowNs();
  absl::StatusOr<HomeResult> result = ParseHomeResult(frame.result);
  const worker::v1::Result& head = frame.message.result();
  bool all = false;
  {
    Lock lock(*this);
    const MemberPtr found = Find(link);
    if (found == nullptr || found->rank < 0) return;
    Member& member = *found;
    member.last_heard_ns = start_ns;
    if (head.epoch() != epoch_ || !group_alive_) return;
    const int64_t index = head.step() - first_pending_;
    if (index < 0 || index >= std::ssize(pending_) || pending_[index]->done[member.rank]) {
      return Lose(found, fmt::format("it sent a result of step {}, which nobody waits for", head.step()));
    }
    PendingStep& step = *pending_[index];
    absl::Status checked = result.status();
    if (checked.ok()) {
      checked = CheckHomeResult(*result, step.rows[member.rank], info_.limits.vocab_size,
                                int64_t{info_.num_layers} * info_.num_experts);
    }
    if (!checked.ok()) return Lose(found, fmt::format("step {}: {}", head.step(), checked.message()));
    member.last_step = head.step();
    member.last_step_ns = start_ns;
    if (step.first_done_ns == 0) step.first_done_ns = start_ns;
    step.done[member.rank] = true;
    step.result.device_ns = std::max(step.result.device_ns, result->device_ns);
    step.result.homes[member.rank] = *std::move(result);
    all = --step.ranks_left == 0;
  }
  if (all) done_.notify_all();
  result_ns_ += clock_.NowNs() - start_ns;
}

absl::Status Leader::CheckHello(const worker::v1::Hello& hello) const {
  const auto differ = [&](const char* what, const auto& theirs, const auto& ours) {
    return FailedPrecondition("{} has {} '{}', the leader '{}'", Describe(hello), what, theirs, ours);
  };
  if (hello.schema_revision() != kWorkerSchemaRevision) {
    return differ("schema revision", hello.schema_revision(), kWorkerSchemaRevision);
  }
  if (hello.version() != options_.version) return differ("version", hello.version(), options_.version);
  if (hello.build_id() != expectations_.build_id) return differ("build", hello.build_id(), expectations_.build_id);
  const DeviceOptions& device = options_.engine.device;
  if (hello.device_kind() != device.kind) return differ("device", hello.device_kind(), device.kind);
  if (hello.deterministic() != device.deterministic) {
    return differ("--deterministic", hello.deterministic(), device.deterministic);
  }
  if (hello.cpu_gemm() != device.cpu_gemm) return differ("--cpu-gemm", hello.cpu_gemm(), device.cpu_gemm);
  for (const auto& [link, other] : members_) {
    if (device.kind == "cpu" && hello.device_name() != other->hello.device_name()) {
      return FailedPrecondition(
          "{} computes on '{}', {} on '{}', whose results have other last bits: give the leader and all workers the "
          "same --cpu-gemm",
          Describe(hello), hello.device_name(), Describe(other->hello), other->hello.device_name());
    }
  }
  if (hello.group_size() != 0 && hello.group_size() != info_.num_ranks) {
    return differ("group size", hello.group_size(), info_.num_ranks);
  }
  const int wanted = hello.wanted_rank();
  if (wanted < -1 || wanted >= info_.num_ranks) {
    return OutOfRange("{} wants rank {}, allowed: 0 to {}", Describe(hello), wanted, info_.num_ranks - 1);
  }
  if (wanted >= 0 && slots_[wanted].member != nullptr) {
    return AlreadyExists("{} wants rank {}, which {} has", Describe(hello), wanted,
                         Describe(slots_[wanted].member->hello));
  }
  if (wanted >= 0 || std::ranges::any_of(slots_, [](const Slot& slot) { return slot.member == nullptr; })) {
    return absl::OkStatus();
  }
  const auto spares = std::ranges::count_if(members_, [](const auto& entry) { return entry.second->rank < 0; });
  if (spares < options_.spares) return absl::OkStatus();
  return ResourceExhausted("{} is one too many: {} ranks and {} of {} spares are there", Describe(hello),
                           info_.num_ranks, spares, options_.spares);
}

void Leader::OnHello(const LinkPtr& link, const worker::v1::Hello& hello) {
  if (stopping_ || !final_error_.ok()) return Refuse(link, Unavailable("the leader is stopping"));
  if (const absl::Status status = CheckHello(hello); !status.ok()) return Refuse(link, status);
  auto member = std::make_shared<Member>();
  member->link = link;
  member->id = next_id_++;
  member->hello = hello;
  member->last_heard_ns = clock_.NowNs();
  members_[link.get()] = member;
  spdlog::debug("cluster: {} has joined: {}, {:.1f} GB free, PCI {}, NUMA node {}, networks {}", Describe(hello),
                hello.device_name(), static_cast<double>(hello.free_bytes()) * 1e-9, hello.pci_address(),
                hello.numa_node(), fmt::join(hello.network_interfaces(), " "));
  if (hello.wanted_rank() >= 0) return Assign(member, hello.wanted_rank());
  FillSlots();
  if (member->rank >= 0) return;
  LeaderMessage spare;
  spare.mutable_assignment()->set_rank(-1);
  spare.mutable_assignment()->set_num_ranks(info_.num_ranks);
  spare.mutable_assignment()->set_spare(true);
  *spare.mutable_assignment()->mutable_config() = config_;
  Tell(link, spare);
}

void Leader::Assign(const MemberPtr& member, int rank) {
  member->rank = rank;
  slots_[rank].member = member;
  cannot_shrink_.clear();
  LeaderMessage message;
  message.mutable_assignment()->set_rank(rank);
  message.mutable_assignment()->set_num_ranks(info_.num_ranks);
  *message.mutable_assignment()->mutable_config() = config_;
  Tell(member->link, message);
  if (serving_) spdlog::info("cluster: {} becomes rank {}", Describe(member->hello), rank);
  changed_.notify_all();
}

// Open slots go to those who have none, whoever has read the pages first.
void Leader::FillSlots() {
  for (int r = 0; r < info_.num_ranks; ++r) {
    if (slots_[r].member != nullptr) continue;
    MemberPtr best;
    for (const auto& [_, member] : members_) {
      if (member->rank >= 0 || member->hello.wanted_rank() >= 0) continue;
      const auto key = [](const Member& m) { return std::pair(!m.spare_ready, m.id); };
      if (best == nullptr || key(*member) < key(*best)) best = member;
    }
    if (best == nullptr) return;
    Assign(best, r);
  }
}

void Leader::OnMemberMessage(const MemberPtr& member, const WorkerMessage& message) {
  const auto answer = [this](const auto& answers) {
    for (const auto& [link, reply] : answers) Tell(link, reply);
  };
  switch (message.kind_case()) {
    case WorkerMessage::kLoading:
      member->loaded_bytes = message.loading().loaded_bytes();
      member->total_bytes = message.loading().total_bytes();
      return;
    case WorkerMessage::kLoaded:
      OnLoaded(member, message.loaded());
      break;
    case WorkerMessage::kAllocated:
      member->is_allocated = message.allocated().num_blocks() == info_.limits.num_blocks;
      break;
    case WorkerMessage::kBootstrapSet:
      return answer(bootstrap_.Set(member->link, message.bootstrap_set()));
    case WorkerMessage::kBootstrapGet:
      return answer(bootstrap_.Get(member->link, message.bootstrap_get()));
    case WorkerMessage::kCommReady:
      member->joined_epoch = message.comm_ready().epoch();
      member->transport = message.comm_ready().transport();
      member->order_hash = message.comm_ready().order_hash();
      break;
    case WorkerMessage::kReady:
      member->ready_epoch = message.ready().epoch();
      break;
    case WorkerMessage::kAborted:
      member->aborted_epoch = message.aborted().epoch();
      member->free_bytes = message.aborted().free_bytes();
      break;
    case WorkerMessage::kPlaced:
      OnPlaced(*member, message.placed());
      break;
    case WorkerMessage::kGroupFailed:
      OnGroupFailed(*member, message.group_failed());
      break;
    case WorkerMessage::kFailed: {
      const absl::Status status(static_cast<absl::StatusCode>(message.failed().code()), message.failed().message());
      // Before the first start there is no better place to wait for.
      if (!serving_ && member->rank >= 0) {
        Fatal(Annotate(status, fmt::format("rank {} ({})", member->rank, Describe(member->hello))));
      }
      return Lose(member, std::string(status.message()));
    }
    case WorkerMessage::kSpareReady:
      member->spare_ready = true;
      spdlog::info("cluster: {} is a spare, {:.1f} MB of the checkpoint read", Describe(member->hello),
                   static_cast<double>(message.spare_ready().read_bytes()) * 1e-6);
      break;
    default:
      return;  // a beat
  }
  changed_.notify_all();
}

void Leader::OnLoaded(const MemberPtr& member, const worker::v1::Loaded& loaded) {
  member->loaded = loaded;
  member->loaded_bytes = member->total_bytes = loaded.weight_bytes();
  absl::Status status = CheckLoaded(*member);
  // Later than the first start, the number of blocks stands.
  if (status.ok() && info_.limits.num_blocks > 0) status = CheckMemory(*member);
  if (status.ok()) {
    member->is_loaded = true;
    member->free_bytes = loaded.free_bytes();
    cannot_shrink_.clear();
    // The group may be at work without it: what takes time is done before that is interrupted.
    if (info_.limits.num_blocks > 0) AskToAllocate(*member);
    return;
  }
  Refuse(Drop(member, "refused")->link, status);
}

absl::Status Leader::CheckLoaded(const Member& member) {
  const worker::v1::Loaded& loaded = member.loaded;
  if (expectations_.checkpoint_hash.empty()) expectations_.checkpoint_hash = loaded.checkpoint_hash();
  const auto differ = [&](const char* what, const std::string& theirs, const std::string& ours) {
    return FailedPrecondition("rank {} ({}) has another {}: {}, expected {}", member.rank, Describe(member.hello), what,
                              theirs, ours);
  };
  if (loaded.config_hash() != expectations_.config_hash) {
    return differ("config.json", loaded.config_hash(), expectations_.config_hash);
  }
  if (loaded.checkpoint_hash() != expectations_.checkpoint_hash) {
    return differ("checkpoint", loaded.checkpoint_hash(), expectations_.checkpoint_hash);
  }
  return absl::OkStatus();
}

// What a rank may count on: ranks of one host share its memory.
int64_t Leader::FreeBytes(const Member& member) const {
  if (!member.hello.host_memory()) return member.loaded.free_bytes();
  const auto sharing = std::ranges::count_if(slots_, [&](const Slot& slot) {
    return slot.member != nullptr && slot.member->hello.host() == member.hello.host() && !slot.member->is_allocated;
  });
  return member.loaded.free_bytes() / std::max<int64_t>(1, sharing);
}

absl::Status Leader::CheckMemory(const Member& member) const {
  const PlanLimits& limits = info_.limits;
  const int64_t needed = int64_t{limits.num_blocks} * limits.block_size * info_.kv_bytes_per_token;
  if (needed <= FreeBytes(member)) return absl::OkStatus();
  return ResourceExhausted("rank {} ({}) has no room: {} KV blocks need {} bytes, {} are free", member.rank,
                           Describe(member.hello), limits.num_blocks, needed, FreeBytes(member));
}

void Leader::OnGroupFailed(const Member& member, const worker::v1::GroupFailed& failed) {
  if (failed.epoch() != epoch_ || !group_alive_) return;
  const absl::Status status(static_cast<absl::StatusCode>(failed.code()), failed.message());
  if (failed.step() == 0) {
    join_error_ = Annotate(status, fmt::format("rank {} ({})", member.rank, Describe(member.hello)));
  }
  BreakGroup(failed.step() == 0 ? fmt::format("rank {} cannot join the group: {}", member.rank, failed.message())
                                : fmt::format("rank {}, step {}: {}", member.rank, failed.step(), failed.message()));
}

void Leader::Refuse(const LinkPtr& link, const absl::Status& reason) {
  spdlog::warn("cluster: refused: {}", reason.message());
  refusals_.emplace_back(reason.message());
  if (refusals_.size() > kRefusalsKept) refusals_.pop_front();
  LeaderMessage stop;
  stop.mutable_stop()->set_code(static_cast<int>(reason.code()));
  stop.mutable_stop()->set_reason(std::string(reason.message()));
  Tell(link, stop);
  After([link] { link->EndAfterWrites(); });
  changed_.notify_all();
}

Leader::MemberPtr Leader::Drop(const MemberPtr& member, const std::string& why) {
  MemberPtr dropped = std::move(members_.extract(member->link.get()).mapped());
  if (dropped->rank >= 0) {
    Slot& slot = slots_[dropped->rank];
    slot.member.reset();
    if (slot.lost_ns == 0) slot.lost_ns = clock_.NowNs();
    cannot_shrink_.clear();
    slot.why = fmt::format("{}: {}", Describe(dropped->hello), why);
  }
  changed_.notify_all();
  return dropped;
}

void Leader::Lose(const MemberPtr& lost, const std::string& why) {
  const MemberPtr member = Drop(lost, why);
  if (stopping_) return;
  After([link = member->link] { link->Cut(); });
  if (options_.on_lost) {
    After([this, host = member->hello.host(), pid = member->hello.pid()] { options_.on_lost(host, pid); });
  }
  if (member->rank < 0) {
    spdlog::warn("cluster: a spare is lost ({}): {}", Describe(member->hello), why);
    return;
  }
  spdlog::warn("cluster: rank {} is lost ({}): {}", member->rank, Describe(member->hello), why);
  if (member->joining_epoch == epoch_) BreakGroup(fmt::format("rank {} is lost: {}", member->rank, why));
  FillSlots();
}

}  // namespace soloist
