#include "engine/placement/parallel_plan.h"

#include <algorithm>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace soloist {

ParallelPlan ParallelPlan::Solo(int num_ranks, int ranks_per_node) {
  ParallelPlan plan;
  for (int r = 0; r < num_ranks; ++r) {
    plan.ranks.push_back({.node = r / ranks_per_node,
                          .device = r % ranks_per_node,
                          .attention_group = r,
                          .stage = 0,
                          .expert_shard = r});
  }
  return plan;
}

absl::Status ParallelPlan::Validate() const {
  if (ranks.empty()) return InvalidArgument("parallel plan: no ranks");
  std::set<std::pair<int, int>> places;
  std::set<int> stages, shards;
  for (int r = 0; r < size(); ++r) {
    const RankPlace& place = ranks[r];
    if (!places.insert({place.node, place.device}).second) {
      return InvalidArgument("parallel plan: rank {} shares node {} device {} with another rank", r, place.node,
                             place.device);
    }
    stages.insert(place.stage);
    shards.insert(place.expert_shard);
  }
  const auto dense = [](const std::set<int>& ids) {
    return *ids.begin() == 0 && *ids.rbegin() == static_cast<int>(ids.size()) - 1;
  };
  if (!dense(stages)) return InvalidArgument("parallel plan: stages are not numbered from 0 without holes");
  if (!dense(shards)) return InvalidArgument("parallel plan: expert shards are not numbered from 0 without holes");
  return absl::OkStatus();
}

absl::StatusOr<ExpertPlacement> ExpertPlacement::Contiguous(int num_experts, int num_ranks) {
  if (num_ranks < 1 || num_ranks > num_experts) {
    return InvalidArgument("{} ranks for {} experts: allowed are 1 to {} ranks (each owns at least one expert)",
                           num_ranks, num_experts, num_experts);
  }
  std::vector<int> map(num_experts);
  for (int e = 0; e < num_experts; ++e) map[e] = static_cast<int>(static_cast<int64_t>(e) * num_ranks / num_experts);
  return ExpertPlacement(std::move(map));
}

absl::StatusOr<ExpertPlacement> ExpertPlacement::FromMap(std::vector<int> expert_rank, int num_ranks) {
  if (expert_rank.empty()) return InvalidArgument("expert placement: no experts");
  for (size_t e = 0; e < expert_rank.size(); ++e) {
    if (expert_rank[e] < 0 || expert_rank[e] >= num_ranks) {
      return InvalidArgument("expert placement: expert {} on rank {}, allowed: 0 to {}", e, expert_rank[e],
                             num_ranks - 1);
    }
  }
  return ExpertPlacement(std::move(expert_rank));
}

ExpertPlacement ExpertPlacement::ShareOut(const ExpertPlacement& base, const ExpertPlacement& current,
                                          const std::vector<bool>& present) {
  std::vector<int> map = base.expert_rank_;
  std::vector<int> held(present.size(), 0);
  std::vector<size_t> orphans;
  for (size_t e = 0; e < map.size(); ++e) {
    if (!present[map[e]]) map[e] = current.expert_rank_[e];
    if (present[map[e]]) {
      ++held[map[e]];
    } else {
      orphans.push_back(e);
    }
  }
  for (const size_t e : orphans) {
    int best = -1;
    for (int r = 0; r < static_cast<int>(present.size()); ++r) {
      if (present[r] && (best < 0 || held[r] < held[best])) best = r;
    }
    CHECK_GE(best, 0);
    map[e] = best;
    ++held[best];
  }
  return ExpertPlacement(std::move(map));
}

std::vector<int> ExpertPlacement::ExpertsOf(int rank) const {
  std::vector<int> experts;
  for (size_t e = 0; e < expert_rank_.size(); ++e) {
    if (expert_rank_[e] == rank) experts.push_back(static_cast<int>(e));
  }
  return experts;
}

}  // namespace soloist
