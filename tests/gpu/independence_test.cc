// DeviceOptions::deterministic: the bits of a row are the same alone, in a batch, at another place in it, in prefill
// and in decode. (The ops between the matrix products promise it in both modes.)
#include <algorithm>
#include <cmath>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "tests/gpu/attention_case.h"
#include "tests/gpu/expert_case.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {
namespace {

// Row `from` of x, and of whatever belongs to it, put at row `to` of a batch of `rows` random others.
template <typename T>
void PutRow(std::vector<T>& batch, int64_t to, const T* row, int64_t cols) {
  std::copy_n(row, cols, batch.begin() + to * cols);
}

template <typename OutT>
void TestLinear(const ModelSizes& sizes, int64_t n, int64_t k) {
  Random random;
  Gpu& gpu = Gpu::For(LimitsOf(sizes), true);
  const DeviceArray<BFloat16> w(gpu, random.NormalBf16(n * k, 1 / std::sqrt(static_cast<float>(k))));
  const auto row = random.NormalBf16(k);
  const auto run = [&](int64_t m, int64_t at) {
    auto x = random.NormalBf16(m * k);
    PutRow(x, at, row.data(), k);
    const DeviceArray<BFloat16> x_d(gpu, x);
    const auto out = DeviceArray<OutT>::Poisoned(gpu, m * n);
    gpu.ops().Linear(x_d.View(m, k), w.View(n, k), out.View(m, n), gpu.stream());
    const auto all = out.Read("linear");
    return std::vector<OutT>(all.begin() + at * n, all.begin() + (at + 1) * n);
  };
  const auto alone = run(1, 0);
  for (const auto& [m, at] : std::vector<std::pair<int, int>>{{2, 1},
                                                              {7, 3},
                                                              {8, 0},
                                                              {9, 8},
                                                              {16, 15},
                                                              {17, 0},
                                                              {33, 20},
                                                              {64, 63},
                                                              {65, 64},
                                                              {100, 50},
                                                              {300, 299},
                                                              {300, 77}}) {
    EXPECT_TRUE(SameBits(run(m, at).data(), alone.data(), n))
        << sizes.name << " m=" << m << " row " << at << " n=" << n;
  }
}
TEST(RowIndependenceTest, Linear) {
  TestLinear<BFloat16>(kTinySizes, 512, 256);
  TestLinear<float>(kTinySizes, 4096, 256);
  TestLinear<BFloat16>(kBenchSizes, 2048, 1024);
  TestLinear<BFloat16>(kPaperSizes, 12288, 4096);
  TestLinear<float>(kPaperSizes, 32000, 4096);
}

void TestAttention(const AttentionShape& shape, const std::vector<SequenceShape>& sequences, int rows_checked) {
  Random random;
  ModelSizes sizes = kTinySizes;
  sizes.heads = shape.heads, sizes.kv_heads = shape.kv_heads, sizes.head_dim = shape.head_dim;
  Gpu& gpu = Gpu::For(LimitsOf(sizes), true);
  const AttentionCase attention(gpu, shape, sequences, random);
  const auto all = attention.Run();
  Errors errors("attention, deterministic", Errors::kAttention);
  attention.Check(all, 500, random, errors);
  const int count = static_cast<int>(sequences.size());
  for (int s = 0; s < count; ++s) {
    if (sequences[s].length == 0) continue;
    const BFloat16* batched = &all[attention.first_row(s) * attention.width()];
    const auto alone = attention.Run(s, 1);
    EXPECT_TRUE(SameBits(alone.data(), batched, std::ssize(alone)))
        << attention.Name() << ": sequence " << s << " alone";
    for (int i = 0; i < std::min(rows_checked, sequences[s].rows); ++i) {
      const int row = static_cast<int>(random.Int(0, sequences[s].rows - 1));
      const auto one = attention.RunRowAlone(s, row);
      EXPECT_TRUE(SameBits(one.data(), batched + row * attention.width(), attention.width()))
          << attention.Name() << ": row " << row << " of sequence " << s << " as a decode";
    }
  }
}
const std::vector<SequenceShape> kMixed = {{70, 1},    {0, 1},    {1, 1},      {1000, 1}, {40, 40},
                                           {150, 150}, {900, 77}, {2100, 300}, {65, 2}};
TEST(RowIndependenceTest, SmallAttention) {
  TestAttention({.heads = 4, .kv_heads = 2, .head_dim = 64, .block = 16}, {{33, 1}, {0, 1}, {20, 20}, {50, 7}}, 2);
}
TEST(RowIndependenceTest, Attention) {
  for (const DType kv : {DType::kBF16, DType::kF8E4M3}) {
    for (const int window : {0, 100}) {
      for (const auto& [heads, kv_heads, dim] :
           std::vector<std::tuple<int, int, int>>{{4, 2, 64}, {4, 4, 32}, {8, 8, 128}, {8, 1, 128}}) {
        const AttentionShape shape = {heads, kv_heads, dim, dim == 64 ? 16 : 64, window, kv};
        TestAttention(shape, kMixed, 6);
      }
    }
  }
}

void TestExperts(ModelSizes sizes, int experts, const std::vector<std::vector<SourceRows>>& rows, int rows_checked) {
  Random random;
  sizes.experts = experts;
  Gpu& gpu = Gpu::For(LimitsOf(sizes), true);
  const ExpertSet set(gpu, sizes, random);
  const ExpertCase batch(gpu, set, rows, random, sizes.name);
  const int64_t width = batch.hidden();
  const auto all = batch.Run(batch.total_rows(), ExpertCase::Begin::kOnHost);
  Errors errors("ExpertMlp, deterministic", Errors::kBf16);
  batch.Check(all, 20, 60, random, errors, "deterministic");
  for (const int64_t expected : {0, 8192}) {
    EXPECT_TRUE(SameBits(batch.Run(expected, ExpertCase::Begin::kOnDevice).data(), all.data(), std::ssize(all)))
        << sizes.name << ": expected rows " << expected;
  }
  for (int i = 0; i < rows_checked; ++i) {
    const int64_t row = batch.live()[i < 2 ? i * (batch.total_rows() - 1) : random.Int(0, batch.total_rows() - 1)];
    const auto alone = batch.RunRowAlone(row);
    EXPECT_TRUE(SameBits(alone.data(), &all[row * width], width)) << sizes.name << ": row " << row << " alone";
  }
}
TEST(RowIndependenceTest, ExpertMlp) {
  const std::vector<std::vector<SourceRows>> rows = {
      {{5, 8}, {0, 3}, {1, 1}}, {{0, 2}, {0, 0}, {0, 4}}, {{64, 64}, {90, 100}, {17, 20}}, {{1, 1}, {1, 2}, {1, 3}}};
  TestExperts(kTinySizes, 4, rows, 10);
  TestExperts(kSmallSizes, 4, rows, 10);
  TestExperts(kBenchSizes, 4, rows, 10);
  TestExperts(kOddSizes, 4, rows, 10);
  TestExperts(kPaperSizes, 2, {{{3, 8}, {70, 70}}, {{1, 2}, {9, 9}}}, 5);
}

// Route, AddRmsNorm and CombineRows of one row, alone and in a batch.
struct TokenRow {
  std::vector<float> residual_normed, residual_routed, residual_combined, weights;
  std::vector<BFloat16> normed, routed, combined, combined_delta;
  std::vector<int32_t> experts;
  bool operator==(const TokenRow& o) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && SameBits(a.data(), b.data(), std::ssize(a));
    };
    return same(residual_normed, o.residual_normed) && same(residual_routed, o.residual_routed) &&
           same(residual_combined, o.residual_combined) && same(weights, o.weights) && same(normed, o.normed) &&
           same(routed, o.routed) && same(combined, o.combined) && same(combined_delta, o.combined_delta) &&
           same(experts, o.experts);
  }
};

void TestTokenOps(const ModelSizes& model, bool deterministic) {
  Random random;
  ModelSizes sizes = model;
  sizes.experts = 16;
  Gpu& gpu = Gpu::For(LimitsOf(sizes), deterministic);
  const int64_t hidden = sizes.hidden, num_experts = 16, top_k = 2;
  const DeviceArray<float> weight(gpu, random.Normal(hidden));
  const DeviceArray<BFloat16> gate(gpu,
                                   random.NormalBf16(num_experts * hidden, 1 / std::sqrt(static_cast<float>(hidden))));
  const auto row_residual = random.Normal(hidden), row_weights = random.Normal(top_k);
  const auto row_delta = random.NormalBf16(hidden), row_y = random.NormalBf16(top_k * hidden);
  const auto run = [&](int64_t n, int64_t at) {
    auto residual = random.Normal(n * hidden), weights = random.Normal(n * top_k);
    auto delta = random.NormalBf16(n * hidden), y = random.NormalBf16(n * top_k * hidden);
    PutRow(residual, at, row_residual.data(), hidden);
    PutRow(weights, at, row_weights.data(), top_k);
    PutRow(delta, at, row_delta.data(), hidden);
    auto slots = random.Permutation(static_cast<int32_t>(n * top_k));
    for (int64_t j = 0; j < top_k; ++j) PutRow(y, slots[at * top_k + j], &row_y[j * hidden], hidden);
    const DeviceArray<BFloat16> delta_d(gpu, delta), y_d(gpu, y);
    const DeviceArray<int32_t> slots_d(gpu, slots);
    const DeviceArray<float> weights_d(gpu, weights);
    TokenRow result;
    const auto take = [&](const auto& array, int64_t cols, auto& to) {
      const auto all = array.Read();
      to.assign(all.begin() + at * cols, all.begin() + (at + 1) * cols);
    };
    const auto one = DeviceArray<float>::Guarded(gpu, residual), two = DeviceArray<float>::Guarded(gpu, residual),
               three = DeviceArray<float>::Guarded(gpu, residual);
    const auto normed = DeviceArray<BFloat16>::Poisoned(gpu, n * hidden);
    gpu.ops().AddRmsNorm(one.View(n, hidden), delta_d.View(n, hidden), weight.View(1, hidden), 1e-5f,
                         normed.View(n, hidden), gpu.stream());
    take(one, hidden, result.residual_normed);
    take(normed, hidden, result.normed);
    const auto experts = DeviceArray<int32_t>::Poisoned(gpu, n * top_k);
    const auto chosen_weights = DeviceArray<float>::Poisoned(gpu, n * top_k);
    gpu.ops().Route({.residual = two.View(n, hidden),
                     .delta = delta_d.View(n, hidden),
                     .norm_weight = weight.View(1, hidden),
                     .eps = 1e-5f,
                     .normed = normed.View(n, hidden),
                     .gate = gate.View(num_experts, hidden),
                     .experts = experts.View(n, top_k),
                     .weights = chosen_weights.View(n, top_k)},
                    gpu.stream());
    take(two, hidden, result.residual_routed);
    take(normed, hidden, result.routed);
    take(experts, top_k, result.experts);
    take(chosen_weights, top_k, result.weights);
    const auto sums = DeviceArray<BFloat16>::Poisoned(gpu, n * hidden);
    gpu.ops().CombineRows({.y = y_d.View(n * top_k, hidden),
                           .slots = slots_d.View(n, top_k),
                           .weights = weights_d.View(n, top_k),
                           .delta = sums.View(n, hidden),
                           .residual = three.View(n, hidden),
                           .norm_weight = weight.View(1, hidden),
                           .eps = 1e-5f,
                           .normed = normed.View(n, hidden)},
                          gpu.stream());
    take(three, hidden, result.residual_combined);
    take(normed, hidden, result.combined);
    take(sums, hidden, result.combined_delta);
    return result;
  };
  const TokenRow alone = run(1, 0);
  for (const auto& [n, at] : std::vector<std::pair<int, int>>{{2, 1}, {8, 5}, {64, 63}, {200, 100}, {1500, 1499}}) {
    EXPECT_TRUE(run(n, at) == alone) << sizes.name << " n=" << n << " row " << at << " deterministic=" << deterministic;
  }
}
TEST(RowIndependenceTest, TokenOps) {
  for (const bool deterministic : {true, false}) {
    for (const ModelSizes& sizes : {kTinySizes, kOddSizes, kBenchSizes, kPaperSizes})
      TestTokenOps(sizes, deterministic);
  }
}

}  // namespace
}  // namespace soloist
