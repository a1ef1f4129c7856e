// What a host says of itself: for the worker's Hello.
#ifndef SOLOIST_ENGINE_CLUSTER_HOST_FACTS_H_
#define SOLOIST_ENGINE_CLUSTER_HOST_FACTS_H_

#include <string>
#include <vector>

namespace soloist {

struct HostFacts {
  std::string name;
  std::string pci_address;                      // of the GPU; empty: none, or not to be told
  int numa_node = -1;                           // of the GPU; -1: unknown
  std::vector<std::string> network_interfaces;  // that are up, loopback excepted; InfiniBand devices as "ib:NAME"
};

// From /proc and /sys; what they do not tell stays empty. `gpu`: >= 0: the NVIDIA device with that number in the order
// of PCI addresses (CUDA's own order where all devices are alike).
HostFacts DescribeHost(int gpu);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_HOST_FACTS_H_
