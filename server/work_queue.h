// A few threads that run short jobs, for what must not run on the step loop's or a connection's thread.
#ifndef SOLOIST_SERVER_WORK_QUEUE_H_
#define SOLOIST_SERVER_WORK_QUEUE_H_

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace soloist {

// Post is for any thread. Runs what is left, then joins, when destroyed.
class WorkQueue {
 public:
  explicit WorkQueue(int num_threads);
  ~WorkQueue();
  WorkQueue(const WorkQueue&) = delete;
  WorkQueue& operator=(const WorkQueue&) = delete;

  void Post(std::function<void()> job);

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;  // mutex_
  bool stop_ = false;                       // mutex_
  std::vector<std::thread> threads_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_WORK_QUEUE_H_
