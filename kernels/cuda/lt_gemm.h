// Dense matrix products of many rows by cuBLASLt, with algorithms found by timing.
//
// A shape is everything but the number of rows m. Rows are put into buckets; each bucket has one algorithm, found for
// the bucket's upper end on weights that no cache holds, or read from the tuning file. cuBLASLt's algorithms are valid
// for an exact m: the first Run of each m checks its bucket's algorithm for it, and asks the library's heuristics where
// it does not fit.
#ifndef SOLOIST_KERNELS_CUDA_LT_GEMM_H_
#define SOLOIST_KERNELS_CUDA_LT_GEMM_H_

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/tuning_file.h"
#include "kernels/tensor.h"

namespace soloist::cuda {

// x [m, k] and w [n, k] are BF16, out [m, n] is BF16 or F32; rows are `stride` elements apart. k, n and the strides are
// multiples of 8.
struct LtShape {
  int64_t n = 0;
  int64_t k = 0;
  DType out_dtype = DType::kBF16;
  int64_t x_stride = 0;
  int64_t w_stride = 0;
  int64_t out_stride = 0;

  bool operator==(const LtShape&) const = default;
};

struct LtGemmOptions {
  int64_t workspace_bytes = 32 << 20;
  int64_t max_m = 16384;    // most rows of a Run; two bytes of host memory per row and shape
  std::string tuning_file;  // see tuning_file.h; empty: algorithms are searched at each start
};

// Thread-compatible; used on one stream at a time, since the workspace is shared by all calls.
class LtGemm {
 public:
  // For the current device. RESOURCE_EXHAUSTED if there is no memory for the workspace.
  static absl::StatusOr<std::unique_ptr<LtGemm>> Create(const LtGemmOptions& options);
  ~LtGemm();

  // Makes an algorithm ready for each bucket of `shape` up to max_m rows: from the tuning file, or else by timing
  // cuBLASLt's candidates (about a second for a shape and 16384 rows, during which it takes device memory for x, out
  // and up to 256 MB of weights: RESOURCE_EXHAUSTED if there is none). Blocks. Call Save at the end.
  absl::Status Tune(const LtShape& shape, int64_t max_m);
  // Writes what was found to the tuning file.
  absl::Status Save() { return tuning_.Save(); }

  // out = x * w^T: f32 sums, rounded once. 2 m n k FLOP. Pointers are 16-byte aligned. Enqueues only; a few us of
  // the host, more for the first call of an m. A shape that was not tuned takes the heuristics' first choice.
  // INVALID_ARGUMENT for m > max_m; INTERNAL with cuBLAS's reason.
  absl::Status Run(const LtShape& shape, const BFloat16* x, int64_t m, const BFloat16* w, void* out,
                   cudaStream_t stream);

  // Of buckets that Tune searched, not found in the file.
  int searched() const { return searched_; }

 private:
  template <auto kDestroy>
  struct Destroy {
    template <typename T>
    void operator()(T* object) const {
      kDestroy(object);
    }
  };
  template <typename T, auto kDestroy>
  using Owned = std::unique_ptr<std::remove_pointer_t<T>, Destroy<kDestroy>>;

  struct Plans;  // of a shape
  struct Layouts;
  struct Scratch;

  LtGemm(const LtGemmOptions& options, int device, std::string section);
  absl::Status Init();
  absl::StatusOr<Plans*> PlansFor(const LtShape& shape);
  // Candidates for an exact m, best guess first.
  absl::StatusOr<std::vector<cublasLtMatmulAlgo_t>> Candidates(const LtShape& shape, int64_t m, int count);
  bool Fits(Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm);
  absl::Status Resolve(Plans& plans, int64_t m);
  // Microseconds of one of `count` runs, after one that is not timed; none if it does not run.
  std::optional<float> Time(Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm, int count, Scratch& scratch);
  absl::Status Search(const LtShape& shape, int64_t m, Scratch& scratch, cublasLtMatmulAlgo_t* best, float* best_us);
  cublasStatus_t Enqueue(Layouts& layouts, const cublasLtMatmulAlgo_t& algorithm, const void* x, const void* w,
                         void* out, cudaStream_t stream);

  const LtGemmOptions options_;
  const int device_;
  TuningFile tuning_;
  int l2_bytes_ = 0;
  int searched_ = 0;
  Owned<cublasLtHandle_t, cublasLtDestroy> handle_;
  Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product_;
  Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference_;
  Owned<void*, cudaFree> workspace_;
  std::vector<std::unique_ptr<Plans>> plans_;
};

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_LT_GEMM_H_
