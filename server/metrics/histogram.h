// Histogram: how often a value fell into each of a fixed list of ranges. An observation costs a search in a short array
// and two additions; no lock.
#ifndef SOLOIST_SERVER_METRICS_HISTOGRAM_H_
#define SOLOIST_SERVER_METRICS_HISTOGRAM_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace soloist {

class Histogram {
 public:
  struct Snapshot {
    std::span<const double> bounds;  // upper, ascending; what is above the last counts in one more
    std::vector<int64_t> counts;     // [bounds.size() + 1] of each range alone
    double sum = 0;
  };

  // Ascending and not empty; must outlive the histogram.
  explicit Histogram(std::span<const double> bounds)
      : bounds_(bounds), counts_(std::make_unique<std::atomic<int64_t>[]>(bounds.size() + 1)) {}

  // Any thread. `value` belongs to the first bound that is not below it.
  void Observe(double value);
  // Any thread. Observations that are made meanwhile may be in it in part.
  Snapshot Take() const;

 private:
  const std::span<const double> bounds_;
  const std::unique_ptr<std::atomic<int64_t>[]> counts_;
  std::atomic<double> sum_{0};
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_METRICS_HISTOGRAM_H_
