#include "engine/micro_batches.h"

#include <algorithm>
#include <cstdlib>

#include "base/status.h"

namespace soloist {

absl::StatusOr<MicroBatches> ParseMicroBatches(std::string_view text) {
  if (text == "auto") return MicroBatches::kAuto;
  if (text == "1") return MicroBatches::kOne;
  if (text == "2") return MicroBatches::kTwo;
  return InvalidArgument("micro-batches is '{}', allowed: auto, 1, 2", text);
}

int32_t HalfOfCost(const HomePlan& plan, const RowCost& cost) {
  const int32_t n = plan.num_tokens();
  if (n < 2) return n;
  // Where nothing is known, rows count alike.
  const int64_t linear = std::max<int64_t>(cost.linear_flops, cost.key_flops == 0 ? 1 : 0);
  const auto cost_of = [&](int32_t row) {
    const int64_t keys = int64_t{plan.positions()[row]} + 1;
    return linear + cost.key_flops * (cost.window > 0 ? std::min<int64_t>(keys, cost.window) : keys);
  };
  int64_t total = 0;
  for (int32_t row = 0; row < n; ++row) total += cost_of(row);
  int32_t best = 1, best_border = 0;
  int64_t best_off = total, border_off = total, before = 0;
  for (int32_t row = 1, sequence = 1; row < n; ++row) {
    before += cost_of(row - 1);
    const int64_t off = std::abs(2 * before - total);  // twice the distance from the half
    if (off < best_off) {
      best = row;
      best_off = off;
    }
    if (row != plan.query_starts()[sequence]) continue;
    ++sequence;
    if (off < border_off) {
      best_border = row;
      border_off = off;
    }
  }
  return best_border > 0 && border_off - best_off <= total / 8 ? best_border : best;
}

MicroBatchPolicy::MicroBatchPolicy(MicroBatches wanted, const EngineInfo& info) : cost_(info.row_cost) {
  if (wanted == MicroBatches::kTwo) min_tokens_ = 2;
  if (wanted == MicroBatches::kAuto && info.num_ranks > 1 && info.overlap_min_tokens > 0) {
    min_tokens_ = std::max(info.overlap_min_tokens, info.masked_max_tokens + 1);
  }
}

void MicroBatchPolicy::Apply(StepPlan& plan) const {
  if (plan.homes.empty() || !WantsTwo(plan.homes[0].max_home_tokens())) return;
  for (HomePlan& home : plan.homes) home.Split(HalfOfCost(home, cost_));
}

}  // namespace soloist
