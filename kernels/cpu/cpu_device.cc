#include "kernels/cpu/cpu_device.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/host_limits.h"
#include "base/status.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/thread_pool.h"

namespace soloist {
namespace {

class CpuStream final : public Stream {
 public:
  absl::Status Synchronize() override { return absl::OkStatus(); }
};

// Always done: what came before it has run to its end.
class CpuEvent final : public Event {
 public:
  using Clock = std::chrono::steady_clock;
  bool Done() const override { return true; }
  absl::Status Wait() override { return absl::OkStatus(); }
  int64_t NsSince(const Event& earlier) const override {
    return std::chrono::nanoseconds(time_ - static_cast<const CpuEvent&>(earlier).time_).count();
  }
  void Record() { time_ = Clock::now(); }

 private:
  Clock::time_point time_ = Clock::now();
};

// Zeroed pages, huge ones where the kernel gives them: weights and KV are read end to end.
absl::StatusOr<Buffer> Map(int64_t bytes) {
  if (bytes < 0) return InvalidArgument("cpu: allocating {} bytes", bytes);
  if (bytes == 0) return Buffer();
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    return ResourceExhausted("cpu: allocating {} bytes failed, {} are available", bytes, AvailableMemoryBytes());
  }
  if (bytes >= (2 << 20)) madvise(data, bytes, MADV_HUGEPAGE);
  return Buffer(data, bytes, [](void* p, int64_t n) { munmap(p, n); });
}

class CpuDevice final : public Device {
 public:
  CpuDevice(ThreadPool& pool, const GemmKernel& gemm)
      : name_(std::string("cpu (") + gemm.name + ")"), ops_(CreateCpuOps(pool, gemm)) {}
  std::string Name() const override { return name_; }
  DType activation_dtype() const override { return DType::kF32; }
  bool host_accessible() const override { return true; }
  absl::StatusOr<Buffer> Allocate(int64_t bytes) override { return Map(bytes); }
  absl::StatusOr<Buffer> AllocatePinned(int64_t bytes) override { return Map(bytes); }
  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override { return std::make_unique<CpuStream>(); }
  absl::StatusOr<std::unique_ptr<Event>> CreateEvent() override { return std::make_unique<CpuEvent>(); }
  void Record(Event& event, Stream&) override { static_cast<CpuEvent&>(event).Record(); }
  void Wait(Stream&, const Event&) override {}  // it has run to its end when it is recorded

  bool can_capture() const override { return false; }
  absl::StatusOr<std::unique_ptr<Graph>> Capture(Stream&, const std::function<absl::Status()>&) override {
    return absl::UnimplementedError("cpu: a stream runs each call at once, nothing can be captured");
  }
  absl::Status Launch(const Graph&, Stream&) override {
    return absl::UnimplementedError("cpu: there are no graphs to launch");
  }
  absl::Status Prepare(const OpLimits&) override { return absl::OkStatus(); }

  void Copy(void* dst, const void* src, int64_t bytes, Stream&) override {
    if (bytes > 0) std::memcpy(dst, src, bytes);
  }
  int64_t FreeBytes() const override { return AvailableMemoryBytes(); }
  Ops& ops() override { return *ops_; }

 private:
  const std::string name_;
  std::unique_ptr<Ops> ops_;
};

double Seconds(const auto& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

class CpuDeviceFactory final : public DeviceFactory {
 public:
  CpuDeviceFactory(int threads, const GemmKernel& gemm) : pool_(threads), gemm_(gemm) {}
  absl::StatusOr<std::unique_ptr<Device>> CreateDevice(int) override {
    return std::make_unique<CpuDevice>(pool_, gemm_);
  }

  // The best of several passes: other tenants of the machine only ever slow a pass down.
  MachineRates MeasureRates() override {
    MachineRates rates;
    constexpr int64_t kBytes = int64_t{512} << 20, kPieces = 256, kFloats = kBytes / 4 / kPieces;
    auto memory = Map(kBytes);
    if (!memory.ok()) return rates;
    std::memset(memory->data(), 1, kBytes);
    const float* data = static_cast<const float*>(memory->data());
    std::vector<float> sums(kPieces);
    for (int pass = 0; pass < 12; ++pass) {
      const double read = Seconds(
          [&] { pool_.ParallelFor(kPieces, [&](int64_t i) { sums[i] = ReadLoop(data + i * kFloats, kFloats); }); });
      rates.read_bytes_per_s = std::max(rates.read_bytes_per_s, kBytes / read);
      std::vector<FmaLoop> loops(pool_.threads());
      const double multiply =
          Seconds([&] { pool_.ParallelFor(pool_.threads(), [&](int64_t i) { loops[i] = RunFmaLoop(4'000'000); }); });
      double flops = 0;
      for (const FmaLoop& loop : loops) flops += loop.flops;
      rates.flops_per_s = std::max(rates.flops_per_s, flops / multiply);
    }
    return rates;
  }

 private:
  ThreadPool pool_;
  const GemmKernel& gemm_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceFactory>> CreateCpuDeviceFactory(const DeviceOptions& options) {
  const int threads = options.cpu_threads;
  if (threads < 0 || threads > 1024) return InvalidArgument("--threads is {}, allowed: 0 (all cores) to 1024", threads);
  ASSIGN_OR_RETURN(const GemmKernel* gemm, FindGemmKernel(options.cpu_gemm));
  return std::make_unique<CpuDeviceFactory>(threads > 0 ? threads : UsableCores(), *gemm);
}

}  // namespace soloist
