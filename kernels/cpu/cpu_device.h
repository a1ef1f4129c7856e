// The CPU backend: streams run each call to its end before it returns.
#ifndef SOLOIST_KERNELS_CPU_CPU_DEVICE_H_
#define SOLOIST_KERNELS_CPU_CPU_DEVICE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace soloist {

// `threads` in all, shared by the factory's devices; 0: one per core that this process may use.
absl::StatusOr<std::unique_ptr<DeviceFactory>> CreateCpuDeviceFactory(int threads);

}  // namespace soloist

#endif  // SOLOIST_KERNELS_CPU_CPU_DEVICE_H_
