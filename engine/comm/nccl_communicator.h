// A Communicator over NCCL 2.28: ranks that are processes, each with a GPU.
//
// NCCL is never called blocking: creation and every enqueuing call end by the deadline. Calls return once NCCL has
// enqueued; what fails later is in error(), found by a thread of the communicator that reads NCCL's own error every few
// milliseconds, and ends what runs longer than the deadline. After Stream::Synchronize, data is whole if error() is OK:
// an aborted collective's kernels end early and leave the stream without an error.
//
// Differences to communicator.h, as each rank knows only of itself:
//  - An error does not reach the other ranks: they notice a lost peer by their connections (UNAVAILABLE) or by their
//    deadline (DEADLINE_EXCEEDED, which names the ranks that do not wait too). Whoever rebuilds the group aborts all.
//  - AllToAllV: sizes that differ between two ranks show by the deadline only (its own part: INTERNAL).
//
// A call that is not blocking costs the host some tens of microseconds, since NCCL 2.28 starts a thread for each: steps
// that need low latency capture their calls.
//
// CUDA graphs: calls may be captured; the deadline then does not hold, whoever launches the graph watches it. A graph
// with collectives must not be launched after an error, and must be destroyed before the communicator, which keeps what
// the graph uses (and a thread that waits for it) until then.
//
// Environment, read by NCCL itself and set by whoever starts the process: NCCL_SOCKET_IFNAME, NCCL_IB_HCA (which
// networks), NCCL_GRAPH_REGISTER=0 (where graphs hold collectives between nodes: no field of NCCL 2.28's configuration
// says so), NCCL_HOSTID (tests: ranks that share one GPU need different ones). NCCL_COMM_BLOCKING=1 is refused. NCCL
// listens on ephemeral ports, which have no range to set, and, for diagnosis, on port 28028 of the loopback interface
// (NCCL_RAS_ENABLE=0: not). The first communicator of a process sets NCCL_DEBUG,
// NCCL_DEBUG_SUBSYS and NCCL_DEBUG_FILE where they are unset, to read which transport NCCL takes (see nccl_log.h).
#ifndef SOLOIST_ENGINE_COMM_NCCL_COMMUNICATOR_H_
#define SOLOIST_ENGINE_COMM_NCCL_COMMUNICATOR_H_

#include <memory>

#include "absl/status/statusor.h"
#include "engine/comm/bootstrap.h"
#include "engine/comm/communicator.h"
#include "kernels/device.h"

namespace soloist {

struct NcclOptions {
  // timeout: of the creation, and of each collective that is not captured (from its enqueuing to its end).
  CommOptions comm;
};

// Called by all ranks of the group at about the same time; returns when all have come, are connected and have exchanged
// a first message. `store` and `device` must outlive it; keys of the store begin with "nccl/". The calling thread is
// bound to the device.
// DEADLINE_EXCEEDED names the ranks that are missing; FAILED_PRECONDITION if ranks have different versions of NCCL;
// INVALID_ARGUMENT if `device` is no GPU; UNIMPLEMENTED in a binary without NCCL; UNAVAILABLE or INTERNAL with NCCL's
// own text.
absl::StatusOr<std::unique_ptr<Communicator>> CreateNcclCommunicator(int rank, int size, BootstrapStore& store,
                                                                     Device& device, const NcclOptions& options);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_NCCL_COMMUNICATOR_H_
