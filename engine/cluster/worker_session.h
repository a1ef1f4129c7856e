// WorkerSession: a worker's life on one stream to the leader. The rank's thread (Run) does what the leader says, in
// order; only what must not wait for it (aborting the group, bootstrap values) happens on gRPC's threads.
#ifndef SOLOIST_ENGINE_CLUSTER_WORKER_SESSION_H_
#define SOLOIST_ENGINE_CLUSTER_WORKER_SESSION_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/cluster/bootstrap_streams.h"
#include "engine/cluster/leader_stream.h"
#include "engine/cluster/step_runner.h"
#include "engine/cluster/wire.h"
#include "engine/cluster/worker_process.h"
#include "engine/model/config.h"
#include "engine/model/device_weights.h"
#include "engine/worker/worker.h"
#include "kernels/device.h"
#include "proto/worker.pb.h"

namespace soloist {

class WorkerSession {
 public:
  // `hello` is what it says first. `device` becomes the rank's.
  WorkerSession(const WorkerProcessOptions& options, worker::v1::Hello hello, std::unique_ptr<Device> device);
  ~WorkerSession();
  WorkerSession(const WorkerSession&) = delete;
  WorkerSession& operator=(const WorkerSession&) = delete;

  struct Outcome {
    bool leader_lost = false;  // dial again
    bool connected = false;    // the leader had answered
    absl::Status status;       // why it ended
  };
  // Blocks until the stream has ended or the worker cannot go on.
  Outcome Run();

 private:
  // gRPC's threads.
  void OnBytes(grpc::ByteBuffer& bytes);
  void OnEnd(const absl::Status& status);
  // Gets the rank's thread out of the collectives and the bootstrap of epochs up to `epoch`.
  void Interrupt(int64_t epoch, const absl::Status& reason);
  void Push(LeaderFrame frame);

  // The rank's thread. An error of any of these ends the worker.
  LeaderFrame Take();
  absl::Status Handle(LeaderFrame frame);
  absl::Status Assign(const worker::v1::Assignment& assignment);
  absl::Status WarmPages(const worker::v1::WorkerConfig& config);
  absl::Status Load();
  absl::Status Allocate(int32_t num_blocks);
  absl::Status Place(const worker::v1::Place& place);
  absl::Status JoinGroup(int64_t epoch);
  absl::Status WarmUp(int64_t epoch);
  absl::Status RunStep(int64_t epoch, std::vector<int32_t> words);
  absl::Status LeaveGroup(int64_t epoch);
  absl::Status ReplaceCommunicator(std::unique_ptr<Communicator> comm);
  // What the rank must hold for `place`, loaded; then the worker is of that group, which has no communicator yet.
  absl::Status TakePlace(const worker::v1::Place& place);
  std::unique_ptr<Communicator> AbsentCommunicator() const;
  std::string OrderHash() const;
  int LoadThreads() const;

  void Send(const worker::v1::WorkerMessage& message) { stream_->Send(Encode(message)); }
  void SendGroupFailed(int64_t epoch, int64_t step, const absl::Status& status);
  void OnStepFailure(int64_t epoch, int64_t step, const absl::Status& status);
  void SendBeats();

  const WorkerProcessOptions options_;
  const worker::v1::Hello hello_;
  std::unique_ptr<Device> device_;  // until Load

  // What was assigned.
  int rank_ = -1;
  int num_ranks_ = 0;
  worker::v1::WorkerConfig config_;
  worker::v1::Place place_;  // of the next group
  int group_rank_ = 0;       // of the communicator
  std::string model_dir_;
  ModelConfig model_;
  PlanLimits limits_;

  LoadProgress progress_;
  std::atomic<int64_t> total_bytes_{0};  // > 0: loading
  std::atomic<int64_t> last_step_{0};

  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<LeaderFrame> queue_;
  bool ended_ = false;       // the stream
  absl::Status end_status_;  // of the stream
  absl::Status step_error_;  // not the group's: found by the thread that finishes steps

  // Of the group: what Interrupt reaches. `group_mutex_` is held while one of the two changes, and for Abort.
  std::mutex group_mutex_;
  std::shared_ptr<StreamBootstrapStore> store_;
  Communicator* comm_ = nullptr;  // the worker's
  int64_t epoch_ = 0;             // of both
  int64_t aborted_epoch_ = 0;     // this and all before are over
  absl::Status abort_reason_;

  // Order of destruction: the runner uses the worker, the worker the weights and (by its communicator) the store.
  std::unique_ptr<SharedWeights> shared_;
  std::unique_ptr<Worker> worker_;
  std::unique_ptr<StepRunner> runner_;

  std::condition_variable stop_beating_;
  bool stopping_ = false;  // mutex_
  std::thread beats_;
  std::unique_ptr<LeaderStream> stream_;  // last: calls come from it
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_WORKER_SESSION_H_
