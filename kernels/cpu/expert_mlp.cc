// The expert MLP over rows that arrived from several ranks: each expert's weights are read once, whatever the number of
// sources.
#include <algorithm>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"

namespace soloist {
namespace {

// The rows of one local expert, as indices into x.
struct Expert {
  int32_t id;
  int64_t first;  // into rows
  int64_t count;
};

// Kept per thread, so that a step allocates only until it has seen its largest.
struct Plan {
  std::vector<int32_t> rows;
  std::vector<Expert> experts;
};

}  // namespace

void CpuExpertMlp(const ExpertMlpArgs& args, const GemmKernel& gemm, ThreadPool& pool) {
  thread_local Plan plan;
  plan.rows.clear();
  plan.experts.clear();
  for (int g = 0; g < args.num_groups; ++g) {
    const ExpertRows& group = args.groups[g];
    const int64_t count = *group.row_count;
    CHECK(count >= 0 && count <= group.row_capacity);
    CHECK(group.expert >= 0 && group.expert < args.num_experts);
    if (count == 0) continue;
    if (plan.experts.empty() || plan.experts.back().id != group.expert) {
      plan.experts.push_back({group.expert, static_cast<int64_t>(plan.rows.size()), 0});
    }
    plan.experts.back().count += count;
    const int64_t begin = group.row_begin_on_device != nullptr ? *group.row_begin_on_device : group.row_begin;
    CHECK(begin >= 0 && begin + count <= args.x.rows);
    for (int64_t i = 0; i < count; ++i) plan.rows.push_back(static_cast<int32_t>(begin + i));
  }
  if (plan.rows.empty()) return;
  const std::vector<int32_t>& rows = plan.rows;
  const std::vector<Expert>& experts = plan.experts;
  const int64_t n_in = args.w_in[0].rows, n_out = args.w_out[0].rows, inner = args.w_out[0].cols;

  // Both products: tasks are (expert, block of columns).
  const auto multiply = [&](const Tensor* weights, const Tensor& from, const Tensor& to, int64_t n) {
    const int64_t mean = static_cast<int64_t>(rows.size() / experts.size());
    const int64_t block = GemmBlock(gemm, std::max<int64_t>(1, mean), n, pool.threads()),
                  blocks = (n + block - 1) / block;
    pool.ParallelFor(static_cast<int64_t>(experts.size()) * blocks, [&](int64_t task) {
      const Expert& expert = experts[task / blocks];
      const int64_t begin = task % blocks * block;
      const int32_t* index = rows.data() + expert.first;
      GemmColumns(gemm, {from.as<float>(), from.stride, index}, {to.as<float>(), to.stride, index}, expert.count,
                  weights[expert.id], begin, std::min(begin + block, n));
    });
  };
  multiply(args.w_in, args.x, args.scratch, n_in);
  constexpr int64_t kRowsPerTask = 8;
  const int64_t num_rows = static_cast<int64_t>(rows.size());
  pool.ParallelFor((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    for (int64_t i = task * kRowsPerTask; i < std::min(num_rows, (task + 1) * kRowsPerTask); ++i) {
      float* row = args.scratch.row<float>(rows[i]);
      args.activation == Activation::kSiluGated ? SiluGate(row, row + inner, inner) : Gelu(row, inner);
    }
  });
  multiply(args.w_out, args.scratch, args.out, n_out);
}

}  // namespace soloist
