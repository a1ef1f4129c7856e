// What a group of ranks proves before it serves.
#ifndef SOLOIST_ENGINE_CLUSTER_GROUP_CHECK_H_
#define SOLOIST_ENGINE_CLUSTER_GROUP_CHECK_H_

#include <cstdint>

#include "absl/status/status.h"
#include "engine/comm/communicator.h"
#include "kernels/device.h"

namespace soloist {

// An all-to-all of bytes that tell sender, receiver, place and `round` apart, checked where they arrive, and an
// all-to-all with other sizes for each pair. DATA_LOSS names the sender, the place and both values; else the
// communicator's own errors. All ranks call it at the same point, on a thread bound to `device`.
absl::Status CheckCollectives(Communicator& comm, Device& device, int64_t round);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_GROUP_CHECK_H_
