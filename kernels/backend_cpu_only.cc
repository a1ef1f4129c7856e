// The backends of a binary without CUDA.
#include "base/status.h"
#include "kernels/cpu/cpu_device.h"

namespace soloist {

absl::StatusOr<std::unique_ptr<DeviceFactory>> CreateDeviceFactory(const DeviceOptions& options) {
  if (options.kind != "cpu") {
    return InvalidArgument("--device is '{}', this binary has: cpu (CUDA comes with bazel build --config=cuda)",
                           options.kind);
  }
  return CreateCpuDeviceFactory(options);
}

}  // namespace soloist
