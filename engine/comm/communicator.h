// Communicator: collectives between the ranks of one engine, on bytes, stream-ordered.
//
// One communicator per rank, one enqueuing host thread, the same order of calls on all ranks: anything else deadlocks
// (and ends by the deadline). Counts are bytes. `send` and `recv` must not overlap unless said.
#ifndef SOLOIST_ENGINE_COMM_COMMUNICATOR_H_
#define SOLOIST_ENGINE_COMM_COMMUNICATOR_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/device.h"

namespace soloist {

// Calls enqueue and return; what fails later shows in the status of the next call, of Stream::Synchronize or of
// error(). After a failure or Abort every call on any rank of the group returns that first error, soon. Errors name the
// operation and the ranks that are missing.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // How bytes travel, the slowest way in use: "local", "nvlink", "p2p" (GPU to GPU over PCIe), "ib", "shm" (through
  // host memory), "tcp" or "socket" (NCCL's own TCP), from fast to slow; "unknown" where it could not be found out.
  virtual std::string transport() const { return "local"; }

  // recv[s * bytes ..] on rank r = send[r * bytes ..] of rank s. send == recv is allowed when size() == 1.
  virtual absl::Status AllToAll(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) = 0;
  // Rank d gets send[send_offsets[d] ..+send_bytes[d]]. All spans have size() entries, on the host; recv_bytes[s] must
  // equal what rank s sends here (INTERNAL if not).
  virtual absl::Status AllToAllV(const void* send, std::span<const int64_t> send_bytes,
                                 std::span<const int64_t> send_offsets, void* recv, std::span<const int64_t> recv_bytes,
                                 std::span<const int64_t> recv_offsets, Stream& stream) = 0;
  // data = sum over ranks in rank order (so every rank has the same bits), in place.
  virtual absl::Status AllReduceSum(float* data, int64_t count, Stream& stream) = 0;
  // recv [size, bytes] = each rank's send.
  virtual absl::Status AllGather(const void* send, void* recv, int64_t bytes_per_rank, Stream& stream) = 0;
  virtual absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& stream) = 0;
  // A matching pair; other ranks do not take part.
  virtual absl::Status Send(const void* data, int64_t bytes, int to, Stream& stream) = 0;
  virtual absl::Status Recv(void* data, int64_t bytes, int from, Stream& stream) = 0;
  virtual absl::Status Barrier(Stream& stream) = 0;

  // From any thread: ends all that is in flight on this rank's group with `reason`. Idempotent.
  virtual void Abort(const absl::Status& reason) = 0;
  // The first error, or OK. Any thread.
  virtual absl::Status error() const = 0;
};

struct CommOptions {
  // A collective that has not ended by then aborts the group: DEADLINE_EXCEEDED.
  absl::Duration timeout = absl::Seconds(30);
};

// One rank: copies of `device`, which must outlive it.
std::unique_ptr<Communicator> CreateSelfCommunicator(Device& device);

// `size` ranks that are threads of this process; element r is rank r's. They share a group, which lives as long as any
// of them. The host moves the bytes: UNIMPLEMENTED if it cannot reach the memory of `device`, one of the ranks' (all
// are of one kind).
absl::StatusOr<std::vector<std::unique_ptr<Communicator>>> CreateSharedMemoryCommunicators(int size,
                                                                                           const Device& device,
                                                                                           const CommOptions& options);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_COMMUNICATOR_H_
