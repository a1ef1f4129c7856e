// The CPU backend: streams run each call to its end before it returns.
#ifndef SOLOIST_KERNELS_CPU_CPU_DEVICE_H_
#define SOLOIST_KERNELS_CPU_CPU_DEVICE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace soloist {

// options.cpu_threads in all, shared by the factory's devices. INVALID_ARGUMENT of cpu_threads or cpu_gemm names what
// is allowed.
absl::StatusOr<std::unique_ptr<DeviceFactory>> CreateCpuDeviceFactory(const DeviceOptions& options);

}  // namespace soloist

#endif  // SOLOIST_KERNELS_CPU_CPU_DEVICE_H_
