// A CPU device whose memory the host cannot touch: what Allocate returns is no address that the processor accepts, so
// that code which reads or writes it other than by Device::Copy and Ops dies at once. As on a GPU, results must be
// copied to be seen. It can also capture graphs: the calls with their arguments, which then run on what lies at those
// addresses. Attention of prompts overwrites what it may (kernels/ops.h).
#ifndef SOLOIST_TESTS_KERNELS_OPAQUE_DEVICE_H_
#define SOLOIST_TESTS_KERNELS_OPAQUE_DEVICE_H_

#include <cstdint>
#include <memory>

#include "kernels/device.h"

namespace soloist {

// `device` must be a CPU device. Memory of one OpaqueDevice is known to all.
std::unique_ptr<Device> CreateOpaqueDevice(std::unique_ptr<Device> device, bool captures = false);
// Graphs of all of them that have been launched.
int64_t OpaqueGraphLaunches();

}  // namespace soloist

#endif  // SOLOIST_TESTS_KERNELS_OPAQUE_DEVICE_H_
