// y = x w^T. Weights stay as they are, [n, k] row-major bf16. A tile of a few rows of x, small enough for the caches
// near the core, sweeps a block of rows of w that fits the second-level cache; with one row, w streams through once.
// bytes: 2 n k; FLOPs: 2 m n k.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "base/status.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"

namespace soloist {
namespace {

std::vector<const GemmKernel*> Kernels() {
  // Measured in prefill: on a Xeon avx512_bf16 98 GFLOP/s, fma 209; on an EPYC avx512_bf16 70% of the FMA rate.
  std::vector<const GemmKernel*> kernels = {AmxKernel(), &FmaKernel()};
  kernels.insert(__builtin_cpu_is("amd") ? kernels.begin() + 1 : kernels.end(), Bf16Kernel());
  std::erase(kernels, nullptr);
  return kernels;
}

}  // namespace

std::vector<std::string> GemmKernelNames() {
  std::vector<std::string> names;
  for (const GemmKernel* kernel : Kernels()) names.emplace_back(kernel->name);
  return names;
}

absl::StatusOr<const GemmKernel*> FindGemmKernel(std::string_view name) {
  for (const GemmKernel* kernel : Kernels()) {
    if (name == "auto" || name == kernel->name) return kernel;
  }
  return InvalidArgument("--cpu-gemm is '{}', this CPU has: auto, {}", name, absl::StrJoin(GemmKernelNames(), ", "));
}

int64_t GemmBlock(const GemmKernel& kernel, int64_t m, int64_t n, int threads) {
  // Wide blocks spread the cost of reading (and splitting) x; with few rows there must be enough blocks to balance the
  // threads.
  const int64_t most = m >= 32 ? kernel.columns : 256, blocks = int64_t{m >= 32 ? 2 : 4} * threads;
  const int64_t balanced = (n / blocks + 15) / 16 * 16;
  return std::clamp<int64_t>(balanced, 16, most);
}

void GemmColumns(const GemmKernel& kernel, const RowSet& x, const RowSet& out, int64_t m, const Tensor& w,
                 int64_t begin, int64_t end) {
  GemmTile tile;
  tile.w = w.row<const BFloat16>(begin);
  tile.w_stride = w.stride;
  tile.n = end - begin;
  tile.k = w.cols;
  for (int64_t i = 0; i < m; i += kernel.rows) {
    tile.m = static_cast<int>(std::min<int64_t>(kernel.rows, m - i));
    for (int a = 0; a < tile.m; ++a) {
      tile.x[a] = x[i + a];
      tile.out[a] = out[i + a] + begin;
    }
    kernel.run(tile);
  }
}

}  // namespace soloist
