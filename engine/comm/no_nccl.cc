// A binary without NCCL.
#include "base/status.h"
#include "engine/comm/nccl_communicator.h"

namespace soloist {

absl::StatusOr<std::unique_ptr<Communicator>> CreateNcclCommunicator(int /*rank*/, int /*size*/,
                                                                     BootstrapStore& /*store*/, Device& device,
                                                                     const NcclOptions& /*options*/) {
  return Unimplemented("NCCL for {}: this binary has none (it comes with bazel build --config=cuda)", device.Name());
}

}  // namespace soloist
