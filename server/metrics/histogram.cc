#include "server/metrics/histogram.h"

#include <algorithm>

namespace soloist {

void Histogram::Observe(double value) {
  const auto range = std::ranges::lower_bound(bounds_, value) - bounds_.begin();
  counts_[range].fetch_add(1, std::memory_order_relaxed);
  sum_.fetch_add(value, std::memory_order_relaxed);
}

Histogram::Snapshot Histogram::Take() const {
  Snapshot snapshot{.bounds = bounds_, .counts = std::vector<int64_t>(bounds_.size() + 1), .sum = 0};
  snapshot.sum = sum_.load(std::memory_order_relaxed);
  for (size_t i = 0; i < snapshot.counts.size(); ++i) snapshot.counts[i] = counts_[i].load(std::memory_order_relaxed);
  return snapshot;
}

}  // namespace soloist
