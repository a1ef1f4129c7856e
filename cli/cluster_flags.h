// Flags of a cluster's leader, and the engine that they ask for: in this process, or a cluster of workers.
#ifndef SOLOIST_CLI_CLUSTER_FLAGS_H_
#define SOLOIST_CLI_CLUSTER_FLAGS_H_

#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "engine/cluster/cluster_engine.h"
#include "engine/cluster/local_workers.h"
#include "engine/engine.h"
#include "engine/worker/in_process_engine.h"

namespace soloist::cli {

struct ClusterFlags {
  std::string engine;  // in-process or cluster; empty: cluster if there are workers
  int workers = 0;
  std::string spawn;
  std::string address;
  int spares = 0;
  std::string require_transport = "any";
  double start_timeout_s = 300;
  double silence_timeout_s = 1.5;
  double step_timeout_s = 2;
  std::string on_loss = "wait";
  double replace_timeout_s = 10;
  std::string dispatch_capacity = "auto";

  void AddTo(CLI::App& app);
  // INVALID_ARGUMENT where flags contradict each other.
  absl::StatusOr<bool> IsCluster() const;
};

// An engine that is ready (a ReplayEngine over the ranks'), and the worker processes that it has started: they must die
// after it.
struct StartedEngine {
  std::unique_ptr<LocalWorkers> workers;
  std::unique_ptr<Engine> engine;
  ClusterEngine* cluster = nullptr;  // what `engine` stands on, if it is one
};

// Shows progress on stderr: bars on a terminal, else a line when it is done.
absl::StatusOr<StartedEngine> StartEngine(const EngineOptions& engine, const ClusterFlags& cluster);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_CLUSTER_FLAGS_H_
