#include "cli/loadtest/sweep.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "base/status.h"

namespace soloist::cli {

absl::StatusOr<SweepOptions> ParseSweep(std::string_view text) {
  const std::vector<std::string> parts = absl::StrSplit(absl::string_view(text.data(), text.size()), ':');
  SweepOptions out;
  if (parts.size() != 3 || (parts[0] != "rate" && parts[0] != "concurrency") || !absl::SimpleAtod(parts[1], &out.low) ||
      !absl::SimpleAtod(parts[2], &out.high) || !(out.low > 0) || !(out.high >= out.low) || out.high > 1e6) {
    return InvalidArgument("--sweep: '{}' is not rate:LOW:HIGH or concurrency:LOW:HIGH with 0 < LOW <= HIGH <= 1000000",
                           text);
  }
  out.of_concurrency = parts[0] == "concurrency";
  if (out.of_concurrency && (out.low != std::floor(out.low) || out.high != std::floor(out.high))) {
    return InvalidArgument("--sweep: '{}': a concurrency is a whole number", text);
  }
  return out;
}

std::string SweepRule(const SweepOptions& options, std::string_view objectives) {
  return fmt::format(
      "sustained: at least {:g}% of the requests meet {} and the client keeps up; the knee is the highest {} that is, "
      "found by doubling from {:g} up to {:g}, then bisection (geometric mean) until the lowest that fails is within "
      "{:g}%",
      100 * options.share, objectives, options.of_concurrency ? "concurrency" : "rate", options.low, options.high,
      100 * options.precision);
}

SweepVerdict Judge(const Summary& summary, bool valid, const SweepOptions& options) {
  if (!valid) return {false, "the client was the bottleneck"};
  return {summary.goodput_share >= options.share,
          fmt::format("{:.2f}% of the requests meet the objectives", 100 * summary.goodput_share)};
}

absl::StatusOr<Knee> FindKnee(const SweepOptions& options,
                              const std::function<absl::StatusOr<SweepVerdict>(double load)>& measure) {
  Knee knee;
  std::optional<double> failed;
  const auto run = [&](double load) -> absl::Status {
    ASSIGN_OR_RETURN(SweepVerdict verdict, measure(load));
    (verdict.sustained ? knee.load : failed) = load;
    knee.points.emplace_back(load, std::move(verdict));
    return absl::OkStatus();
  };
  for (double load = options.low; !failed; load = std::min(2 * load, options.high)) {
    RETURN_IF_ERROR(run(load));
    if (load >= options.high) break;
  }
  knee.at_limit = !failed;
  while (knee.load && failed && *failed > *knee.load * (1 + options.precision)) {
    double middle = std::sqrt(*knee.load * *failed);
    if (options.of_concurrency) {
      if (*failed - *knee.load <= 1) break;
      middle = std::clamp(std::round(middle), *knee.load + 1, *failed - 1);
    }
    RETURN_IF_ERROR(run(middle));
  }
  return knee;
}

}  // namespace soloist::cli
