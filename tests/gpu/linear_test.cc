// Linear on CUDA against float64 sums of the same bf16 inputs.
#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {
namespace {

struct LinearShape {
  int64_t n, k;
  std::vector<int> rows;
};

// Columns whose reference is computed: all of them where there are few, else the first, the last and random ones.
std::vector<int64_t> Columns(int64_t n, int64_t wanted, Random& random) {
  std::vector<int64_t> columns;
  if (n <= wanted) {
    for (int64_t j = 0; j < n; ++j) columns.push_back(j);
    return columns;
  }
  columns = {0, 1, n - 2, n - 1};
  while (std::ssize(columns) < wanted) columns.push_back(random.Int(0, n - 1));
  return columns;
}

void TestLinear(const ModelSizes& sizes, const std::vector<LinearShape>& shapes) {
  Random random;
  Gpu& gpu = Gpu::For(LimitsOf(sizes));
  Errors narrow_errors("Linear bf16", Errors::kRoundedOnce), wide_errors("Linear f32", Errors::kF32);
  for (const LinearShape& shape : shapes) {
    const auto [n, k, rows] = shape;
    const int64_t most = *std::max_element(rows.begin(), rows.end());
    const auto w = random.NormalBf16(n * k, 1 / std::sqrt(static_cast<float>(k)));
    const auto x = random.NormalBf16(most * k);
    const DeviceArray<BFloat16> w_d(gpu, w), x_d(gpu, x);
    const auto columns = Columns(n, n * k * most > 100'000'000 ? 40 : 700, random);
    std::vector<double> ref(most * columns.size());
    Parallel(most, [&](int64_t i) {
      for (size_t j = 0; j < columns.size(); ++j) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l) sum += double{Widened(x[i * k + l])} * Widened(w[columns[j] * k + l]);
        ref[i * columns.size() + j] = sum;
      }
    });
    const auto check = [&](const auto& out, int m, Errors& errors, const std::string& what) {
      ExpectAllFinite(out, what);
      std::remove_cvref_t<decltype(out)> chosen(m * columns.size());
      for (int64_t i = 0; i < m; ++i) {
        for (size_t j = 0; j < columns.size(); ++j) chosen[i * columns.size() + j] = out[i * n + columns[j]];
      }
      errors.Rows(chosen, std::vector<double>(ref.begin(), ref.begin() + std::ssize(chosen)), std::ssize(columns),
                  what);
    };
    for (const int m : rows) {
      const std::string what = Text("m=%d n=%d k=%d", m, static_cast<int>(n), static_cast<int>(k));
      const auto narrow = DeviceArray<BFloat16>::Poisoned(gpu, m * n);
      gpu.ops().Linear(x_d.View(m, k), w_d.View(n, k), narrow.View(m, n), gpu.stream());
      check(narrow.Read(what), m, narrow_errors, what);
      if (m > 512) continue;
      const auto wide = DeviceArray<float>::Poisoned(gpu, m * n);
      gpu.ops().Linear(x_d.View(m, k), w_d.View(n, k), wide.View(m, n), gpu.stream());
      check(wide.Read(what + " f32"), m, wide_errors, what + " f32");
    }
  }
}

TEST(LinearTest, Small) {
  TestLinear(kTinySizes, {{512, 256, {0, 1, 3, 8, 17}}, {256, 256, {1, 33, 65, 130}}, {1000, 256, {1, 5}}});
  TestLinear(kOddSizes, {{16, 64, {1, 2}}, {336, 320, {1, 9, 31, 70}}, {48, 320, {7}}});
}
TEST(LinearTest, EveryRowCount) {
  std::vector<int> rows;
  for (int m = 1; m <= 70; ++m) rows.push_back(m);
  for (const int m : {96, 127, 128, 129, 200, 255, 256, 257, 300}) rows.push_back(m);
  TestLinear(kBenchSizes, {{2048, 1024, rows}, {1024, 1088, rows}});
}
TEST(LinearTest, Models) {
  TestLinear(kTinySizes, {{4096, 256, {1, 2, 64, 300, 2048}}, {512, 256, {2048}}});
  TestLinear(kSmallSizes, {{384, 128, {1, 16, 64, 512, 1000}}, {512, 128, {1, 129}}});
  TestLinear(kBenchSizes, {{2048, 1024, {1, 64, 65, 2000}}, {32000, 1024, {1, 4, 100}}});
}
TEST(LinearTest, Paper16) {
  TestLinear(kPaperSizes, {{12288, 4096, {1, 2, 8, 16, 40, 64, 65, 128, 2048}},
                           {4096, 4096, {1, 7, 32, 100, 1000}},
                           {32000, 4096, {1, 8, 64, 130}},
                           {4096, 16384, {1, 24, 70}}});
}

}  // namespace
}  // namespace soloist
