#include "kernels/cuda/rates.h"

#include <algorithm>

#include "kernels/cuda/cuda_error.h"
#include "kernels/cuda/lt_gemm.h"
#include "kernels/cuda/token_ops.h"

namespace soloist::cuda {
namespace {

constexpr int kPasses = 12;

// Device memory and two events; freed on destruction.
struct Scratch {
  ~Scratch() {
    cudaFree(data);
    if (start != nullptr) cudaEventDestroy(start);
    if (end != nullptr) cudaEventDestroy(end);
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  char* data = nullptr;
  cudaEvent_t start = nullptr, end = nullptr;
  cudaStream_t stream = nullptr;
};

// Shortest of kPasses, seconds; `work` enqueues one pass.
template <typename Work>
absl::StatusOr<double> Shortest(Scratch& scratch, int device, const Work& work) {
  float best = 1e9f;
  for (int pass = -1; pass < kPasses; ++pass) {  // pass -1 warms up
    RETURN_IF_CUDA_ERROR(device, cudaEventRecord(scratch.start, scratch.stream));
    RETURN_IF_ERROR(work());
    RETURN_IF_CUDA_ERROR(device, cudaEventRecord(scratch.end, scratch.stream));
    RETURN_IF_CUDA_ERROR(device, cudaEventSynchronize(scratch.end));
    float ms = 0;
    RETURN_IF_CUDA_ERROR(device, cudaEventElapsedTime(&ms, scratch.start, scratch.end));
    if (pass >= 0) best = std::min(best, ms);
  }
  return best * 1e-3;
}

}  // namespace

absl::StatusOr<MachineRates> MeasureCudaRates(int device) {
  RETURN_IF_CUDA_ERROR(device, cudaSetDevice(device));
  size_t free = 0, total = 0;
  RETURN_IF_CUDA_ERROR(device, cudaMemGetInfo(&free, &total));
  const int64_t bytes = std::min<int64_t>(int64_t{4} << 30, static_cast<int64_t>(free) / 2) / (1 << 20) * (1 << 20);
  constexpr int64_t kSide = 8192, kMatrixBytes = kSide * kSide * 2;
  if (bytes < 3 * kMatrixBytes) {
    return ResourceExhausted("cuda:{} has {} bytes free, measuring its rates takes {}", device, free, 6 * kMatrixBytes);
  }
  Scratch scratch;
  RETURN_IF_CUDA_ERROR(device, cudaMalloc(reinterpret_cast<void**>(&scratch.data), bytes + kReadBlocks * 4));
  RETURN_IF_CUDA_ERROR(device, cudaStreamCreateWithFlags(&scratch.stream, cudaStreamNonBlocking));
  RETURN_IF_CUDA_ERROR(device, cudaEventCreate(&scratch.start));
  RETURN_IF_CUDA_ERROR(device, cudaEventCreate(&scratch.end));
  const auto matrix = [&](int i) {
    return MakeTensor(reinterpret_cast<BFloat16*>(scratch.data + i * kMatrixBytes), kSide, kSide);
  };
  // Numbers as they come in a model: a product of zeros runs faster.
  for (int i = 0; i < 2; ++i) RETURN_IF_CUDA_ERROR(device, FillUniform(i, 1.0f, 0, matrix(i), scratch.stream));

  MachineRates rates;
  auto* sink = reinterpret_cast<uint32_t*>(scratch.data + bytes);
  ASSIGN_OR_RETURN(const double read_s, Shortest(scratch, device, [&] {
                     return CudaStatus(LaunchRead(scratch.data, bytes, sink, scratch.stream), device, "LaunchRead");
                   }));
  rates.read_bytes_per_s = static_cast<double>(bytes) / read_s;

  ASSIGN_OR_RETURN(auto gemm, LtGemm::Create({.max_m = kSide}));
  const LtShape shape = {.n = kSide, .k = kSide, .x_stride = kSide, .w_stride = kSide, .out_stride = kSide};
  ASSIGN_OR_RETURN(const double product_s, Shortest(scratch, device, [&] {
                     return gemm->Run(shape, matrix(0).as<BFloat16>(), kSide, matrix(1).as<BFloat16>(), matrix(2).data,
                                      scratch.stream);
                   }));
  rates.flops_per_s = 2.0 * kSide * kSide * kSide / product_s;
  return rates;
}

}  // namespace soloist::cuda
