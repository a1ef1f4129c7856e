// A rate or a concurrency as a function of time: constant, in stages, or in ramps.
#ifndef SOLOIST_CLI_LOADTEST_PROFILE_H_
#define SOLOIST_CLI_LOADTEST_PROFILE_H_

#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace soloist::cli {

// Piecewise linear from second 0 on; 0 after its end. Copyable.
class Profile {
 public:
  // "20": constant, without end. "10:30,20:30": 10 for 30 s, then 20 for 30 s. "1-50:60": a ramp from 1 to 50 within
  // 60 s; stages and ramps mix. InvalidArgument (naming `flag`) for anything else, and where no value is above 0.
  static absl::StatusOr<Profile> Parse(std::string_view flag, std::string_view text);
  explicit Profile(double constant);

  // At a stage's border: the later one's value.
  double At(double s) const;
  double max() const;
  // Infinite for a constant.
  double end_s() const { return stages_.back().end_s; }
  // When the integral from 0 reaches `area` (> 0); none if it never does.
  std::optional<double> TimeOfArea(double area) const;
  // The earliest time from `s` on at which the value is at least `level`; none if never.
  std::optional<double> NextAtLeast(double level, double s) const;

 private:
  struct Stage {
    double start_s, end_s, from, to;
    double slope() const;
  };
  Profile() = default;
  std::vector<Stage> stages_;
};

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_PROFILE_H_
