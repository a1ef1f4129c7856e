// The group's part of a WorkerSession: joining an incarnation of it, and getting out of it.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/cluster/absent_communicator.h"
#include "engine/cluster/fingerprint.h"
#include "engine/cluster/group_check.h"
#include "engine/cluster/worker_session.h"
#include "engine/model/footprint.h"
#include "engine/model/transformer.h"
#include "engine/worker/engine_options.h"
#include "kernels/device.h"

namespace soloist {

using worker::v1::WorkerMessage;

void WorkerSession::Interrupt(int64_t epoch, const absl::Status& reason) {
  std::shared_ptr<StreamBootstrapStore> store;
  {
    const std::lock_guard lock(group_mutex_);
    if (epoch <= aborted_epoch_) return;
    aborted_epoch_ = epoch;
    abort_reason_ = reason;
    if (epoch_ > epoch) return;
    store = store_;
    if (comm_ != nullptr) comm_->Abort(reason);
  }
  if (store != nullptr) store->Close(reason);
}

absl::Status WorkerSession::ReplaceCommunicator(std::unique_ptr<Communicator> comm) {
  {
    const std::lock_guard lock(group_mutex_);
    comm_ = nullptr;
  }
  Communicator* const next = comm.get();
  RETURN_IF_ERROR(worker_->ReplaceCommunicator(std::move(comm)));
  const std::lock_guard lock(group_mutex_);
  comm_ = next;
  // An abort that came meanwhile has seen no communicator.
  if (epoch_ <= aborted_epoch_) comm_->Abort(abort_reason_);
  return absl::OkStatus();
}

std::unique_ptr<Communicator> WorkerSession::AbsentCommunicator() const {
  return CreateAbsentCommunicator(group_rank_, place_.ranks_size());
}

absl::Status WorkerSession::Place(const worker::v1::Place& place) {
  if (worker_ == nullptr) return Internal("worker: asked to take a place before it has loaded");
  const absl::Status taken = TakePlace(place);
  WorkerMessage placed;
  placed.mutable_placed()->set_number(place.number());
  placed.mutable_placed()->set_code(static_cast<int>(taken.code()));
  placed.mutable_placed()->set_message(std::string(taken.message()));
  Send(placed);
  return absl::OkStatus();
}

absl::Status WorkerSession::TakePlace(const worker::v1::Place& place) {
  const auto index = [&place](int rank) {
    return static_cast<int>(std::ranges::find(place.ranks(), rank) - place.ranks().begin());
  };
  std::vector<int> expert_rank, missing;
  for (const int32_t rank : place.expert_rank()) {
    if (rank == rank_ && !worker_->HoldsExpert(static_cast<int>(std::ssize(expert_rank)))) {
      missing.push_back(static_cast<int>(std::ssize(expert_rank)));
    }
    expert_rank.push_back(index(rank));
  }
  if (index(rank_) == place.ranks_size() || std::ssize(expert_rank) != model_.num_experts) {
    return Internal("a place of {} ranks and {} experts, without rank {}", place.ranks_size(), expert_rank.size(),
                    rank_);
  }
  Device& device = worker_->device();
  const int64_t bytes = ExpertWeightBytes(model_, std::ssize(missing));
  if (bytes > device.FreeBytes()) {
    return ResourceExhausted("{} more experts need {} bytes, {} are free on {}", missing.size(), bytes,
                             device.FreeBytes(), device.Name());
  }
  std::map<int, ExpertWeights> added;
  if (!missing.empty()) {
    ASSIGN_OR_RETURN(const auto source, OpenWeights(model_, model_dir_, config_.load_format(), config_.dummy_seed()));
    LoadProgress progress;
    for (const int expert : missing) {
      ASSIGN_OR_RETURN(added[expert], LoadExpertWeights(model_, *source, {expert}, device, LoadThreads(), progress));
    }
  }
  place_ = place;
  group_rank_ = index(rank_);
  {
    const std::lock_guard lock(group_mutex_);
    comm_ = nullptr;
  }
  return worker_->ReplaceGroup(AbsentCommunicator(), std::move(expert_rank), std::move(added));
}

// What goes wrong with the group is told, and the rank waits for the next one; what goes wrong here ends the worker.
absl::Status WorkerSession::JoinGroup(int64_t epoch) {
  if (worker_ == nullptr) return Internal("worker: asked to join before it has loaded");
  RETURN_IF_ERROR(ReplaceCommunicator(AbsentCommunicator()));
  auto store = std::make_shared<StreamBootstrapStore>(epoch, [this](const WorkerMessage& message) { Send(message); });
  {
    const std::lock_guard lock(group_mutex_);
    epoch_ = epoch;
    if (epoch <= aborted_epoch_) store->Close(abort_reason_);
    store_ = store;
  }
  const absl::Duration timeout = absl::Milliseconds(config_.collective_timeout_ms());
  auto comm = options_.make_comm(group_rank_, place_.ranks_size(), *store, worker_->device(), timeout);
  if (!comm.ok()) {
    SendGroupFailed(epoch, 0, comm.status());
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(ReplaceCommunicator(*std::move(comm)));
  if (const absl::Status checked = CheckCollectives(worker_->comm(), worker_->device(), 2 * epoch); !checked.ok()) {
    SendGroupFailed(epoch, 0, checked);
    return absl::OkStatus();
  }
  WorkerMessage ready;
  ready.mutable_comm_ready()->set_epoch(epoch);
  ready.mutable_comm_ready()->set_transport(worker_->comm().transport());
  ready.mutable_comm_ready()->set_order_hash(OrderHash());
  Send(ready);
  return absl::OkStatus();
}

// All that decides which collectives a step of this rank makes, in which order and of which size.
std::string WorkerSession::OrderHash() const {
  Fingerprint hash;
  for (const int64_t number : {int64_t{place_.ranks_size()}, model_.num_layers, model_.hidden_size, model_.num_experts,
                               model_.experts_per_token, int64_t{limits_.max_tokens}, int64_t{limits_.max_sequences},
                               config_.masked_max_tokens(), static_cast<int64_t>(config_.profile_every()),
                               static_cast<int64_t>(worker_->device().activation_dtype())}) {
    hash.Add(number);
  }
  hash.Add(kCollectiveOrder);
  for (const int32_t rank : place_.ranks()) hash.Add(int64_t{rank});
  for (const int32_t rank : place_.expert_rank()) hash.Add(int64_t{rank});
  return hash.Hex();
}

absl::Status WorkerSession::LeaveGroup(int64_t epoch) {
  WorkerMessage aborted;
  aborted.mutable_aborted()->set_epoch(epoch);
  if (worker_ != nullptr && epoch_ <= epoch) {
    runner_->WaitIdle();
    RETURN_IF_ERROR(ReplaceCommunicator(AbsentCommunicator()));
    const std::lock_guard lock(group_mutex_);
    store_.reset();
  }
  if (worker_ != nullptr) aborted.mutable_aborted()->set_free_bytes(worker_->device().FreeBytes());
  Send(aborted);
  return absl::OkStatus();
}

void WorkerSession::SendGroupFailed(int64_t epoch, int64_t step, const absl::Status& status) {
  WorkerMessage failed;
  failed.mutable_group_failed()->set_epoch(epoch);
  failed.mutable_group_failed()->set_step(step);
  failed.mutable_group_failed()->set_code(static_cast<int>(status.code()));
  failed.mutable_group_failed()->set_message(std::string(status.message()));
  Send(failed);
}

}  // namespace soloist
