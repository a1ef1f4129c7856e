#include "engine/cluster/comm_factory.h"

#include "engine/comm/gloo_communicator.h"
#include "engine/comm/nccl_communicator.h"

namespace soloist {

CommFactory MakeCommFactory(std::string_view device_kind, const CommPlace& place) {
  if (device_kind == "cuda") {
    return [](int rank, int size, BootstrapStore& store, Device& device, absl::Duration timeout) {
      return CreateNcclCommunicator(rank, size, store, device, {.comm = {.timeout = timeout}});
    };
  }
  return [place](int rank, int size, BootstrapStore& store, Device& device, absl::Duration timeout) {
    GlooOptions options;
    options.comm.timeout = timeout;
    options.connect_timeout = timeout;
    options.hostname_or_address = place.hostname_or_address;
    options.interface = place.interface;
    options.port_begin = place.port_begin;
    options.port_end = place.port_end;
    return CreateGlooCommunicator(rank, size, store, device, options);
  };
}

}  // namespace soloist
