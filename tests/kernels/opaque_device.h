// A CPU device whose memory the host cannot touch: what Allocate returns is no address that the processor accepts, so
// that code which reads or writes it other than by Device::Copy and Ops dies at once. As on a GPU, results must be
// copied to be seen.
#ifndef SOLOIST_TESTS_KERNELS_OPAQUE_DEVICE_H_
#define SOLOIST_TESTS_KERNELS_OPAQUE_DEVICE_H_

#include <cstdint>
#include <memory>

#include "kernels/device.h"

namespace soloist {

// `device` must be a CPU device. Memory of one OpaqueDevice is known to all.
std::unique_ptr<Device> CreateOpaqueDevice(std::unique_ptr<Device> device);

}  // namespace soloist

#endif  // SOLOIST_TESTS_KERNELS_OPAQUE_DEVICE_H_
