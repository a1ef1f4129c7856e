// Flags that several subcommands share, and what they become. Only cli/ sees flags.
#ifndef SOLOIST_CLI_FLAGS_H_
#define SOLOIST_CLI_FLAGS_H_

#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/logging.h"
#include "cli/cluster_flags.h"
#include "engine/engine.h"
#include "engine/worker/in_process_engine.h"
#include "scheduler/step_loop.h"
#include "server/frontend.h"

namespace soloist::cli {

// --model, --ranks or --workers, --device, memory and scheduling.
struct EngineFlags {
  EngineOptions engine;
  ClusterFlags cluster;
  SchedulerOptions scheduler;
  bool no_prefix_cache = false;
  std::string micro_batches = "auto";
  double collective_timeout_s = 60;

  void AddTo(CLI::App& app);
};

// A loaded model ready to serve: members in the order in which they must die last to first.
struct Runtime {
  std::unique_ptr<LocalWorkers> workers;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<StepLoop> loop;
};

// From the model folder's configuration files, without its weights.
absl::StatusOr<ModelDescription> DescribeModel(const EngineFlags& flags);

// Loads (see StartEngine), starts the step loop. eos_token_ids come from
// the model folder.
absl::StatusOr<Runtime> StartRuntime(EngineFlags flags);

// Subcommands: each adds itself to `app`; `exit_code` is what the process ends with.
void AddServe(CLI::App& app, int& exit_code);
void AddDemo(CLI::App& app, int& exit_code);
void AddGenerate(CLI::App& app, int& exit_code);
void AddBench(CLI::App& app, int& exit_code);
void AddInspect(CLI::App& app, int& exit_code);
void AddWorker(CLI::App& app, int& exit_code);

// --cpu-gemm (DeviceOptions::cpu_gemm), of a leader and of a worker.
void AddCpuGemm(CLI::App& app, std::string& kernel, const std::string& help);

// --check-flags: the flags (and a worker's variables) are parsed and compared, nothing is started.
void AddCheckFlags(CLI::App& app, bool& check);

// Prints "soloist: message" to stderr; returns 1 (0 for OK).
int Report(const absl::Status& status);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_FLAGS_H_
