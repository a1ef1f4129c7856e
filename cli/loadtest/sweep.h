// The highest load that a server sustains: doubling, then bisection.
#ifndef SOLOIST_CLI_LOADTEST_SWEEP_H_
#define SOLOIST_CLI_LOADTEST_SWEEP_H_

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/loadtest/metrics.h"

namespace soloist::cli {

struct SweepOptions {
  bool of_concurrency = false;  // whole numbers of requests in flight; else requests/s
  double low = 1, high = 64;
  double precision = 0.05;  // the search ends when the lowest load that fails is at most that share above the knee
  double share = 0.99;      // of requests that must meet the objectives
};
// "rate:LOW:HIGH" or "concurrency:LOW:HIGH", 0 < LOW <= HIGH.
absl::StatusOr<SweepOptions> ParseSweep(std::string_view text);
// The rule by which points are judged, as a sentence.
std::string SweepRule(const SweepOptions& options, std::string_view objectives);

struct SweepVerdict {
  bool sustained = false;
  std::string why;
};
// `valid`: the client was not the bottleneck.
SweepVerdict Judge(const Summary& summary, bool valid, const SweepOptions& options);

struct Knee {
  std::vector<std::pair<double, SweepVerdict>> points;  // in the order of measuring
  std::optional<double> load;                           // the highest that was sustained; none: not even `low`
  bool at_limit = false;                                // `high` was sustained: the knee is there or above
};
// `measure` runs one load, from low to high first, each twice the one before, then between the highest sustained and
// the lowest failed one. Its error ends the search.
absl::StatusOr<Knee> FindKnee(const SweepOptions& options,
                              const std::function<absl::StatusOr<SweepVerdict>(double load)>& measure);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_SWEEP_H_
