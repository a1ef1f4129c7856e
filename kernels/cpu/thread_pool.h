// ThreadPool: the compute threads that all ranks of a process share. A caller works on its own loop and idle workers
// help, so that every rank makes progress however busy the pool is.
#ifndef SOLOIST_KERNELS_CPU_THREAD_POOL_H_
#define SOLOIST_KERNELS_CPU_THREAD_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace soloist {

// Any number of threads may call ParallelFor at once.
class ThreadPool {
 public:
  // `threads` in all: one caller and threads - 1 workers.
  explicit ThreadPool(int threads);
  ~ThreadPool();

  // Calls f(i) for i in [0, n), in any order, from several threads; returns when all are done. Allocates nothing.
  template <typename F>
  void ParallelFor(int64_t n, const F& f) {
    Run(n, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, &f);
  }
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

 private:
  using Function = void (*)(const void* context, int64_t i);
  struct Job {
    Function function;
    const void* context;
    int64_t n;
    std::atomic<int64_t> next{0};
    std::atomic<int> helpers{0};
    void Work() {
      for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < n;
           i = next.fetch_add(1, std::memory_order_relaxed)) {
        function(context, i);
      }
    }
  };

  void Run(int64_t n, Function function, const void* context);
  void WorkerLoop();
  Job* TakeJob();  // mutex_ held

  std::mutex mutex_;
  std::condition_variable work_;
  std::vector<Job*> jobs_;  // on the callers' stacks
  std::atomic<int64_t> epoch_{0};
  std::atomic<int> callers_{0};
  int sleepers_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace soloist

#endif  // SOLOIST_KERNELS_CPU_THREAD_POOL_H_
