// The worker's group: what it is made of, and how the rank goes from one into the next.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "engine/worker/worker.h"

namespace soloist {

// Again where another group brings more rows or experts than the ops were made ready for.
absl::Status Worker::PrepareDevice() {
  const OpLimits limits = {
      .max_tokens = options_.limits.max_tokens,
      .max_expert_rows = std::max(prepared_.max_expert_rows, dispatcher_->max_expert_rows()),
      .max_logit_rows = options_.limits.max_logit_rows(),
      .max_sequences = options_.limits.max_sequences,
      .max_model_len = options_.limits.max_model_len,
      .hidden_size = config_.hidden_size,
      .expert_hidden_size = config_.expert_hidden_size,
      .gated_experts = config_.activation == Activation::kSiluGated,
      .vocab_size = config_.vocab_size,
      .num_heads = static_cast<int>(config_.num_heads),
      .num_kv_heads = static_cast<int>(config_.num_kv_heads),
      .head_dim = static_cast<int>(config_.head_dim),
      .kv_block_size = options_.limits.block_size,
      .fp8_kv = options_.kv_dtype == DType::kF8E4M3,
      .sliding_window = static_cast<int>(config_.sliding_window),
      .num_experts = static_cast<int>(config_.num_experts),
      .local_experts = std::max(prepared_.local_experts, static_cast<int>(experts_.layers.front().w_in.size())),
      .top_k = static_cast<int>(config_.experts_per_token)};
  if (prepared_.max_expert_rows == limits.max_expert_rows && prepared_.local_experts == limits.local_experts) {
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(device_->Prepare(limits));
  prepared_ = limits;
  return absl::OkStatus();
}

absl::Status Worker::CreateDispatcher() {
  ASSIGN_OR_RETURN(dispatcher_, CreateTokenDispatcher({.hidden_size = static_cast<int>(config_.hidden_size),
                                                       .num_experts = static_cast<int>(config_.num_experts),
                                                       .top_k = static_cast<int>(config_.experts_per_token),
                                                       .max_tokens_per_rank = options_.limits.max_tokens,
                                                       .dtype = device_->activation_dtype(),
                                                       .expert_rank = options_.expert_rank,
                                                       .masked_max_tokens = options_.masked_max_tokens,
                                                       .loopback_ranks = options_.loopback_ranks,
                                                       .loopback_experts = options_.loopback_experts},
                                                      *device_, *comm_));
  if (TracesGroups()) dispatcher_->queue().set_trace(&trace_);
  return absl::OkStatus();
}

absl::Status Worker::CreateTransformer() {
  ASSIGN_OR_RETURN(transformer_, Transformer::Create(config_,
                                                     {.max_tokens = options_.limits.max_tokens,
                                                      .max_logit_rows = options_.limits.max_logit_rows()},
                                                     *shared_, experts_, *device_, *dispatcher_));
  return absl::OkStatus();
}

void Worker::GatherExperts() {
  experts_ = {};
  experts_.layers.resize(own_.layers.size());
  const auto add = [this](const ExpertWeights& from, size_t index) {
    for (size_t l = 0; l < experts_.layers.size(); ++l) {
      experts_.layers[l].w_in.push_back(from.layers[l].w_in[index]);
      experts_.layers[l].w_out.push_back(from.layers[l].w_out[index]);
    }
  };
  auto next = added_.begin();
  for (size_t i = 0; i < own_ids_.size(); ++i) {
    for (; next != added_.end() && next->first < own_ids_[i]; ++next) add(next->second, 0);
    add(own_, i);
  }
  for (; next != added_.end(); ++next) add(next->second, 0);
}

bool Worker::HoldsExpert(int expert) const {
  return std::ranges::binary_search(own_ids_, expert) || added_.contains(expert);
}

void Worker::LeaveGroup(std::unique_ptr<Communicator> comm) {
  // What was in flight ends with the old group, and with its error.
  stream_->Synchronize().IgnoreError();
  graphs_.clear();
  transformer_.reset();
  dispatcher_.reset();
  comm_ = Traced(std::move(comm));
  submitted_ = 0;
  finished_ = 0;
}

absl::Status Worker::JoinGroup() {
  RETURN_IF_ERROR(CreateDispatcher());
  RETURN_IF_ERROR(PrepareDevice());
  return CreateTransformer();
}

absl::Status Worker::ReplaceCommunicator(std::unique_ptr<Communicator> comm) {
  RETURN_IF_ERROR(device_->BindThread());
  LeaveGroup(std::move(comm));
  return JoinGroup();
}

absl::Status Worker::ReplaceGroup(std::unique_ptr<Communicator> comm, std::vector<int> expert_rank,
                                  std::map<int, ExpertWeights> added) {
  RETURN_IF_ERROR(device_->BindThread());
  const int rank = comm->rank();
  LeaveGroup(std::move(comm));
  options_.expert_rank = std::move(expert_rank);
  added_.merge(added);
  std::erase_if(added_, [&](const auto& entry) { return options_.expert_rank[entry.first] != rank; });
  GatherExperts();
  CHECK_EQ(std::ssize(experts_.layers.front().w_in), std::ranges::count(options_.expert_rank, rank));
  const absl::Status joined = JoinGroup();
  if (joined.ok()) return joined;
  transformer_.reset();
  dispatcher_.reset();
  added_.clear();
  GatherExperts();
  return joined;
}

}  // namespace soloist
