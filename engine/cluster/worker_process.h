// A worker: the process (or, in tests, the thread) of one rank of a cluster. It dials the leader, gets its rank, loads
// its own share of the weights, joins the group and runs its part of every step, until the leader says stop.
#ifndef SOLOIST_ENGINE_CLUSTER_WORKER_PROCESS_H_
#define SOLOIST_ENGINE_CLUSTER_WORKER_PROCESS_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/comm/bootstrap.h"
#include "engine/comm/communicator.h"
#include "kernels/device.h"

namespace soloist {

// A rank's communicator of one incarnation of the group; called on all ranks at about the same time, on the rank's
// thread. Must end within `timeout`, and soon once `store` is closed. `store` outlives the communicator.
using CommFactory = std::function<absl::StatusOr<std::unique_ptr<Communicator>>(
    int rank, int size, BootstrapStore& store, Device& device, absl::Duration timeout)>;

struct WorkerProcessOptions {
  std::string leader;     // HOST:PORT
  int rank = -1;          // -1: any that is free
  int group_size = 0;     // ranks of the whole group, for the leader to check; 0: unknown
  std::string model_dir;  // empty: the leader's path
  DeviceOptions device;
  int device_index = 0;  // of this host's devices of that kind
  std::string version;
  absl::Duration leader_timeout = absl::Seconds(60);  // without a leader, redialling
  absl::Duration beat_period = absl::Milliseconds(250);
  CommFactory make_comm;
  std::string trace_file;  // of TraceWriter, with .rankR behind it; empty: none
};

// Blocks. OK: the leader has said stop. UNAVAILABLE: there was no leader for leader_timeout. Any other: the leader has
// refused this worker, or it cannot do what it is asked; the message says which rank and why.
absl::Status RunWorkerProcess(const WorkerProcessOptions& options);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_WORKER_PROCESS_H_
