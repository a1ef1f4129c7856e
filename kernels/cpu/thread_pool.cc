#include "kernels/cpu/thread_pool.h"

#include <algorithm>

namespace soloist {
namespace {

// How long a worker looks for the next loop before it sleeps: about the gap between two ops of a decode step.
constexpr int kSpins = 2000;
constexpr size_t kMaxCallers = 256;

void Pause() { __builtin_ia32_pause(); }

}  // namespace

ThreadPool::ThreadPool(int threads) {
  jobs_.reserve(kMaxCallers);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { WorkerLoop(); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    ++epoch_;
  }
  work_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t n, Function function, const void* context) {
  // With as many ranks at work as there are threads, help would only move work around.
  const bool alone = callers_.fetch_add(1, std::memory_order_relaxed) < threads() - 1 || n > 64;
  if (n <= 1 || workers_.empty() || !alone) {
    for (int64_t i = 0; i < n; ++i) function(context, i);
    callers_.fetch_sub(1, std::memory_order_relaxed);
    return;
  }
  Job job{.function = function, .context = context, .n = n};
  bool wake;
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back(&job);
    epoch_.fetch_add(1, std::memory_order_release);
    wake = sleepers_ > 0;
  }
  if (wake) work_.notify_all();
  job.Work();
  {
    std::lock_guard lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
  }
  for (int spins = 0; job.helpers.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
  callers_.fetch_sub(1, std::memory_order_relaxed);
}

ThreadPool::Job* ThreadPool::TakeJob() {
  for (Job* job : jobs_) {
    if (job->next.load(std::memory_order_relaxed) < job->n) {
      job->helpers.fetch_add(1, std::memory_order_relaxed);
      return job;
    }
  }
  return nullptr;
}

void ThreadPool::WorkerLoop() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (Job* job = TakeJob(); job != nullptr) {
      lock.unlock();
      job->Work();
      // After this the caller may return and the job be gone.
      job->helpers.fetch_sub(1, std::memory_order_release);
      lock.lock();
      continue;
    }
    const int64_t seen = epoch_.load(std::memory_order_relaxed);
    lock.unlock();
    for (int i = 0; i < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++i) Pause();
    lock.lock();
    ++sleepers_;
    work_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
    --sleepers_;
  }
}

}  // namespace soloist
