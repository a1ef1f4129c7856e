// The backends of a binary with CUDA.
#include "base/status.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cuda/cuda_device.h"

namespace soloist {

absl::StatusOr<std::unique_ptr<DeviceFactory>> CreateDeviceFactory(const DeviceOptions& options) {
  if (options.kind == "cpu") return CreateCpuDeviceFactory(options.cpu_threads);
  if (options.kind == "cuda") return cuda::CreateCudaDeviceFactory(options);
  return InvalidArgument("--device is '{}', this binary has: cpu, cuda", options.kind);
}

}  // namespace soloist
