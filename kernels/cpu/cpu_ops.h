// CpuOps: Ops on a shared thread pool.
#ifndef SOLOIST_KERNELS_CPU_CPU_OPS_H_
#define SOLOIST_KERNELS_CPU_CPU_OPS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/ops.h"

namespace soloist {

// Those that this CPU has, the fastest first.
std::vector<std::string> GemmKernelNames();
// By name; "auto": the fastest. INVALID_ARGUMENT names what there is.
absl::StatusOr<const GemmKernel*> FindGemmKernel(std::string_view name);

// `pool` must outlive it.
std::unique_ptr<Ops> CreateCpuOps(ThreadPool& pool, const GemmKernel& gemm);

// The parts of CpuOps that have files of their own.

// Rows of F32: row i is at base + index(i) * stride, index(i) = rows ? rows[i] : i.
struct RowSet {
  float* base = nullptr;
  int64_t stride = 0;
  const int32_t* rows = nullptr;
  float* operator[](int64_t i) const { return base + (rows != nullptr ? rows[i] : i) * stride; }
};

// out[i][begin..end) = x[i] * w[begin..end)^T for i in [0, m).
void GemmColumns(const GemmKernel& kernel, const RowSet& x, const RowSet& out, int64_t m, const Tensor& w,
                 int64_t begin, int64_t end);
// Columns of the output that one task should compute.
int64_t GemmBlock(const GemmKernel& kernel, int64_t m, int64_t n, int threads);

void CpuPagedAttention(const AttentionArgs& args, ThreadPool& pool);
void CpuExpertMlp(const ExpertMlpArgs& args, const GemmKernel& gemm, ThreadPool& pool);
void CpuSample(const SampleArgs& args, ThreadPool& pool);

}  // namespace soloist

#endif  // SOLOIST_KERNELS_CPU_CPU_OPS_H_
