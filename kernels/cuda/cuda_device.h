// CudaDevice: one GPU for one rank. Streams do not synchronise with the legacy default stream; errors of what was
// enqueued are kept by the stream and come out where the host waits.
#ifndef SOLOIST_KERNELS_CUDA_CUDA_DEVICE_H_
#define SOLOIST_KERNELS_CUDA_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include <memory>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace soloist::cuda {

class CudaStream final : public Stream {
 public:
  CudaStream(cudaStream_t stream, int device) : stream_(stream), device_(device) {}
  ~CudaStream() override;
  absl::Status Synchronize() override;
  void* native_handle() override { return stream_; }

  cudaStream_t get() const { return stream_; }
  // Keeps the first error of an enqueuing call, named by what was enqueued.
  void Note(cudaError_t error, std::string_view what);
  void Note(const absl::Status& status) { status_.Update(status); }
  const absl::Status& status() const { return status_; }

 private:
  const cudaStream_t stream_;
  const int device_;
  absl::Status status_;
};

// The CUDA stream behind `stream`, which must be one of this backend.
inline CudaStream& AsCuda(Stream& stream) { return static_cast<CudaStream&>(stream); }

// GPUs in the order of CUDA_VISIBLE_DEVICES; CreateDevice(i) takes the i-th. UNAVAILABLE if there is no driver, no GPU,
// or one older than compute capability 9.0.
absl::StatusOr<std::unique_ptr<DeviceFactory>> CreateCudaDeviceFactory(const DeviceOptions& options);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_CUDA_DEVICE_H_
