// Which communicator a worker's device takes: NCCL on GPUs, Gloo (TCP) on CPUs.
#ifndef SOLOIST_ENGINE_CLUSTER_COMM_FACTORY_H_
#define SOLOIST_ENGINE_CLUSTER_COMM_FACTORY_H_

#include <string>
#include <string_view>

#include "engine/cluster/worker_process.h"

namespace soloist {

// Where a CPU rank listens for its peers; see GlooOptions.
struct CommPlace {
  std::string hostname_or_address;
  std::string interface;
  int port_begin = 0, port_end = 0;
};

// `device_kind`: cpu or cuda.
CommFactory MakeCommFactory(std::string_view device_kind, const CommPlace& place);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_COMM_FACTORY_H_
