// soloist bench compare: two JSON files of bench serve.
#include <algorithm>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "cli/bench_serve.h"
#include "cli/flags.h"
#include "cli/loadtest/metrics.h"
#include "nlohmann/json.hpp"

namespace soloist::cli {
namespace {

using Json = nlohmann::ordered_json;

// One metric of the ok requests of a file that BenchServe wrote.
absl::StatusOr<std::vector<double>> ReadMetric(const Json& file, const std::string& path, const char* metric) {
  if (!file.is_object() || !file.contains("requests") || !file["requests"].is_array()) {
    return InvalidArgument("{}: not a JSON file of bench serve", path);
  }
  std::vector<double> values;
  for (const Json& request : file["requests"]) {
    if (!request.is_object() || request.value("outcome", Json()) != "ok") continue;
    const Json value = request.value(metric, Json());
    if (value.is_number()) values.push_back(value.get<double>());
  }
  return values;
}

constexpr int kSlices = 20;

// Output tokens/s of the ok requests in each of kSlices equal parts of the run, from the first intended start to the
// last end: a request's tokens lie evenly between its first one and its end. Their mean is the run's output tokens/s.
// Empty if there is nothing to count.
std::vector<double> TokenRates(const Json& file) {
  struct Span {
    double begin, end, tokens;
  };
  std::vector<Span> spans;
  double first = std::numeric_limits<double>::infinity(), last = 0;
  for (const Json& request : file["requests"]) {
    if (!request.is_object() || request.value("outcome", Json()) != "ok") continue;
    if (!request.value("intended_ms", Json()).is_number() || !request.value("latency_ms", Json()).is_number()) continue;
    const double start = request["intended_ms"].get<double>(), end = start + request["latency_ms"].get<double>();
    const Json ttft = request.value("ttft_ms", Json()), tokens = request.value("output_tokens", Json());
    first = std::min(first, start);
    last = std::max(last, end);
    if (ttft.is_number() && tokens.is_number())
      spans.push_back({start + ttft.get<double>(), end, tokens.get<double>()});
  }
  if (spans.empty() || last <= first) return {};
  const double slice_ms = (last - first) / kSlices;
  std::vector<double> rates(kSlices, 0.0);
  for (const Span& span : spans) {
    // One token, or several at once: all in the slice of its end.
    const double begin = std::min(span.begin, span.end - 1e-6), length = span.end - begin;
    for (int i = 0; i < kSlices; ++i) {
      const double from = std::max(begin, first + i * slice_ms);
      const double to = std::min(span.end, i + 1 == kSlices ? last : first + (i + 1) * slice_ms);
      if (to > from) rates[i] += span.tokens * (to - from) / length / (slice_ms * 1e-3);
    }
  }
  return rates;
}

absl::Status Compare(const std::string& path_a, const std::string& path_b, uint64_t seed) {
  const auto read = [](const std::string& path) -> absl::StatusOr<Json> {
    std::ifstream file(path);
    if (!file) return NotFound("cannot open '{}'", path);
    return Json::parse(file, nullptr, /*allow_exceptions=*/false);
  };
  ASSIGN_OR_RETURN(const Json a, read(path_a));
  ASSIGN_OR_RETURN(const Json b, read(path_b));
  fmt::print("mean of B / mean of A, over ok requests; 95% interval (bootstrap over requests, seed {})\n", seed);
  for (const char* metric : {"ttft_ms", "tpot_ms", "latency_ms"}) {
    ASSIGN_OR_RETURN(const std::vector<double> of_a, ReadMetric(a, path_a, metric));
    ASSIGN_OR_RETURN(const std::vector<double> of_b, ReadMetric(b, path_b, metric));
    if (of_a.empty() || of_b.empty()) {
      fmt::print("{:<12} no value in one of the files\n", metric);
      continue;
    }
    const Ratio ratio = CompareMeans(of_a, of_b, seed);
    fmt::print("{:<12} {:.3f} [{:.3f}, {:.3f}]  ({} and {} requests)\n", metric, ratio.ratio, ratio.low, ratio.high,
               of_a.size(), of_b.size());
  }
  const std::vector<double> rates_a = TokenRates(a), rates_b = TokenRates(b);
  if (rates_a.empty() || rates_b.empty()) {
    fmt::print("{:<12} no value in one of the files\n", "output tok/s");
  } else {
    const Ratio ratio = CompareMeans(rates_a, rates_b, seed);
    fmt::print("{:<12} {:.3f} [{:.3f}, {:.3f}]  (bootstrap over {} equal parts of each run)\n", "output tok/s",
               ratio.ratio, ratio.low, ratio.high, kSlices);
  }
  return absl::OkStatus();
}

}  // namespace

void AddBenchCompare(CLI::App& bench, int& exit_code) {
  struct Flags {
    std::string a, b;
    uint64_t seed = 0;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* sub = bench.add_subcommand("compare", "two JSON files of bench serve: ratios with intervals");
  sub->add_option("a", flags->a, "file")->required();
  sub->add_option("b", flags->b, "file")->required();
  sub->add_option("--seed", flags->seed, "of the bootstrap")->capture_default_str();
  sub->callback([flags, &exit_code] { exit_code = Report(Compare(flags->a, flags->b, flags->seed)); });
}

}  // namespace soloist::cli
