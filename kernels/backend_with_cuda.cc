// The backends of a binary with CUDA.
#include "base/status.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cuda/cuda_device.h"

namespace soloist {

absl::StatusOr<std::unique_ptr<DeviceFactory>> CreateDeviceFactory(const DeviceOptions& options) {
  if (options.kind == "cpu") return CreateCpuDeviceFactory(options);
  if (options.kind == "cuda" && options.cpu_gemm != "auto") {
    return InvalidArgument("--cpu-gemm is '{}', with --device=cuda it must be auto", options.cpu_gemm);
  }
  if (options.kind == "cuda") return cuda::CreateCudaDeviceFactory(options);
  return InvalidArgument("--device is '{}', this binary has: cpu, cuda", options.kind);
}

}  // namespace soloist
