#include "kernels/cuda/lt_gemm.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <optional>
#include <random>
#include <utility>

#include "base/status.h"
#include "kernels/cuda/cuda_error.h"
#include "spdlog/spdlog.h"

namespace soloist::cuda {
namespace {

// Upper ends of the buckets of m. Few enough that a search is short, close enough that tile counts fit.
constexpr std::array<int64_t, 22> kBuckets = {16,  32,  48,   64,   96,   128,  160,  192,  256,  320,   384,
                                              512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384};
constexpr int kCandidates = 16;
constexpr int kFinalists = 5;  // timed again, kRounds times
constexpr int kRounds = 4;

int BucketOf(int64_t m) {
  const auto found = std::lower_bound(kBuckets.begin(), kBuckets.end(), m);
  return static_cast<int>(std::min<int64_t>(found - kBuckets.begin(), kBuckets.size() - 1));
}

absl::Status CublasError(const char* what, cublasStatus_t status) {
  return Internal("cuBLASLt: {}: {} ({})", what, cublasLtGetStatusName(status), cublasLtGetStatusString(status));
}
std::string Key(const LtShape& s, int64_t m) {
  return fmt::format("m={} n={} k={} out={} x_stride={} w_stride={} out_stride={}", m, s.n, s.k,
                     s.out_dtype == DType::kF32 ? "f32" : "bf16", s.x_stride, s.w_stride, s.out_stride);
}

// An algorithm as text: its words in hexadecimal, then its time for whoever reads the file.
std::string Encode(const cublasLtMatmulAlgo_t& algorithm, float us) {
  std::string text;
  for (const uint64_t word : algorithm.data) text += fmt::format("{:016x}", word);
  return text + fmt::format(" {:.1f} us", us);
}
std::optional<cublasLtMatmulAlgo_t> Decode(const std::string& text) {
  cublasLtMatmulAlgo_t algorithm = {};
  constexpr size_t kDigits = 16;
  if (text.size() < std::size(algorithm.data) * kDigits) return std::nullopt;
  const char* at = text.data();
  for (uint64_t& word : algorithm.data) {
    const auto [end, error] = std::from_chars(at, at + kDigits, word, 16);
    if (error != std::errc() || end != at + kDigits) return std::nullopt;
    at = end;
  }
  return algorithm;
}

}  // namespace

// cuBLAS is column-major: out^T [n, m] = w^T's transpose [n, k] * x^T [k, m].
struct LtGemm::Layouts {
  Layouts(const LtShape& s, int64_t m) {
    const cudaDataType out_type = s.out_dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF;
    valid = cublasLtMatrixLayoutInit(&w, CUDA_R_16BF, s.k, s.n, s.w_stride) == CUBLAS_STATUS_SUCCESS &&
            cublasLtMatrixLayoutInit(&x, CUDA_R_16BF, s.k, m, s.x_stride) == CUBLAS_STATUS_SUCCESS &&
            cublasLtMatrixLayoutInit(&out, out_type, s.n, m, s.out_stride) == CUBLAS_STATUS_SUCCESS;
  }
  cublasLtMatrixLayoutOpaque_t w;
  cublasLtMatrixLayoutOpaque_t x;
  cublasLtMatrixLayoutOpaque_t out;
  bool valid;
};

struct LtGemm::Plans {
  LtShape shape;
  std::array<std::optional<cublasLtMatmulAlgo_t>, kBuckets.size()> of_bucket;
  std::vector<cublasLtMatmulAlgo_t> algorithms;  // those that some m uses
  std::vector<uint16_t> of_m;                    // 1 + index into algorithms; 0: not known yet
};

// What a search works on, and its clock.
struct LtGemm::Scratch {
  Owned<void*, cudaFree> memory;
  char* w = nullptr;
  char* x = nullptr;
  char* out = nullptr;
  int64_t w_bytes = 0;
  int copies = 0;  // of w, used in turn, so that each is read from memory
  int next_copy = 0;
  Owned<cudaStream_t, cudaStreamDestroy> stream;
  Owned<cudaEvent_t, cudaEventDestroy> begin;
  Owned<cudaEvent_t, cudaEventDestroy> end;

  absl::Status Allocate(int device, const LtShape& s, int64_t max_m, int64_t l2_bytes);
};

absl::Status LtGemm::Scratch::Allocate(int device, const LtShape& s, int64_t max_m, int64_t l2_bytes) {
  const auto padded = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  w_bytes = padded(s.n * s.w_stride * 2);
  copies = static_cast<int>(std::clamp<int64_t>((4 * l2_bytes + w_bytes - 1) / w_bytes, 1, 8));
  const int64_t inputs = copies * w_bytes + padded(max_m * s.x_stride * 2);
  const int64_t bytes = inputs + padded(max_m * s.out_stride * DTypeBytes(s.out_dtype));
  void* data = nullptr;
  RETURN_IF_CUDA_ERROR(device, cudaMalloc(&data, bytes));
  memory.reset(data);
  w = static_cast<char*>(data);
  x = w + copies * w_bytes;
  out = w + inputs;
  cudaStream_t new_stream;
  RETURN_IF_CUDA_ERROR(device, cudaStreamCreateWithFlags(&new_stream, cudaStreamNonBlocking));
  stream.reset(new_stream);
  cudaEvent_t event;
  RETURN_IF_CUDA_ERROR(device, cudaEventCreate(&event));
  begin.reset(event);
  RETURN_IF_CUDA_ERROR(device, cudaEventCreate(&event));
  end.reset(event);
  // Random values: products of zeros run faster than real ones. A block from the host, then copies of what is there.
  std::vector<uint16_t> block((1 << 20) + 24);
  std::mt19937 random(1);
  for (uint16_t& value : block) value = static_cast<uint16_t>(0x3E80u | (random() & 0x81FFu));
  int64_t filled = std::min<int64_t>(block.size() * sizeof(uint16_t), inputs);
  RETURN_IF_CUDA_ERROR(device, cudaMemcpyAsync(w, block.data(), filled, cudaMemcpyHostToDevice, stream.get()));
  while (filled < inputs) {
    const int64_t part = std::min(filled, inputs - filled);
    RETURN_IF_CUDA_ERROR(device, cudaMemcpyAsync(w + filled, w, part, cudaMemcpyDeviceToDevice, stream.get()));
    filled += part;
  }
  RETURN_IF_CUDA_ERROR(device, cudaStreamSynchronize(stream.get()));
  return absl::OkStatus();
}

LtGemm::LtGemm(const LtGemmOptions& options, int device, std::string section)
    : options_(options), device_(device), tuning_(options.tuning_file, std::move(section)) {}
LtGemm::~LtGemm() = default;

absl::StatusOr<std::unique_ptr<LtGemm>> LtGemm::Create(const LtGemmOptions& options) {
  int device = 0;
  int driver = 0;
  cudaDeviceProp properties;
  RETURN_IF_CUDA_ERROR(device, cudaGetDevice(&device));
  RETURN_IF_CUDA_ERROR(device, cudaDriverGetVersion(&driver));
  RETURN_IF_CUDA_ERROR(device, cudaGetDeviceProperties(&properties, device));
  std::unique_ptr<LtGemm> gemm(new LtGemm(
      options, device, fmt::format("{}, cuBLASLt {}, driver {}", properties.name, cublasLtGetVersion(), driver)));
  gemm->l2_bytes_ = properties.l2CacheSize;
  RETURN_IF_ERROR(gemm->Init());
  return gemm;
}

absl::Status LtGemm::Init() {
  cublasLtHandle_t handle;
  if (const auto status = cublasLtCreate(&handle)) return CublasError("handle", status);
  handle_.reset(handle);
  cublasLtMatmulDesc_t product;
  if (const auto status = cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F)) {
    return CublasError("descriptor", status);
  }
  product_.reset(product);
  const cublasOperation_t transposed = CUBLAS_OP_T;
  if (const auto status =
          cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed))) {
    return CublasError("descriptor", status);
  }
  cublasLtMatmulPreference_t preference;
  if (const auto status = cublasLtMatmulPreferenceCreate(&preference)) return CublasError("preference", status);
  preference_.reset(preference);
  const auto prefer = [preference](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    return cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
  };
  const uint64_t workspace_bytes = options_.workspace_bytes;
  // Parts of k are summed in f32 and in a fixed order.
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  const uint32_t alignment = 16;
  for (const auto status : {prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes),
                            prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions),
                            prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment),
                            prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment),
                            prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment),
                            prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment)}) {
    if (status != CUBLAS_STATUS_SUCCESS) return CublasError("preference", status);
  }
  void* workspace = nullptr;
  RETURN_IF_CUDA_ERROR(device_, cudaMalloc(&workspace, workspace_bytes));
  workspace_.reset(workspace);
  return absl::OkStatus();
}

absl::StatusOr<LtGemm::Plans*> LtGemm::PlansFor(const LtShape& shape) {
  for (const auto& plans : plans_) {
    if (plans->shape == shape) return plans.get();
  }
  if (shape.n <= 0 || shape.k <= 0 ||
      (shape.n | shape.k | shape.x_stride | shape.w_stride | shape.out_stride) % 8 != 0 || shape.x_stride < shape.k ||
      shape.w_stride < shape.k || shape.out_stride < shape.n) {
    return InvalidArgument("matrix product {}: sizes and strides must be multiples of 8, rows must not overlap",
                           Key(shape, 0));
  }
  plans_.push_back(std::make_unique<Plans>());
  plans_.back()->shape = shape;
  plans_.back()->of_m.resize(options_.max_m + 1);
  return plans_.back().get();
}

absl::StatusOr<std::vector<cublasLtMatmulAlgo_t>> LtGemm::Candidates(const LtShape& shape, int64_t m, int count) {
  Layouts layouts(shape, m);
  if (!layouts.valid) return Internal("cuBLASLt: layouts of {}", Key(shape, m));
  std::vector<cublasLtMatmulHeuristicResult_t> results(count);
  int found = 0;
  if (const auto status =
          cublasLtMatmulAlgoGetHeuristic(handle_.get(), product_.get(), &layouts.w, &layouts.x, &layouts.out,
                                         &layouts.out, preference_.get(), count, results.data(), &found)) {
    return CublasError(Key(shape, m).c_str(), status);
  }
  std::vector<cublasLtMatmulAlgo_t> candidates;
  for (int i = 0; i < found; ++i) {
    if (results[i].state == CUBLAS_STATUS_SUCCESS) candidates.push_back(results[i].algo);
  }
  if (candidates.empty()) return Internal("cuBLASLt: no algorithm for {}", Key(shape, m));
  return candidates;
}

bool LtGemm::Fits(Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm) {
  cublasLtMatmulHeuristicResult_t result = {};
  return layouts.valid &&
         cublasLtMatmulAlgoCheck(handle_.get(), product_.get(), &layouts.w, &layouts.x, &layouts.out, &layouts.out,
                                 &algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
         result.state == CUBLAS_STATUS_SUCCESS &&
         static_cast<int64_t>(result.workspaceSize) <= options_.workspace_bytes;
}

absl::Status LtGemm::Resolve(Plans& plans, int64_t m) {
  Layouts layouts(plans.shape, m);
  cublasLtMatmulAlgo_t algorithm;
  if (const auto& tuned = plans.of_bucket[BucketOf(m)]; tuned.has_value() && Fits(layouts, *tuned)) {
    algorithm = *tuned;
  } else {
    ASSIGN_OR_RETURN(const auto candidates, Candidates(plans.shape, m, 1));
    algorithm = candidates[0];
  }
  const auto same = std::find_if(plans.algorithms.begin(), plans.algorithms.end(), [&](const auto& other) {
    return std::memcmp(&other, &algorithm, sizeof(algorithm)) == 0;
  });
  plans.of_m[m] = static_cast<uint16_t>(1 + (same - plans.algorithms.begin()));
  if (same == plans.algorithms.end()) plans.algorithms.push_back(algorithm);
  return absl::OkStatus();
}

cublasStatus_t LtGemm::Enqueue(Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm, const void* x, const void* w,
                               void* out, cudaStream_t stream) {
  const float one = 1;
  const float zero = 0;
  return cublasLtMatmul(handle_.get(), product_.get(), &one, w, &layouts.w, x, &layouts.x, &zero, out, &layouts.out,
                        out, &layouts.out, &algorithm, workspace_.get(), options_.workspace_bytes, stream);
}

std::optional<float> LtGemm::Time(Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm, int count,
                                  Scratch& scratch) {
  for (int i = -1; i < count; ++i) {
    if (i == 0 && cudaEventRecord(scratch.begin.get(), scratch.stream.get()) != cudaSuccess) return std::nullopt;
    scratch.next_copy = (scratch.next_copy + 1) % scratch.copies;
    if (Enqueue(layouts, algorithm, scratch.x, scratch.w + scratch.next_copy * scratch.w_bytes, scratch.out,
                scratch.stream.get()) != CUBLAS_STATUS_SUCCESS) {
      return std::nullopt;
    }
  }
  float ms = 0;
  if (cudaEventRecord(scratch.end.get(), scratch.stream.get()) != cudaSuccess ||
      cudaEventSynchronize(scratch.end.get()) != cudaSuccess ||
      cudaEventElapsedTime(&ms, scratch.begin.get(), scratch.end.get()) != cudaSuccess) {
    return std::nullopt;
  }
  return ms * 1000 / count;
}

absl::Status LtGemm::Search(const LtShape& shape, int64_t m, Scratch& scratch, cublasLtMatmulAlgo_t* best,
                            float* best_us) {
  ASSIGN_OR_RETURN(const auto algorithms, Candidates(shape, m, kCandidates));
  Layouts layouts(shape, m);
  struct Candidate {
    const cublasLtMatmulAlgo_t* algorithm;
    float us;
  };
  std::vector<Candidate> candidates;
  for (const auto& algorithm : algorithms) {
    // One that the device refuses is passed over.
    if (const auto us = Time(layouts, algorithm, 2, scratch); us.has_value()) candidates.push_back({&algorithm, *us});
  }
  RETURN_IF_CUDA_ERROR(device_, cudaStreamSynchronize(scratch.stream.get()));
  if (candidates.empty()) return Internal("cuBLASLt: no algorithm runs for {}", Key(shape, m));
  std::stable_sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a.us < b.us; });
  candidates.resize(std::min<size_t>(candidates.size(), kFinalists));
  // In turn, since the clock drifts with the load.
  const int count = std::clamp(static_cast<int>(300 / candidates[0].us), 2, 16);
  for (int round = 0; round < kRounds; ++round) {
    for (Candidate& candidate : candidates) {
      const auto us = Time(layouts, *candidate.algorithm, count, scratch);
      if (!us.has_value()) continue;
      candidate.us = round == 0 ? *us : std::min(candidate.us, *us);
    }
  }
  RETURN_IF_CUDA_ERROR(device_, cudaStreamSynchronize(scratch.stream.get()));
  const auto fastest =
      std::min_element(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) { return a.us < b.us; });
  *best = *fastest->algorithm;
  *best_us = fastest->us;
  return absl::OkStatus();
}

absl::Status LtGemm::Tune(const LtShape& shape, int64_t max_m) {
  ASSIGN_OR_RETURN(Plans* const plans, PlansFor(shape));
  max_m = std::min(max_m, options_.max_m);
  std::optional<Scratch> scratch;
  const int searched_before = searched_;
  for (int bucket = 0; bucket <= BucketOf(max_m); ++bucket) {
    const int64_t m = std::min(kBuckets[bucket], max_m);
    const std::string key = Key(shape, m);
    Layouts layouts(shape, m);
    if (const auto text = tuning_.Find(key); text.has_value()) {
      if (const auto algorithm = Decode(*text); algorithm.has_value() && Fits(layouts, *algorithm)) {
        plans->of_bucket[bucket] = *algorithm;
        continue;
      }
    }
    if (!scratch.has_value()) RETURN_IF_ERROR(scratch.emplace().Allocate(device_, shape, max_m, l2_bytes_));
    cublasLtMatmulAlgo_t best = {};
    float us = 0;
    RETURN_IF_ERROR(Search(shape, m, *scratch, &best, &us));
    plans->of_bucket[bucket] = best;
    tuning_.Set(key, Encode(best, us));
    ++searched_;
  }
  std::fill(plans->of_m.begin(), plans->of_m.end(), 0);
  plans->algorithms.clear();
  if (searched_ > searched_before) {
    spdlog::info("matrix product [m <= {}, {}] x {}: searched {} row counts", max_m, shape.k, shape.n,
                 searched_ - searched_before);
  }
  return absl::OkStatus();
}

absl::Status LtGemm::Run(const LtShape& shape, const BFloat16* x, int64_t m, const BFloat16* w, void* out,
                         cudaStream_t stream) {
  if (m == 0) return absl::OkStatus();
  if (m < 0 || m > options_.max_m) return InvalidArgument("matrix product: {} rows, limit {}", m, options_.max_m);
  ASSIGN_OR_RETURN(Plans* const plans, PlansFor(shape));
  if (plans->of_m[m] == 0) RETURN_IF_ERROR(Resolve(*plans, m));
  Layouts layouts(shape, m);
  const auto status = Enqueue(layouts, plans->algorithms[plans->of_m[m] - 1], x, w, out, stream);
  return status == CUBLAS_STATUS_SUCCESS ? absl::OkStatus() : CublasError(Key(shape, m).c_str(), status);
}

}  // namespace soloist::cuda
