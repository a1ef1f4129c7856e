// NcclSession: one ncclComm_t: who may call it when, what went wrong first, and how it ends. Private to nccl.cc.
//
// NCCL without blocking calls: each call hands its work to a thread of NCCL's and returns "in progress"; until that is
// done the communicator takes no other call. So whoever calls holds nccl_mutex_ until NCCL is done, and looks meanwhile
// whether the session has failed.
//
// The session has a thread of its own. It reads NCCL's asynchronous error, enforces the deadline of collectives that
// run on the device, and makes the last calls, which can wait for what we do not control: aborting waits for captured
// graphs to be destroyed. The owner never waits for the thread without a limit; the thread keeps the session alive.
#ifndef SOLOIST_ENGINE_COMM_NCCL_SESSION_H_
#define SOLOIST_ENGINE_COMM_NCCL_SESSION_H_

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/comm/bootstrap.h"

namespace soloist {

// What messages say about a call: "AllToAll of 64 bytes (call 7)", "Send of 64 bytes to rank 3".
struct NcclCall {
  const char* name = "";
  int64_t bytes = -1;        // < 0: not said
  const char* towards = "";  // " to rank ", " from rank "
  int peer = -1;             // of a pair
  int64_t number = 0;        // of collectives, which all ranks count alike
  std::string ToString() const;
};

class NcclSession {
 public:
  // Starts the thread. `device` is CUDA's number of it. `store` is used until Close returns.
  static std::shared_ptr<NcclSession> Start(int rank, int size, int device, absl::Duration timeout,
                                            BootstrapStore& store);
  ~NcclSession();

  // Joins the group.
  absl::Status Init(const ncclUniqueId& id, absl::Time deadline);
  // `enqueue` makes one NCCL call, or one group of them, on `stream`. By the enqueuing thread.
  absl::Status Enqueue(const NcclCall& call, cudaStream_t stream, absl::FunctionRef<ncclResult_t(ncclComm_t)> enqueue);
  // Keeps the first error and lets the thread abort NCCL. Returns the first error. Any thread; never waits.
  absl::Status Fail(const absl::Status& status);
  // Any thread.
  absl::Status error() const;
  // Ends NCCL: what was enqueued first if there is no error. Waits for seconds at most.
  void Close();

 private:
  struct Pending {
    cudaEvent_t event;
    absl::Time enqueued;
    NcclCall call;
  };

  NcclSession(int rank, int size, int device, absl::Duration timeout, BootstrapStore& store);
  void Run();
  void ReadAsyncError();
  void CheckAges();
  void End();
  // Waits until NCCL has done what it answered `result` to. Holds nccl_mutex_.
  absl::Status Settle(const NcclCall& call, ncclResult_t result, absl::Time deadline);
  absl::Status Track(const NcclCall& call, cudaStream_t stream);
  absl::Status Describe(const NcclCall& call, ncclResult_t result) const;
  absl::Status Late(const NcclCall& call);
  std::string WhoIsMissing(const NcclCall& call);

  const int rank_;
  const int size_;
  const int device_;
  const absl::Duration timeout_;
  BootstrapStore& store_;
  std::thread thread_;

  // For comm_. Never waited for without a limit by the thread, nor while state_mutex_ is held.
  std::mutex nccl_mutex_;
  ncclComm_t comm_ = nullptr;

  // No call of CUDA or NCCL is made under it.
  mutable std::mutex state_mutex_;
  std::condition_variable changed_;
  absl::Status error_;
  bool closing_ = false;
  bool ended_ = false;
  std::atomic<bool> failed_{false};

  // Collectives that were not seen to end, oldest first.
  std::mutex events_mutex_;
  std::deque<Pending> pending_;
  std::vector<cudaEvent_t> spare_events_;
};

// OK, or "what: NCCL's text".
absl::Status NcclStatus(ncclResult_t result, const std::string& what);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_NCCL_SESSION_H_
