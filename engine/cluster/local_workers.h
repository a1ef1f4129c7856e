// LocalWorkers: worker processes of this host, children of this process, kept running.
#ifndef SOLOIST_ENGINE_CLUSTER_LOCAL_WORKERS_H_
#define SOLOIST_ENGINE_CLUSTER_LOCAL_WORKERS_H_

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace soloist {

// The arguments of child `index`, without the program's name, which is this process's own executable. Must contain what
// makes it call ExitWithParent.
using ChildArguments = std::function<std::vector<std::string>(int index)>;

// For a child, early: it is killed when the thread that started it ends, and ends at once if that has happened already.
// `parent`: the process that started it.
void ExitWithParent(pid_t parent);

// A child that dies of a signal or fails (any exit status but 0 and kLeaderLostStatus) is started again: at once, then,
// if it never lives for 5 s, after waits that double up to 5 s. Thread-safe.
class LocalWorkers {
 public:
  // Exit status of a worker that has found no leader.
  static constexpr int kLeaderLostStatus = 3;

  // Starts children 0 to count - 1. UNAVAILABLE if the system refuses.
  static absl::StatusOr<std::unique_ptr<LocalWorkers>> Start(int count, ChildArguments arguments);
  // SIGTERM to those that are left, and SIGKILL to those that do not end by it.
  ~LocalWorkers();
  LocalWorkers(const LocalWorkers&) = delete;
  LocalWorkers& operator=(const LocalWorkers&) = delete;

  // SIGKILL to the process, if it is one of them.
  void Kill(int64_t pid);
  // Waits until no child is left that runs or will be started again, and `stop` says no; the largest exit status.
  int Wait(const std::function<bool()>& stop);

 private:
  struct Child {
    pid_t pid = 0;    // 0: not running
    int pid_fd = -1;  // readable when it has ended
    int exit_status = 0;
    bool over = false;  // will not be started again
    int quick_ends = 0;
    int64_t started_ns = 0, start_at_ns = 0;
  };

  explicit LocalWorkers(ChildArguments arguments) : arguments_(std::move(arguments)) {}
  // The one thread that starts children: they die with it.
  void Run(int count);
  absl::Status StartChild(int index);
  void WaitForNews();
  void Reap(int index);
  void EndAll();

  const ChildArguments arguments_;
  std::mutex mutex_;
  std::condition_variable changed_;
  absl::Status first_start_;
  bool started_ = false;
  bool stopping_ = false;
  std::vector<Child> children_;
  int wake_fd_ = -1;  // eventfd: something to do
  std::thread thread_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_LOCAL_WORKERS_H_
