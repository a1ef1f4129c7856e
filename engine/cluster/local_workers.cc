#include "engine/cluster/local_workers.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/clock.h"
#include "base/status.h"
#include "spdlog/spdlog.h"

extern char** environ;

namespace soloist {
namespace {

constexpr int64_t kLongLifeNs = 5'000'000'000, kLongestWaitNs = 5'000'000'000, kFirstWaitNs = 100'000'000;
// For children that have been told to stop.
constexpr int64_t kEndPatienceNs = 3'000'000'000;

// Attributes of posix_spawn: own process group, so that Ctrl-C in a terminal reaches the parent alone, and signals as a
// fresh process has them.
class SpawnAttributes {
 public:
  SpawnAttributes() {
    posix_spawnattr_init(&attributes_);
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setsigmask(&attributes_, &none);
    posix_spawnattr_setsigdefault(&attributes_, &all);
    posix_spawnattr_setpgroup(&attributes_, 0);
    posix_spawnattr_setflags(&attributes_, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  }
  ~SpawnAttributes() { posix_spawnattr_destroy(&attributes_); }
  SpawnAttributes(const SpawnAttributes&) = delete;
  SpawnAttributes& operator=(const SpawnAttributes&) = delete;
  const posix_spawnattr_t* get() const { return &attributes_; }

 private:
  posix_spawnattr_t attributes_;
};

void Wake(int fd) {
  const uint64_t one = 1;
  // It can only be full of news already.
  [[maybe_unused]] const ssize_t written = write(fd, &one, sizeof(one));
}

}  // namespace

void ExitWithParent(pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) std::_Exit(LocalWorkers::kLeaderLostStatus);
}

absl::StatusOr<std::unique_ptr<LocalWorkers>> LocalWorkers::Start(int count, ChildArguments arguments) {
  std::unique_ptr<LocalWorkers> workers(new LocalWorkers(std::move(arguments)));
  workers->wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (workers->wake_fd_ < 0) return Unavailable("eventfd: {}", std::strerror(errno));
  workers->thread_ = std::thread([pointer = workers.get(), count] { pointer->Run(count); });
  absl::Status status;
  {
    std::unique_lock lock(workers->mutex_);
    workers->changed_.wait(lock, [&] { return workers->started_; });
    status = workers->first_start_;
  }
  if (!status.ok()) return status;
  return workers;
}

LocalWorkers::~LocalWorkers() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  if (thread_.joinable()) {
    Wake(wake_fd_);
    thread_.join();
  }
  if (wake_fd_ >= 0) close(wake_fd_);
}

void LocalWorkers::Kill(int64_t pid) {
  const std::lock_guard lock(mutex_);
  // Not reaped yet, so the number is still this child's.
  if (std::ranges::any_of(children_, [pid](const Child& child) { return child.pid == pid && pid > 0; })) {
    kill(static_cast<pid_t>(pid), SIGKILL);
  }
}

int LocalWorkers::Wait(const std::function<bool()>& stop) {
  std::unique_lock lock(mutex_);
  const auto over = [&] { return std::ranges::all_of(children_, &Child::over); };
  while (!over() && !stop()) changed_.wait_for(lock, std::chrono::milliseconds(100));
  int status = 0;
  for (const Child& child : children_) status = std::max(status, child.exit_status);
  return status;
}

void LocalWorkers::Run(int count) {
  {
    const std::lock_guard lock(mutex_);
    children_.resize(count);
    for (int i = 0; i < count && first_start_.ok(); ++i) first_start_ = StartChild(i);
    started_ = true;
    stopping_ = stopping_ || !first_start_.ok();
  }
  changed_.notify_all();
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) break;
      const int64_t now_ns = Clock::Real().NowNs();
      for (int i = 0; i < count; ++i) {
        Child& child = children_[i];
        if (child.pid != 0 || child.over || now_ns < child.start_at_ns) continue;
        if (const absl::Status status = StartChild(i); !status.ok()) {
          spdlog::error("{}", status.message());
          child.start_at_ns = now_ns + kLongestWaitNs;
        }
      }
    }
    WaitForNews();
    for (int i = 0; i < count; ++i) Reap(i);
    changed_.notify_all();
  }
  EndAll();
}

// mutex_ is held.
absl::Status LocalWorkers::StartChild(int index) {
  std::vector<std::string> arguments = arguments_(index);
  arguments.insert(arguments.begin(), "soloist");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  Child& child = children_[index];
  pid_t pid = 0;
  // The same file even where it has been replaced on disk.
  const int error = posix_spawn(&pid, "/proc/self/exe", nullptr, SpawnAttributes().get(), argv.data(), environ);
  if (error != 0) return Unavailable("cannot start worker process {}: {}", index, std::strerror(error));
  child.pid = pid;
  child.started_ns = Clock::Real().NowNs();
  // Debian 12's <sys/pidfd.h> is not for C++.
  child.pid_fd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (child.pid_fd >= 0) fcntl(child.pid_fd, F_SETFD, FD_CLOEXEC);
  return absl::OkStatus();
}

void LocalWorkers::WaitForNews() {
  std::vector<pollfd> fds = {{.fd = wake_fd_, .events = POLLIN, .revents = 0}};
  int timeout_ms = 1000;
  {
    const std::lock_guard lock(mutex_);
    const int64_t now_ns = Clock::Real().NowNs();
    for (const Child& child : children_) {
      if (child.pid != 0) {
        fds.push_back({.fd = child.pid_fd, .events = POLLIN, .revents = 0});
      } else if (!child.over) {
        timeout_ms = std::min<int64_t>(timeout_ms, std::max<int64_t>(0, child.start_at_ns - now_ns) / 1'000'000 + 1);
      }
    }
  }
  poll(fds.data(), fds.size(), timeout_ms);
  uint64_t news = 0;
  [[maybe_unused]] const ssize_t size = read(wake_fd_, &news, sizeof(news));
}

void LocalWorkers::Reap(int index) {
  const std::lock_guard lock(mutex_);
  Child& child = children_[index];
  int status = 0;
  if (child.pid == 0 || waitpid(child.pid, &status, WNOHANG) != child.pid) return;
  const int64_t now_ns = Clock::Real().NowNs();
  const std::string how = WIFSIGNALED(status) ? fmt::format("was killed by signal {}", WTERMSIG(status))
                                              : fmt::format("ended with status {}", WEXITSTATUS(status));
  child.exit_status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  child.over = child.exit_status == 0 || child.exit_status == kLeaderLostStatus;
  if (!stopping_ && !child.over) spdlog::warn("worker process {} (pid {}) {}", index, child.pid, how);
  if (child.pid_fd >= 0) close(child.pid_fd);
  child.pid = 0;
  child.pid_fd = -1;
  child.quick_ends = now_ns - child.started_ns > kLongLifeNs ? 0 : child.quick_ends + 1;
  const int doublings = std::min(child.quick_ends - 2, 10);
  child.start_at_ns = child.quick_ends < 2 ? now_ns : now_ns + std::min(kLongestWaitNs, kFirstWaitNs << doublings);
}

void LocalWorkers::EndAll() {
  const int count = static_cast<int>(children_.size());
  const auto running = [this] {
    const std::lock_guard lock(mutex_);
    return std::ranges::any_of(children_, [](const Child& child) { return child.pid != 0; });
  };
  const int64_t deadline_ns = Clock::Real().NowNs() + kEndPatienceNs;
  const auto signal_all = [this](int signal) {
    const std::lock_guard lock(mutex_);
    for (const Child& child : children_) {
      if (child.pid != 0) kill(child.pid, signal);
    }
  };
  signal_all(SIGTERM);
  bool killed = false;
  while (running()) {
    if (!killed && Clock::Real().NowNs() > deadline_ns) {
      killed = true;
      signal_all(SIGKILL);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    for (int i = 0; i < count; ++i) Reap(i);
  }
}

}  // namespace soloist
