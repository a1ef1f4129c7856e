// ParallelPlan and ExpertPlacement: which rank is where and which expert is whose. Plain values, validated once.
#ifndef SOLOIST_ENGINE_PLACEMENT_PARALLEL_PLAN_H_
#define SOLOIST_ENGINE_PLACEMENT_PARALLEL_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace soloist {

struct RankPlace {
  int node = 0;             // host
  int device = 0;           // on that host
  int attention_group = 0;  // ranks of a group share a sequence's heads (tensor parallel); solo: a group of its own
  int stage = 0;            // pipeline stage; solo: 0
  int expert_shard = 0;     // which share of the experts
};

// rank -> place.
struct ParallelPlan {
  std::vector<RankPlace> ranks;

  int size() const { return static_cast<int>(ranks.size()); }
  // Attention data-parallel, experts divided over all ranks; rank r on node r / ranks_per_node.
  static ParallelPlan Solo(int num_ranks, int ranks_per_node);
  // INVALID_ARGUMENT unless there are ranks, every place is used once and stages and shards are numbered from 0 without
  // holes.
  absl::Status Validate() const;
};

// (layer, expert) -> rank, total. The same map for all layers so far: TokenDispatcher takes one.
class ExpertPlacement {
 public:
  // Expert e on rank e * num_ranks / num_experts: blocks of experts in order; one per rank where the numbers are equal.
  // INVALID_ARGUMENT unless 1 <= num_ranks <= num_experts.
  static absl::StatusOr<ExpertPlacement> Contiguous(int num_experts, int num_ranks);
  // Any map; INVALID_ARGUMENT names the first rank outside [0, num_ranks).
  static absl::StatusOr<ExpertPlacement> FromMap(std::vector<int> expert_rank, int num_ranks);

  // `base` where only the `present` [num_ranks] ranks are there, at least one: each orphan is where `current` has it if
  // that rank is present, else with the present rank that has the fewest experts by then (the lowest of those).
  static ExpertPlacement ShareOut(const ExpertPlacement& base, const ExpertPlacement& current,
                                  const std::vector<bool>& present);

  const std::vector<int>& expert_rank() const { return expert_rank_; }
  // Expert ids that `rank` owns, ascending: index = local expert.
  std::vector<int> ExpertsOf(int rank) const;

 private:
  explicit ExpertPlacement(std::vector<int> expert_rank) : expert_rank_(std::move(expert_rank)) {}
  std::vector<int> expert_rank_;  // [num_experts]
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_PLACEMENT_PARALLEL_PLAN_H_
