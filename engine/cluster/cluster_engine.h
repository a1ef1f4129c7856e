// The engine as a cluster: each rank is a worker process (worker_process.h) on this host or another, which dials the
// leader: the process that makes this engine and holds front end and scheduler.
//
// A step costs one message down and one up per rank. A rank that is lost is replaced by the next worker that dials in
// (or by a spare): it loads that rank's share, all ranks form a new group, and Recover says whose KV is gone. With
// OnLoss::kShrink the others wait for it no longer than replace_timeout: then they share its experts, form a group
// without it, and its home has nothing until a worker takes its place (leader_place.cc).
//
// How a loss is found: a broken stream, at once; a worker that is silent for silence_timeout (it beats four times a
// second; a stopped process or a cut network is found so); a rank that has not answered a step step_timeout after the
// first that has; a step that nobody answers within the collectives' own timeout, after which whoever does not leave
// the group within abort_timeout is lost. A group whose connections broke though nobody is gone is formed anew.
#ifndef SOLOIST_ENGINE_CLUSTER_CLUSTER_ENGINE_H_
#define SOLOIST_ENGINE_CLUSTER_CLUSTER_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "engine/engine.h"
#include "engine/worker/engine_options.h"

namespace soloist {

// What becomes of a lost rank's share when nobody takes its place.
enum class OnLoss { kWait, kShrink };

struct ClusterOptions {
  // num_ranks: workers. device.kind and device.deterministic: what the workers must be. A model path is sent to workers
  // that have none of their own.
  EngineOptions engine;
  std::string address = "127.0.0.1:0";  // HOST:PORT to listen at for workers; port 0: any free one
  std::string version;                  // must be the workers'
  int spares = 0;                       // workers beyond num_ranks that may wait, the checkpoint's pages read
  // Slowest transport that the group may use: any, ib, nvlink. See Communicator::transport.
  std::string require_transport = "any";
  absl::Duration start_timeout = absl::Seconds(300);  // until all ranks are ready
  absl::Duration silence_timeout = absl::Milliseconds(1500);
  absl::Duration step_timeout = absl::Seconds(2);
  absl::Duration abort_timeout = absl::Seconds(10);
  OnLoss on_loss = OnLoss::kWait;
  absl::Duration replace_timeout = absl::Seconds(10);  // kShrink: how long the others wait for a worker in its place
  // Listening at that address: workers may be started. From the creating thread; an error is the creation's.
  std::function<absl::Status(const std::string& address)> on_listening;
  // A worker was given up, dead or not: whoever started it may end and replace it. Any thread; must not block.
  std::function<void(const std::string& host, int64_t pid)> on_lost;
};

// Of one rank while the cluster starts.
struct RankProgress {
  int rank = 0;
  bool joined = false;
  bool loaded = false;
  int64_t loaded_bytes = 0;
  int64_t total_bytes = 0;  // 0: not known yet
};
// Called every 100 ms from the creating thread.
using ClusterProgress = std::function<void(const std::vector<RankProgress>&)>;

// What the leader's own threads spend on steps.
struct ClusterCosts {
  int64_t steps = 0;
  int64_t submit_ns = 0;  // checking, encoding and sending plans: of the thread that calls Submit
  int64_t result_ns = 0;  // decoding and storing results: of gRPC's threads
};

class ClusterEngine : public Engine {
 public:
  // Where workers dial: the port is never 0.
  virtual const std::string& address() const = 0;
  virtual ClusterCosts Costs() const = 0;
};

// Listens, waits for the workers and makes them ready. DEADLINE_EXCEEDED names the ranks that are missing and why;
// FAILED_PRECONDITION, RESOURCE_EXHAUSTED, DATA_LOSS and others name the rank and what is wrong with it. `clock` must
// outlive the engine. Its destruction stops the workers.
absl::StatusOr<std::unique_ptr<ClusterEngine>> CreateClusterEngine(const ClusterOptions& options, const Clock& clock,
                                                                   const ClusterProgress& on_progress);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_CLUSTER_ENGINE_H_
