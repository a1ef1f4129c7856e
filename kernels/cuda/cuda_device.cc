#include "kernels/cuda/cuda_device.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/cuda_error.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/rates.h"
#include "spdlog/spdlog.h"

namespace soloist::cuda {
namespace {

class CudaEvent final : public Event {
 public:
  CudaEvent(cudaEvent_t event, int device) : event_(event), device_(device) {}
  ~CudaEvent() override { cudaEventDestroy(event_); }
  bool Done() const override { return cudaEventQuery(event_) != cudaErrorNotReady; }
  absl::Status Wait() override {
    RETURN_IF_CUDA_ERROR(device_, cudaEventSynchronize(event_));
    return noted_;
  }
  int64_t NsSince(const Event& earlier) const override {
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, static_cast<const CudaEvent&>(earlier).event_, event_) == cudaSuccess);
    return static_cast<int64_t>(double{ms} * 1e6);
  }
  void Record(CudaStream& stream) {
    stream.Note(cudaEventRecord(event_, stream.get()), "cudaEventRecord");
    noted_ = stream.status();
  }
  cudaEvent_t get() const { return event_; }

 private:
  const cudaEvent_t event_;
  const int device_;
  absl::Status noted_;  // what the stream knew to have failed when it was recorded
};

class CudaGraph final : public Graph {
 public:
  explicit CudaGraph(cudaGraphExec_t exec) : exec_(exec) {}
  ~CudaGraph() override { cudaGraphExecDestroy(exec_); }
  cudaGraphExec_t get() const { return exec_; }

 private:
  const cudaGraphExec_t exec_;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(int device, std::string name, const DeviceOptions& options)
      : device_(device), name_(std::move(name)), options_(options) {}

  std::string Name() const override { return name_; }
  DType activation_dtype() const override { return DType::kBF16; }
  bool host_accessible() const override { return false; }

  absl::StatusOr<Buffer> Allocate(int64_t bytes) override {
    if (bytes < 0) return InvalidArgument("{}: allocating {} bytes", name_, bytes);
    if (bytes == 0) return Buffer();
    RETURN_IF_CUDA_ERROR(device_, cudaSetDevice(device_));
    void* data = nullptr;
    if (cudaMalloc(&data, bytes) != cudaSuccess) {
      cudaGetLastError();
      return ResourceExhausted("{}: allocating {} bytes failed, {} are free", name_, bytes, FreeBytes());
    }
    Buffer buffer(data, bytes, [](void* p, int64_t) { cudaFree(p); });
    RETURN_IF_CUDA_ERROR(device_, cudaMemset(data, 0, bytes));
    // Our streams do not wait for the default stream.
    RETURN_IF_CUDA_ERROR(device_, cudaStreamSynchronize(nullptr));
    return buffer;
  }
  absl::StatusOr<Buffer> AllocatePinned(int64_t bytes) override {
    if (bytes < 0) return InvalidArgument("{}: allocating {} pinned bytes", name_, bytes);
    if (bytes == 0) return Buffer();
    RETURN_IF_CUDA_ERROR(device_, cudaSetDevice(device_));
    void* data = nullptr;
    if (cudaHostAlloc(&data, bytes, cudaHostAllocPortable) != cudaSuccess) {
      cudaGetLastError();
      return ResourceExhausted("{}: allocating {} bytes of pinned host memory failed", name_, bytes);
    }
    std::fill_n(static_cast<char*>(data), bytes, 0);
    return Buffer(data, bytes, [](void* p, int64_t) { cudaFreeHost(p); });
  }
  absl::Status BindThread() override { return CudaStatus(cudaSetDevice(device_), device_, "cudaSetDevice"); }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override {
    RETURN_IF_CUDA_ERROR(device_, cudaSetDevice(device_));
    cudaStream_t stream = nullptr;
    RETURN_IF_CUDA_ERROR(device_, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return std::make_unique<CudaStream>(stream, device_);
  }
  absl::StatusOr<std::unique_ptr<Event>> CreateEvent() override {
    RETURN_IF_CUDA_ERROR(device_, cudaSetDevice(device_));
    cudaEvent_t event = nullptr;
    RETURN_IF_CUDA_ERROR(device_, cudaEventCreateWithFlags(&event, cudaEventBlockingSync));
    return std::make_unique<CudaEvent>(event, device_);
  }
  void Record(Event& event, Stream& stream) override { static_cast<CudaEvent&>(event).Record(AsCuda(stream)); }
  void Wait(Stream& stream, const Event& event) override {
    const cudaEvent_t awaited = static_cast<const CudaEvent&>(event).get();
    AsCuda(stream).Note(cudaStreamWaitEvent(AsCuda(stream).get(), awaited, 0), "cudaStreamWaitEvent");
  }

  bool can_capture() const override { return true; }
  absl::StatusOr<std::unique_ptr<Graph>> Capture(Stream& stream,
                                                 const std::function<absl::Status()>& enqueue) override {
    CudaStream& cuda_stream = AsCuda(stream);
    RETURN_IF_ERROR(cuda_stream.status());
    RETURN_IF_CUDA_ERROR(device_, cudaStreamBeginCapture(cuda_stream.get(), cudaStreamCaptureModeThreadLocal));
    absl::Status status = enqueue();
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(cuda_stream.get(), &graph);
    status.Update(cuda_stream.status());
    status.Update(CudaStatus(ended, device_, "cudaStreamEndCapture"));
    cudaGraphExec_t exec = nullptr;
    if (status.ok()) status = CudaStatus(cudaGraphInstantiate(&exec, graph, 0), device_, "cudaGraphInstantiate");
    if (graph != nullptr) cudaGraphDestroy(graph);
    if (!status.ok()) return status;
    return std::make_unique<CudaGraph>(exec);
  }
  absl::Status Launch(const Graph& graph, Stream& stream) override {
    RETURN_IF_CUDA_ERROR(device_, cudaGraphLaunch(static_cast<const CudaGraph&>(graph).get(), AsCuda(stream).get()));
    return absl::OkStatus();
  }

  absl::Status Prepare(const OpLimits& limits) override {
    RETURN_IF_CUDA_ERROR(device_, cudaSetDevice(device_));
    return ops_.Prepare(limits, *this);
  }

  void Copy(void* dst, const void* src, int64_t bytes, Stream& stream) override {
    if (bytes == 0) return;
    AsCuda(stream).Note(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, AsCuda(stream).get()), "cudaMemcpyAsync");
  }
  int64_t FreeBytes() const override {
    size_t free = 0, total = 0;
    return cudaMemGetInfo(&free, &total) == cudaSuccess ? static_cast<int64_t>(free) : 0;
  }
  Ops& ops() override { return ops_; }

 private:
  const int device_;
  const std::string name_;
  const DeviceOptions options_;
  CudaOps ops_{device_, options_};
};

class CudaDeviceFactory final : public DeviceFactory {
 public:
  CudaDeviceFactory(const DeviceOptions& options, int count) : options_(options), count_(count) {}

  absl::StatusOr<std::unique_ptr<Device>> CreateDevice(int local_index) override {
    if (local_index < 0 || local_index >= count_) {
      return InvalidArgument("rank {} of this process asks for cuda:{}, this machine shows {} GPUs", local_index,
                             local_index, count_);
    }
    cudaDeviceProp properties;
    RETURN_IF_CUDA_ERROR(local_index, cudaGetDeviceProperties(&properties, local_index));
    if (properties.major != 9) {
      return Unavailable("cuda:{} is {} of compute capability {}.{}; this build has code for 9.0 (H100, H200)",
                         local_index, properties.name, properties.major, properties.minor);
    }
    RETURN_IF_CUDA_ERROR(local_index, cudaSetDevice(local_index));
    return std::make_unique<CudaDevice>(local_index, fmt::format("cuda:{} {}", local_index, properties.name), options_);
  }
  MachineRates MeasureRates() override {
    auto rates = MeasureCudaRates(0);
    if (!rates.ok()) {
      spdlog::error("measuring the device failed: {}", rates.status().ToString());
      return {};
    }
    return *rates;
  }

 private:
  const DeviceOptions options_;
  const int count_;
};

}  // namespace

CudaStream::~CudaStream() { cudaStreamDestroy(stream_); }

absl::Status CudaStream::Synchronize() {
  Note(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  return status_;
}

void CudaStream::Note(cudaError_t error, std::string_view what) {
  if (error != cudaSuccess) status_.Update(CudaStatus(error, device_, what));
}

absl::StatusOr<std::unique_ptr<DeviceFactory>> CreateCudaDeviceFactory(const DeviceOptions& options) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    cudaGetLastError();
    return Unavailable("--device=cuda: {}", error == cudaSuccess ? "no GPU is visible" : cudaGetErrorString(error));
  }
  return std::make_unique<CudaDeviceFactory>(options, count);
}

}  // namespace soloist::cuda
