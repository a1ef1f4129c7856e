// Device: the memory and streams of one rank. A backend implements Device, Stream and Ops; nothing above kernels/ knows
// which.
//
// Stream order: ops, copies and collectives take a Stream and run in the order in which they were enqueued on it. A CPU
// stream runs each call to its end before the call returns; a CUDA stream returns at once. Code above must be right for
// both: it may read results on the host only after Synchronize.
#ifndef SOLOIST_KERNELS_DEVICE_H_
#define SOLOIST_KERNELS_DEVICE_H_

#include <cstdint>
#include <functional>
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
  // The backend's own handle, for communicators: a cudaStream_t; null on CPUs.
  virtual void* native_handle() { return nullptr; }
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

// A point in a stream. Reusable: recording it again moves it. Record on the stream's thread; the rest on any one
// thread.
class Event {
 public:
  virtual ~Event() = default;
  // Whether all that was enqueued before the last Record has run. Never blocks.
  virtual bool Done() const = 0;
  // Blocks until Done; the stream's first asynchronous error, if any.
  virtual absl::Status Wait() = 0;
  // Device time from `earlier` to this point. Both must be Done.
  virtual int64_t NsSince(const Event& earlier) const = 0;
};

// Work that was recorded once and can be launched again with one call: the same kernels on the same addresses.
class Graph {
 public:
  virtual ~Graph() = default;
};

// Upper bounds of what the ops of a device will be asked, from which it allocates its workspaces once.
struct OpLimits {
  int64_t max_tokens = 0;       // rows of a step
  int64_t max_expert_rows = 0;  // rows of an ExpertMlp
  int64_t max_logit_rows = 0;
  int64_t max_sequences = 0;
  int64_t max_model_len = 0;  // longest sequence
  int64_t hidden_size = 0;
  int64_t expert_hidden_size = 0;
  bool gated_experts = false;  // Activation::kSiluGated
  int64_t vocab_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int kv_block_size = 0;  // 0: not known yet, attention is made ready at first use
  bool fp8_kv = false;
  int sliding_window = 0;  // 0: none
  int num_experts = 0;     // of the model
  int local_experts = 0;
  int top_k = 0;
};

// Thread-compatible: one rank's thread uses it. Copy, Record and Wait may be called by several threads at once, each
// with a stream of its own. Outlives its streams; a Buffer may outlive it.
class Device {
 public:
  virtual ~Device() = default;
  // "cpu" or "cuda:0 NVIDIA H200".
  virtual std::string Name() const = 0;
  // Dtype of activations ("act" in ops.h).
  virtual DType activation_dtype() const = 0;
  // Whether the host may read and write what Allocate returns; if not, Copy is the only way.
  virtual bool host_accessible() const = 0;
  // Zero-filled. RESOURCE_EXHAUSTED with the bytes asked for and what is free.
  virtual absl::StatusOr<Buffer> Allocate(int64_t bytes) = 0;
  // Memory that both the host and (asynchronously) the device can read and write.
  virtual absl::StatusOr<Buffer> AllocatePinned(int64_t bytes) = 0;
  // Makes this device the calling thread's: every thread that uses it calls this first.
  virtual absl::Status BindThread() { return absl::OkStatus(); }
  virtual absl::StatusOr<std::unique_ptr<Stream>> CreateStream() = 0;
  virtual absl::StatusOr<std::unique_ptr<Event>> CreateEvent() = 0;
  virtual void Record(Event& event, Stream& stream) = 0;
  // What is enqueued on `stream` from now on runs after the point at which `event` was recorded, on any stream. The
  // host must know that it has been.
  virtual void Wait(Stream& stream, const Event& event) = 0;

  // Whether Capture works; if not, work is enqueued each time.
  virtual bool can_capture() const = 0;
  // Runs `enqueue`, which may only enqueue on `stream` (no host wait, no allocation), and keeps what it enqueued.
  // Nothing runs on the device yet. Errors are enqueue's, or the device's.
  virtual absl::StatusOr<std::unique_ptr<Graph>> Capture(Stream& stream,
                                                         const std::function<absl::Status()>& enqueue) = 0;
  virtual absl::Status Launch(const Graph& graph, Stream& stream) = 0;

  // Allocates the ops' workspaces and prepares (tunes) what takes long. Before the first op but FillUniform; again,
  // with nothing in flight, where limits have grown. RESOURCE_EXHAUSTED as Allocate.
  virtual absl::Status Prepare(const OpLimits& limits) = 0;

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
  // How a CPU multiplies F32 activations by bf16 weights: amx, avx512_bf16 (activations as two bf16 parts, 2^-18 of
  // them is lost), fma; auto: amx where it has it, else avx512_bf16 on AMD's, else fma. Results differ in their last
  // bits.
  std::string cpu_gemm = "auto";
  // Every op gives a row the same bits whatever else is in the batch, in prefill and decode alike. The CPU always does;
  // on CUDA it costs speed, most of all in prefill.
  bool deterministic = false;
  // CUDA: file that keeps the matrix algorithms found by search, by device and library version; empty: searched anew.
  std::string tuning_file;
};

// What the hardware reaches with plain loops, all of it together: the limits that benchmarks divide by.
struct MachineRates {
  double read_bytes_per_s = 0;  // reading memory that no cache holds
  double flops_per_s = 0;       // multiply-adds (two FLOPs each): F32 on registers (CPU), bf16 matrix products (CUDA)
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
