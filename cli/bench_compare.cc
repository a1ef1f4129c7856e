// soloist bench compare: two JSON files of bench serve.
#include <fstream>
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
