// A cluster whose workers are threads of the test: real streams over loopback, the real worker code, and a communicator
// in shared memory whose ranks find each other through the leader's streams. What a process alone can do to itself
// (SIGKILL, SIGSTOP) is tested with real processes: cluster_test.py.
#ifndef SOLOIST_TESTS_CLUSTER_THREAD_CLUSTER_H_
#define SOLOIST_TESTS_CLUSTER_THREAD_CLUSTER_H_

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "engine/cluster/cluster_engine.h"
#include "engine/cluster/worker_process.h"
#include "engine/comm/communicator.h"

namespace soloist {

inline constexpr char kTestVersion[] = "test";

// Makes the communicators of threads: rank 0 makes all of a group and tells its number through the store.
class CommHub {
 public:
  absl::StatusOr<std::unique_ptr<Communicator>> Make(int rank, int size, BootstrapStore& store, Device& device,
                                                     absl::Duration timeout) {
    if (rank == 0) {
      auto comms = CreateSharedMemoryCommunicators(size, device, {.timeout = timeout});
      if (!comms.ok()) return comms.status();
      const std::lock_guard lock(mutex_);
      groups_.push_back(*std::move(comms));
      const absl::Status told = store.Set("hub/group", std::to_string(groups_.size() - 1));
      if (!told.ok()) return told;
    }
    const auto group = store.Get("hub/group", timeout);
    if (!group.ok()) return group.status();
    const std::lock_guard lock(mutex_);
    return std::move(groups_.at(std::stoul(*group)).at(rank));
  }
  CommFactory factory() {
    return [this](int rank, int size, BootstrapStore& store, Device& device, absl::Duration timeout) {
      return Make(rank, size, store, device, timeout);
    };
  }

 private:
  std::mutex mutex_;
  std::vector<std::vector<std::unique_ptr<Communicator>>> groups_;
};

// Workers as threads. They end with their leader, or by its word: the destructor waits for that.
class ThreadWorkers {
 public:
  ~ThreadWorkers() { Join(); }

  CommHub& hub() { return hub_; }
  WorkerProcessOptions Options(const std::string& leader, int rank) {
    return {.leader = leader,
            .rank = rank,
            .device = {.kind = "cpu", .cpu_threads = 1},
            .version = kTestVersion,
            .leader_timeout = absl::Seconds(2),
            .make_comm = hub_.factory()};
  }
  void Start(WorkerProcessOptions options) {
    const std::lock_guard lock(mutex_);
    const size_t index = statuses_.size();
    statuses_.emplace_back(absl::UnknownError("running"));
    threads_.emplace_back([this, index, options = std::move(options)] {
      const absl::Status status = RunWorkerProcess(options);
      const std::lock_guard held(mutex_);
      statuses_[index] = status;
    });
  }
  // Starts ranks 0 to count - 1.
  void StartAll(const std::string& leader, int count) {
    for (int r = 0; r < count; ++r) Start(Options(leader, r));
  }
  // How each ended, in the order of Start.
  std::vector<absl::Status> Join() {
    for (size_t i = 0;; ++i) {
      std::thread thread;
      {
        const std::lock_guard lock(mutex_);
        if (i == threads_.size()) return statuses_;
        thread = std::move(threads_[i]);
      }
      if (thread.joinable()) thread.join();
    }
  }

 private:
  CommHub hub_;
  std::mutex mutex_;
  std::vector<absl::Status> statuses_;
  std::vector<std::thread> threads_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_CLUSTER_THREAD_CLUSTER_H_
