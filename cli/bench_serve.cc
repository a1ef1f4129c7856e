// soloist bench serve: load on a running server over gRPC or OpenAI's HTTP interface.
#include "cli/bench_serve.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "cli/bench_serve_flags.h"
#include "cli/flags.h"
#include "cli/loadtest/driver.h"
#include "cli/loadtest/grpc_client.h"
#include "cli/loadtest/html.h"
#include "cli/loadtest/http_client.h"
#include "cli/loadtest/live.h"
#include "cli/loadtest/metrics.h"
#include "cli/loadtest/report.h"
#include "cli/loadtest/sweep.h"
#include "cli/loadtest/workload.h"
#include "nlohmann/json.hpp"
#include "server/version.h"

namespace soloist::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kGrpcConnections = 4;
constexpr int64_t kMaxAutoConnections = 4096;
constexpr int kWarmupConcurrency = 8;
constexpr int kSweepWarmup = 8;
constexpr double kSweepPointS = 10;
constexpr int kUnknownVocabulary = 256;  // ids that every tokenizer has

struct Measured {
  std::vector<RequestRecord> records;
  Summary summary;
  bool valid = true;
  int64_t start_unix_ns = 0;
  double client_cpu_s = 0;
};

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// One run, or one point of a sweep.
struct Load {
  std::optional<Profile> rate, concurrency;
  std::optional<double> duration_s;
  int64_t count = 0;  // -1: no limit
  uint64_t seed = 0;
  int warmup = 0;
};

class Bench {
 public:
  Bench(const ServeBenchFlags& flags, LoadClient& client, Goodput goodput)
      : flags_(flags), client_(client), goodput_(goodput) {}

  absl::StatusOr<Measured> Measure(const Load& load) {
    ASSIGN_OR_RETURN(RequestSource source, Source(load.count, load.seed));
    if (load.rate) source = SpreadArrivals(std::move(source), *load.rate, flags_.burstiness, load.seed);
    const std::unique_ptr<LoadTimer> timer = LoadTimer::Create();
    if (load.warmup > 0) {
      // Other prompts: the prefix cache must not know the measured ones.
      ASSIGN_OR_RETURN(const RequestSource warmup, Source(load.warmup, ~load.seed));
      LoadOptions options{.concurrency = load.concurrency};
      if (!options.concurrency || std::isfinite(options.concurrency->end_s())) {
        options.concurrency = Profile(kWarmupConcurrency);
      }
      RunLoad(client_, warmup, options, *timer);
    }
    LiveStats live;
    const bool show = !flags_.no_progress && isatty(STDERR_FILENO) != 0;
    LoadOptions options{.concurrency = load.concurrency,
                        .cancel_share = flags_.cancel_share,
                        .seed = load.seed,
                        .live = show ? &live : nullptr};
    if (load.duration_s) options.stop_after_ns = static_cast<int64_t>(*load.duration_s * 1e9);
    Measured out;
    out.start_unix_ns = Clock::Real().UnixNs();
    const double cpu_s = CpuSeconds();
    const int64_t start_ns = Clock::Real().NowNs();
    {
      std::optional<LiveDisplay> display;
      if (show) {
        display.emplace(live, [&] {
          const double elapsed_s = static_cast<double>(Clock::Real().NowNs() - start_ns) * 1e-9;
          if (load.duration_s) return elapsed_s / *load.duration_s;
          return load.count > 0 ? static_cast<double>(live.ended()) / static_cast<double>(load.count) : 0;
        });
      }
      out.records = RunLoad(client_, source, options, *timer);
    }
    out.client_cpu_s = CpuSeconds() - cpu_s;
    if (out.records.empty()) return InvalidArgument("nothing was sent: no request was due within the run");
    out.summary = Summarize(out.records, goodput_);
    out.valid = out.summary.lag_ms.p99 <= flags_.max_lag_ms;
    return out;
  }

 private:
  absl::StatusOr<RequestSource> Source(int64_t count, uint64_t seed) {
    WorkloadOptions options = flags_.workload;
    options.count = count;
    options.seed = seed;
    if (!flags_.trace.empty()) return TraceWorkload(flags_.trace, options, flags_.trace_speed);
    if (!flags_.dataset.empty()) {
      return DatasetWorkload(flags_.dataset, count,
                             [this](const std::string& text) { return client_.CountTokens(text); });
    }
    return RandomWorkload(options);
  }

  const ServeBenchFlags& flags_;
  LoadClient& client_;
  const Goodput goodput_;
};

absl::Status WriteFile(const std::string& path, const std::string& text) {
  if (path.empty()) return absl::OkStatus();
  std::ofstream file(path);
  file << text << std::flush;
  return file ? absl::OkStatus() : Internal("cannot write '{}'", path);
}

std::string ServerName(const ServerDescription& server) {
  std::string out = server.model;
  if (server.num_ranks > 0) out += fmt::format(" on {} x {}", server.num_ranks, server.device);
  return out + (server.version.empty() ? "" : fmt::format(", server {}", server.version));
}

std::string LagNote(const Measured& run, double limit_ms) {
  if (run.valid) return "";
  return fmt::format(
      "INVALID: the client was the bottleneck: it sent {:.1f} ms late (p99), limit {:.1f} (--max-lag-ms)\n",
      run.summary.lag_ms.p99, limit_ms);
}

// One example of each thing that went wrong.
std::string FailureNotes(const std::vector<RequestRecord>& records) {
  std::map<std::string, std::string> examples;
  for (const RequestRecord& record : records) {
    if (!record.detail.empty()) examples.emplace(record.outcome, record.detail);
  }
  std::string out;
  for (const auto& [outcome, detail] : examples) out += fmt::format("{}: {}\n", outcome, detail);
  return out;
}

Json Metadata(const ServeBenchFlags& flags, const ServerDescription& server) {
  Json out = {
      {"client_version", kVersion},
      {"protocol", flags.OverHttp() ? "http" : "grpc"},
      {"server",
       {{"version", server.version}, {"model", server.model}, {"device", server.device}, {"ranks", server.num_ranks}}},
      {"machine", MachineToJson()},
      {"flags", Json::object()}};
  for (const auto& [name, value] : flags.given) out["flags"][name] = value;
  return out;
}

std::vector<std::pair<std::string, std::string>> Facts(const Summary& s, const Goodput& goodput) {
  std::vector<std::pair<std::string, std::string>> out = {
      {"output tokens/s", fmt::format("{:.1f}", s.output_tokens_per_s)},
      {"total (prompt + output) tokens/s", fmt::format("{:.1f}", s.total_tokens_per_s)},
      {"ok requests/s", fmt::format("{:.2f}", s.requests_per_s)},
      {"TTFT median / p99", fmt::format("{:.1f} / {:.1f} ms", s.ttft_ms.median, s.ttft_ms.p99)},
      {"TPOT median / p99", fmt::format("{:.2f} / {:.2f} ms", s.tpot_ms.median, s.tpot_ms.p99)},
      {"latency median / p99", fmt::format("{:.1f} / {:.1f} ms", s.latency_ms.median, s.latency_ms.p99)}};
  if (goodput.stated())
    out.emplace_back("goodput", fmt::format("{:.2f}/s ({:.1f}%)", s.goodput_per_s, 100 * s.goodput_share));
  return out;
}

absl::Status RunOnce(const ServeBenchFlags& flags, LoadClient& client, const Goodput& goodput, const Load& load) {
  Bench bench(flags, client, goodput);
  ASSIGN_OR_RETURN(const Measured run, bench.Measure(load));
  const std::string name = ServerName(client.server());
  const std::string text =
      SummaryToText(run.summary, goodput) + FailureNotes(run.records) + LagNote(run, flags.max_lag_ms);
  fmt::print("{}\n{}", name, text);
  const int64_t origin_ns = run.records.front().intended_ns;
  RETURN_IF_ERROR(WriteFile(flags.csv, RequestsToCsv(run.records, origin_ns)));
  Json out = Metadata(flags, client.server());
  out["start_unix_ns"] = run.start_unix_ns;
  out["client_cpu_s"] = run.client_cpu_s;
  out["valid"] = run.valid;
  out["summary"] = SummaryToJson(run.summary, goodput);
  out["goodput"] = {{"objectives", flags.goodput},
                    {"requests_per_s", goodput.stated() ? Json(run.summary.goodput_per_s) : Json(nullptr)}};
  const std::string metadata = out.dump(1);
  for (const RequestRecord& record : run.records) out["requests"].push_back(RequestToJson(record, origin_ns));
  RETURN_IF_ERROR(WriteFile(flags.json, out.dump() + "\n"));
  if (flags.html.empty()) return absl::OkStatus();
  return WriteFile(flags.html, ToHtml({.title = name + (run.valid ? "" : " (invalid: the client was the bottleneck)"),
                                       .facts = Facts(run.summary, goodput),
                                       .table = DistributionTable(run.summary),
                                       .plots = RunPlots(run.records),
                                       .notes = text + "\n" + metadata}));
}

absl::Status RunSweep(const ServeBenchFlags& flags, LoadClient& client, const Goodput& goodput, const Load& base) {
  ASSIGN_OR_RETURN(SweepOptions options, ParseSweep(flags.sweep));
  options.precision = flags.sweep_precision;
  options.share = flags.sweep_share;
  const std::string load_name = options.of_concurrency ? "concurrency" : "rate, requests/s";
  Bench bench(flags, client, goodput);
  std::vector<LoadPoint> points;
  Measured best;
  Json json_points = Json::array();
  std::vector<std::vector<std::string>> table = {{load_name, "sustained", "ok req/s", "output tok/s", "TTFT med",
                                                  "TTFT p99", "TPOT med", "TPOT p99", "meet", "lag p99"}};
  fmt::print("{}\n{}\n", ServerName(client.server()), SweepRule(options, flags.goodput));
  const auto print_row = [](const std::vector<std::string>& row) {
    for (const std::string& cell : row) fmt::print("{:>17}", cell);
    fmt::print("\n");
    std::fflush(stdout);
  };
  print_row(table.front());
  const auto measure = [&](double value) -> absl::StatusOr<SweepVerdict> {
    Load load = base;
    (options.of_concurrency ? load.concurrency : load.rate) = Profile(value);
    load.seed = base.seed + points.size();  // other prompts at each point
    load.warmup = std::max(load.warmup, kSweepWarmup);
    ASSIGN_OR_RETURN(Measured run, bench.Measure(load));
    const SweepVerdict verdict = Judge(run.summary, run.valid, options);
    const Summary& s = run.summary;
    json_points.push_back({{"load", value},
                           {"sustained", verdict.sustained},
                           {"why", verdict.why},
                           {"valid", run.valid},
                           {"seed", load.seed},
                           {"client_cpu_s", run.client_cpu_s},
                           {"summary", SummaryToJson(s, goodput)}});
    points.push_back({value, verdict.sustained, s});
    table.push_back({fmt::format("{:.4g}", value),
                     verdict.sustained ? "yes"
                     : run.valid       ? "no"
                                       : "invalid",
                     fmt::format("{:.2f}", s.requests_per_s), fmt::format("{:.1f}", s.output_tokens_per_s),
                     fmt::format("{:.1f}", s.ttft_ms.median), fmt::format("{:.1f}", s.ttft_ms.p99),
                     fmt::format("{:.2f}", s.tpot_ms.median), fmt::format("{:.2f}", s.tpot_ms.p99),
                     fmt::format("{:.2f}%", 100 * s.goodput_share), fmt::format("{:.2f}", s.lag_ms.p99)});
    print_row(table.back());
    if (best.records.empty() || verdict.sustained) best = std::move(run);
    return verdict;
  };
  ASSIGN_OR_RETURN(const Knee knee, FindKnee(options, measure));
  const std::string found =
      !knee.load ? fmt::format("not even {:g} was sustained", options.low)
                 : fmt::format("{:.4g}{}", *knee.load, knee.at_limit ? " or above (the highest that was tried)" : "");
  fmt::print("knee ({}): {}\n", load_name, found);
  Json out = Metadata(flags, client.server());
  out["sweep"] = {{"of", options.of_concurrency ? "concurrency" : "rate"},
                  {"rule", SweepRule(options, flags.goodput)},
                  {"knee", knee.load ? Json(*knee.load) : Json(nullptr)},
                  {"at_limit", knee.at_limit},
                  {"points", std::move(json_points)}};
  RETURN_IF_ERROR(WriteFile(flags.json, out.dump() + "\n"));
  RETURN_IF_ERROR(WriteFile(flags.csv, RequestsToCsv(best.records, best.records.front().intended_ns)));
  if (flags.html.empty()) return absl::OkStatus();
  std::vector<std::pair<std::string, std::string>> facts = {{"knee: " + load_name, found}};
  for (auto& fact : Facts(best.summary, goodput)) facts.push_back(std::move(fact));
  std::vector<Plot> plots = SweepPlots(points, load_name);
  for (Plot& plot : RunPlots(best.records)) {
    plot.title += " at the knee";
    plots.push_back(std::move(plot));
  }
  out.erase("sweep");
  return WriteFile(flags.html, ToHtml({.title = "Sweep of " + ServerName(client.server()),
                                       .facts = std::move(facts),
                                       .table = std::move(table),
                                       .plots = std::move(plots),
                                       .notes = SweepRule(options, flags.goodput) + "\n" + out.dump(1)}));
}

// Thousands of connections need as many file descriptors.
void RaiseFileLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

absl::Status BenchServe(ServeBenchFlags flags) {
  if (!flags.preset.empty()) {
    flags.workload.count = flags.workload.count > 0 ? flags.workload.count : 128;
    flags.workload.input_length = "10000";
  }
  Load load{.seed = flags.workload.seed, .warmup = flags.warmup};
  if (!flags.rate.empty()) {
    ASSIGN_OR_RETURN(load.rate, Profile::Parse("--rate", flags.rate));
  }
  if (!flags.concurrency.empty()) {
    ASSIGN_OR_RETURN(load.concurrency, Profile::Parse("--concurrency", flags.concurrency));
  }
  if (flags.duration_s > 0) load.duration_s = flags.duration_s;
  for (const auto& profile : {load.rate, load.concurrency}) {
    if (profile && std::isfinite(profile->end_s())) {
      load.duration_s = std::min(load.duration_s.value_or(profile->end_s()), profile->end_s());
    }
  }
  if (!flags.sweep.empty() && !load.duration_s && flags.workload.count == 0) load.duration_s = kSweepPointS;
  const bool bounded = load.rate || load.concurrency || !flags.sweep.empty() || !flags.trace.empty();
  if (load.duration_s && flags.workload.count == 0 && !bounded) {
    return InvalidArgument(
        "--duration={}: says when to stop sending; it needs --rate, --concurrency, --trace or --sweep",
        flags.duration_s);
  }
  load.count = flags.workload.count > 0                  ? flags.workload.count
               : load.duration_s || !flags.trace.empty() ? std::numeric_limits<int64_t>::max()
                                                         : 100;
  ASSIGN_OR_RETURN(const Goodput goodput, ParseGoodput(flags.goodput));
  RaiseFileLimit();
  std::unique_ptr<LoadClient> client;
  if (flags.OverHttp()) {
    HttpClientOptions options = flags.http;
    options.url = flags.address.find("://") == std::string::npos ? "http://" + flags.address : flags.address;
    options.chat = flags.endpoint == "chat";
    options.connections = flags.connections;
    if (options.connections == 0) {
      const double together = load.concurrency ? load.concurrency->max()
                              : bounded        ? 0
                                               : static_cast<double>(load.count);
      options.connections = static_cast<int>(std::min<double>(together, kMaxAutoConnections));
    }
    ASSIGN_OR_RETURN(client, HttpLoadClient::Connect(options));
  } else {
    ASSIGN_OR_RETURN(
        client, GrpcLoadClient::Connect(flags.address, flags.connections > 0 ? flags.connections : kGrpcConnections));
  }
  if (flags.workload.vocab_size == 0) flags.workload.vocab_size = client->server().vocab_size;
  if (flags.workload.vocab_size == 0) flags.workload.vocab_size = kUnknownVocabulary;
  return flags.sweep.empty() ? RunOnce(flags, *client, goodput, load) : RunSweep(flags, *client, goodput, load);
}

}  // namespace

void AddBenchServe(CLI::App& bench, int& exit_code) {
  auto flags = std::make_shared<ServeBenchFlags>();
  CLI::App* sub = bench.add_subcommand("serve", "load on a running server, over gRPC or OpenAI's HTTP interface");
  flags->AddTo(*sub);
  sub->callback([flags, sub, &exit_code] {
    flags->NoteGiven(*sub);
    exit_code = Report(BenchServe(*flags));
  });
}

}  // namespace soloist::cli
