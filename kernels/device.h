// Device: the memory and streams of one rank. A backend implements Device, Stream and Ops; nothing above kernels/ knows
// which.
//
// Stream order: ops, copies and collectives take a Stream and run in the order in which they were enqueued on it. A CPU
// stream runs each call to its end before the call returns; a CUDA stream returns at once. Code above must be right for
// both: it may read results on the host only after Synchronize.
#ifndef SOLOIST_KERNELS_DEVICE_H_
#define SOLOIST_KERNELS_DEVICE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace soloist {

class Ops;

// An ordered queue of device work. Used by one host thread at a time.
class Stream {
 public:
  virtual ~Stream() = default;
  // Waits for all that was enqueued; the first asynchronous error, if any.
  virtual absl::Status Synchronize() = 0;
};

// Device (or host, for a CPU) memory, freed on destruction. Move-only. 64-byte aligned at least.
class Buffer {
 public:
  // Frees `data` of `bytes` bytes. A plain function pointer, so that a Buffer costs no allocation.
  using Free = void (*)(void* data, int64_t bytes);

  Buffer() = default;
  Buffer(void* data, int64_t bytes, Free free) : data_(data), bytes_(bytes), free_(free) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(free_, other.free_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) free_(data_, bytes_);
  }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // The first rows x cols elements; must fit.
  template <typename T>
  Tensor View(int64_t rows, int64_t cols) const {
    CHECK_LE(rows * cols * static_cast<int64_t>(sizeof(T)), bytes_);
    return MakeTensor(static_cast<T*>(data_), rows, cols);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  Free free_ = nullptr;
};

// Thread-compatible: one rank's thread uses it. Outlives its streams; a Buffer may outlive it.
class Device {
 public:
  virtual ~Device() = default;
  // "cpu" or "cuda:0 NVIDIA H200".
  virtual std::string Name() const = 0;
  // Zero-filled. RESOURCE_EXHAUSTED with the bytes asked for and what is free.
  virtual absl::StatusOr<Buffer> Allocate(int64_t bytes) = 0;
  // Memory that both the host and (asynchronously) the device can read and write.
  virtual absl::StatusOr<Buffer> AllocatePinned(int64_t bytes) = 0;
  virtual absl::StatusOr<std::unique_ptr<Stream>> CreateStream() = 0;
  // Between any two places, host (pinned for speed) or device; stream-ordered.
  virtual void Copy(void* dst, const void* src, int64_t bytes, Stream& stream) = 0;
  // What may still be allocated, bytes.
  virtual int64_t FreeBytes() const = 0;
  virtual Ops& ops() = 0;
};

// What a process chooses once. The CPU's threads are shared by all devices made from one DeviceFactory.
struct DeviceOptions {
  std::string kind = "cpu";  // cpu, or cuda where the binary has it
  int cpu_threads = 0;       // 0: one per core that this process may use
};

// What the hardware reaches with plain loops, all of it together: the limits that benchmarks divide by.
struct MachineRates {
  double read_bytes_per_s = 0;  // reading memory that no cache holds
  double flops_per_s = 0;       // F32 fused multiply-adds (two FLOPs each) on registers
};

// Makes the devices of the ranks that live in this process. Outlives them. Thread-safe.
class DeviceFactory {
 public:
  virtual ~DeviceFactory() = default;
  virtual absl::StatusOr<std::unique_ptr<Device>> CreateDevice(int local_index) = 0;
  // Measures for about two seconds. Nothing else should run.
  virtual MachineRates MeasureRates() = 0;
};

// INVALID_ARGUMENT names the kinds that this binary has. Implemented by the backend that is linked (backend_*.cc).
absl::StatusOr<std::unique_ptr<DeviceFactory>> CreateDeviceFactory(const DeviceOptions& options);

}  // namespace soloist

#endif  // SOLOIST_KERNELS_DEVICE_H_
