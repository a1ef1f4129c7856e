// The flags of soloist bench serve.
#ifndef SOLOIST_CLI_BENCH_SERVE_FLAGS_H_
#define SOLOIST_CLI_BENCH_SERVE_FLAGS_H_

#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "cli/loadtest/http_client.h"
#include "cli/loadtest/workload.h"

namespace soloist::cli {

struct ServeBenchFlags {
  std::string address = "127.0.0.1:50051", backend = "auto", endpoint = "completions";
  HttpClientOptions http;  // model, threads, extra_body and headers
  int connections = 0;     // 0: as many as needed
  WorkloadOptions workload{.count = 0,
                           .vocab_size = 0};  // count 0: by the duration, else 100; vocab_size 0: the server's
  std::string preset, trace, dataset, rate, concurrency, sweep, goodput, json, csv, html;
  double duration_s = 0, burstiness = 1, trace_speed = 1, cancel_share = 0, max_lag_ms = 50;
  double sweep_precision = 0.05, sweep_share = 0.99;
  int warmup = 0;
  bool no_progress = false;
  // Every option and its value, given or default.
  std::vector<std::pair<std::string, std::string>> given;

  void AddTo(CLI::App& app);
  // After parsing: fills `given`.
  void NoteGiven(const CLI::App& app);
  bool OverHttp() const;
};

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_BENCH_SERVE_FLAGS_H_
