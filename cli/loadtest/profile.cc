#include "cli/loadtest/profile.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "base/status.h"

namespace soloist::cli {
namespace {

constexpr double kForever = std::numeric_limits<double>::infinity();
constexpr double kMaxValue = 1e6, kMaxSeconds = 1e6;

bool ParseNumber(absl::string_view text, double low, double high, double& value) {
  return absl::SimpleAtod(text, &value) && value >= low && value <= high;
}

}  // namespace

double Profile::Stage::slope() const { return end_s == kForever ? 0 : (to - from) / (end_s - start_s); }

Profile::Profile(double constant) : stages_{{0, kForever, constant, constant}} {}

absl::StatusOr<Profile> Profile::Parse(std::string_view flag, std::string_view text) {
  const absl::string_view whole(text.data(), text.size());
  double constant = 0;
  if (ParseNumber(whole, 1e-6, kMaxValue, constant)) return Profile(constant);
  Profile out;
  double at_s = 0;
  for (const absl::string_view part : absl::StrSplit(whole, ',')) {
    const std::vector<absl::string_view> pair = absl::StrSplit(part, ':');
    const std::vector<absl::string_view> ends = absl::StrSplit(pair[0], '-');
    double from = 0, to = 0, seconds = 0;
    if (pair.size() != 2 || ends.size() > 2 || !ParseNumber(ends.front(), 0, kMaxValue, from) ||
        !ParseNumber(ends.back(), 0, kMaxValue, to) || !ParseNumber(pair[1], 1e-3, kMaxSeconds, seconds)) {
      return InvalidArgument(
          "{}: '{}' is not VALUE, nor stages VALUE:SECONDS or FROM-TO:SECONDS with commas (values up to {}, seconds "
          "0.001 to {})",
          flag, text, kMaxValue, kMaxSeconds);
    }
    out.stages_.push_back({at_s, at_s + seconds, from, to});
    at_s += seconds;
  }
  if (out.max() <= 0) return InvalidArgument("{}: '{}' is never above 0", flag, text);
  return out;
}

double Profile::At(double s) const {
  for (const Stage& stage : stages_) {
    if (s < stage.end_s) return stage.from + stage.slope() * (std::max(s, stage.start_s) - stage.start_s);
  }
  return 0;
}

double Profile::max() const {
  double out = 0;
  for (const Stage& stage : stages_) out = std::max({out, stage.from, stage.to});
  return out;
}

std::optional<double> Profile::TimeOfArea(double area) const {
  for (const Stage& stage : stages_) {
    const double seconds = stage.end_s - stage.start_s;
    const double whole = seconds == kForever ? kForever : (stage.from + stage.to) / 2 * seconds;
    if (area <= whole) {
      // from * t + slope * t^2 / 2 = area, in the form that cancels nothing.
      return stage.start_s +
             2 * area / (stage.from + std::sqrt(std::max(0.0, stage.from * stage.from + 2 * stage.slope() * area)));
    }
    area -= whole;
  }
  return std::nullopt;
}

std::optional<double> Profile::NextAtLeast(double level, double s) const {
  for (const Stage& stage : stages_) {
    if (stage.end_s <= s) continue;
    const double start_s = std::max(s, stage.start_s);
    if (At(start_s) >= level) return start_s;
    if (stage.slope() > 0 && stage.to > level) return stage.start_s + (level - stage.from) / stage.slope();
  }
  return std::nullopt;
}

}  // namespace soloist::cli
