// What a dispatcher's options must be.
#include <algorithm>
#include <cstdint>
#include <span>

#include "base/status.h"
#include "engine/comm/all_to_all_dispatcher.h"

namespace soloist {
namespace {

// What holds of loopback options only; the rest has been checked.
absl::Status ValidateLoopback(const DispatcherOptions& options, int comm_size) {
  if (options.loopback_ranks == 0) {
    return options.loopback_experts.empty() ? absl::OkStatus()
                                            : InvalidArgument("dispatcher: loopback_experts without loopback_ranks");
  }
  if (comm_size != 1) return InvalidArgument("dispatcher: loopback in a group of {} ranks, allowed: 1", comm_size);
  const auto owned = [&](int rank) { return std::ranges::count(options.expert_rank, rank); };
  for (int rank = 0; rank < options.loopback_ranks; ++rank) {
    if (owned(rank) != owned(0)) {
      return InvalidArgument("dispatcher: loopback rank {} owns {} experts and rank 0 {}: all must own as many", rank,
                             owned(rank), owned(0));
    }
  }
  const std::span<const int32_t> experts = options.loopback_experts;
  if (experts.empty()) return absl::OkStatus();
  const int64_t top_k = options.top_k, wanted = options.max_tokens_per_rank * top_k;
  if (std::ssize(experts) != wanted) {
    return InvalidArgument("dispatcher: loopback_experts has {} entries, expected {}", experts.size(), wanted);
  }
  for (int64_t i = 0; i < wanted; ++i) {
    if (experts[i] < 0 || experts[i] >= options.num_experts) {
      return InvalidArgument("dispatcher: loopback_experts holds {}, of {} experts", experts[i], options.num_experts);
    }
    if (std::ranges::count(experts.subspan(i / top_k * top_k, top_k), experts[i]) != 1) {
      return InvalidArgument("dispatcher: loopback_experts chooses expert {} twice in row {}", experts[i], i / top_k);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckDispatcherOptions(const DispatcherOptions& options, int comm_size) {
  if (options.loopback_ranks < 0) return InvalidArgument("dispatcher: loopback_ranks is {}", options.loopback_ranks);
  const int ranks = options.loopback_ranks > 0 ? options.loopback_ranks : comm_size;
  if (options.hidden_size < 1 || options.num_experts < 1 || options.max_tokens_per_rank < 1 ||
      options.masked_max_tokens < 0) {
    return InvalidArgument("dispatcher: hidden_size {}, num_experts {}, max_tokens_per_rank {}, masked_max_tokens {}",
                           options.hidden_size, options.num_experts, options.max_tokens_per_rank,
                           options.masked_max_tokens);
  }
  if (options.top_k < 1 || options.top_k > options.num_experts) {
    return InvalidArgument("dispatcher: top_k is {}, of {} experts", options.top_k, options.num_experts);
  }
  if (options.hidden_size * DTypeBytes(options.dtype) % kCountBytes != 0) {
    return InvalidArgument("dispatcher: a row of {} elements of {} bytes is not a multiple of {} bytes",
                           options.hidden_size, DTypeBytes(options.dtype), kCountBytes);
  }
  if (static_cast<int>(options.expert_rank.size()) != options.num_experts) {
    return InvalidArgument("dispatcher: expert_rank has {} entries for {} experts", options.expert_rank.size(),
                           options.num_experts);
  }
  for (int e = 0; e < options.num_experts; ++e) {
    if (options.expert_rank[e] < 0 || options.expert_rank[e] >= ranks) {
      return InvalidArgument("dispatcher: expert {} is on rank {}, of {} ranks", e, options.expert_rank[e], ranks);
    }
  }
  return ValidateLoopback(options, comm_size);
}

}  // namespace soloist
