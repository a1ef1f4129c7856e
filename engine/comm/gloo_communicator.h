// The communicator of CPU ranks in different processes and hosts, over TCP.
//
// What it costs: a collective is one message to and from every peer (AllReduceSum of more than a few KiB: two), moved
// by the calling thread; a payload of at least GlooOptions::gloo_min_bytes goes through Gloo, which needs one more
// message to ask and one to confirm. Nothing runs in the background but Gloo's own thread. Two sockets per peer, and
// one more for Gloo.
//
// Failures: a rank that is killed ends the group's calls at once (UNAVAILABLE, "rank 3 is gone"), a rank that is
// stopped or cut off by the timeout (DEADLINE_EXCEEDED, names it). Abort is heard by all ranks that wait in a call at
// once, by the others at their next call or error(). Ranks that differ in a call or its sizes get INTERNAL.
#ifndef SOLOIST_ENGINE_COMM_GLOO_COMMUNICATOR_H_
#define SOLOIST_ENGINE_COMM_GLOO_COMMUNICATOR_H_

#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/comm/bootstrap.h"
#include "engine/comm/communicator.h"
#include "kernels/device.h"

namespace soloist {

struct GlooOptions {
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

  CommOptions comm;
  // What peers dial. Empty: the address of `interface`, or of the first interface that is up and no loopback. The
  // connections are neither encrypted nor more than a random token away from open: keep them inside the cluster.
  std::string hostname_or_address;
  std::string interface;  // such as eth0
  // Each rank listens on one port of this range, both included, while the group connects, and on none afterwards. 0: on
  // any. Gloo listens where the system likes, so with a range nothing goes through it.
  int port_begin = 0, port_end = 0;
  // Payloads per pair of at least so many bytes go through Gloo; kNever: none, and Gloo is not even opened. The same on
  // all ranks.
  int64_t gloo_min_bytes = kNever;
  // For all ranks to connect, in CreateGlooCommunicator.
  absl::Duration connect_timeout = absl::Seconds(30);
};

// Rank `rank` of `size`; called by all of them at about the same time. `store` is needed until it returns, `device`
// as long as the communicator lives. DEADLINE_EXCEEDED names the ranks that did not come within connect_timeout,
// UNAVAILABLE a rank that came and went, ALREADY_EXISTS if another rank has the same number, FAILED_PRECONDITION if one
// has another gloo_min_bytes, RESOURCE_EXHAUSTED if no port of the range is free, UNIMPLEMENTED if the host cannot
// reach the memory of `device`.
absl::StatusOr<std::unique_ptr<Communicator>> CreateGlooCommunicator(int rank, int size, BootstrapStore& store,
                                                                     Device& device, const GlooOptions& options);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_GLOO_COMMUNICATOR_H_
