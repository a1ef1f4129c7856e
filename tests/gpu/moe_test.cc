// Route, DispatchRows and CombineRows on CUDA against float64 and plain loops.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {
namespace {

struct RouteCase {
  ModelSizes sizes;
  int experts, top_k, rows;
  int real_rows = -1;  // -1: no num_rows
  bool delta = true;
};

void TestRoute(const std::vector<RouteCase>& cases) {
  Random random;
  Errors errors("Route normed", Errors::kRoundedOnce);
  int64_t near_ties = 0, choices = 0;
  for (const RouteCase& c : cases) {
    ModelSizes sizes = c.sizes;
    sizes.experts = c.experts;
    Gpu& gpu = Gpu::For(LimitsOf(sizes));
    const int64_t hidden = sizes.hidden, n = c.rows, top_k = c.top_k, num_experts = c.experts;
    const std::string what =
        Text("%s experts=%d top_k=%d n=%d of %d", sizes.name, c.experts, c.top_k, c.real_rows, c.rows);
    const float eps = 1e-5f;
    const auto before = random.Normal(n * hidden);
    const auto delta = random.NormalBf16(n * hidden);
    const auto weight = random.Normal(hidden);
    auto gate = random.NormalBf16(num_experts * hidden, 1 / std::sqrt(static_cast<float>(hidden)));
    // Experts with equal rows: an exact tie of two, which the lower id wins.
    if (num_experts > 3) std::copy_n(&gate[1 * hidden], hidden, &gate[3 * hidden]);
    std::vector<float> sum(before);
    if (c.delta) {
      for (int64_t i = 0; i < n * hidden; ++i) sum[i] += Widened(delta[i]);
    }
    const auto residual = DeviceArray<float>::Guarded(gpu, before);
    const DeviceArray<BFloat16> delta_d(gpu, delta), gate_d(gpu, gate);
    const DeviceArray<float> weight_d(gpu, weight);
    const DeviceArray<int32_t> num_rows(gpu, {c.real_rows});
    const auto normed_d = DeviceArray<BFloat16>::Poisoned(gpu, n * hidden);
    const auto experts_d = DeviceArray<int32_t>::Poisoned(gpu, n * top_k);
    const auto weights_d = DeviceArray<float>::Poisoned(gpu, n * top_k);
    gpu.ops().Route({.residual = residual.View(n, hidden),
                     .delta = c.delta ? delta_d.View(n, hidden) : Tensor{},
                     .norm_weight = weight_d.View(1, hidden),
                     .eps = eps,
                     .normed = normed_d.View(n, hidden),
                     .gate = gate_d.View(num_experts, hidden),
                     .num_rows = c.real_rows < 0 ? nullptr : num_rows.data(),
                     .experts = experts_d.View(n, top_k),
                     .weights = weights_d.View(n, top_k)},
                    gpu.stream());
    const auto normed = normed_d.Read(what);
    const auto experts = experts_d.Read(what);
    const auto weights = weights_d.Read(what);
    const auto after = residual.Read(what);
    const int64_t real = c.real_rows < 0 ? n : c.real_rows;
    EXPECT_TRUE(SameBits(after.data(), sum.data(), real * hidden)) << what << ": residual";
    for (int64_t i = 0; i < n; ++i) {
      const std::string row = what + Text(" row %d", static_cast<int>(i));
      const int32_t* chosen = &experts[i * top_k];
      if (i >= real) {
        for (int64_t j = 0; j < top_k; ++j) {
          EXPECT_EQ(chosen[j], -1) << row;
          EXPECT_EQ(weights[i * top_k + j], 0) << row;
        }
        continue;
      }
      double square = 0;
      for (int64_t d = 0; d < hidden; ++d) square += double{sum[i * hidden + d]} * sum[i * hidden + d];
      const double scale = 1 / std::sqrt(square / static_cast<double>(hidden) + double{eps});
      std::vector<double> ref(hidden), logits(num_experts, 0);
      for (int64_t d = 0; d < hidden; ++d) ref[d] = sum[i * hidden + d] * scale * weight[d];
      errors.Row(&normed[i * hidden], ref.data(), hidden, row);
      for (int64_t e = 0; e < num_experts; ++e) {
        for (int64_t d = 0; d < hidden; ++d) logits[e] += ref[d] * Widened(gate[e * hidden + d]);
      }
      std::vector<int32_t> order(num_experts);
      std::iota(order.begin(), order.end(), 0);
      std::ranges::stable_sort(order, [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
      double total = 0;
      for (int64_t j = 0; j < top_k; ++j) {
        ++choices;
        ASSERT_TRUE(chosen[j] >= 0 && chosen[j] < num_experts) << row << " choice " << j << ": " << chosen[j];
        EXPECT_EQ(std::count(chosen, chosen + top_k, chosen[j]), 1) << row << ": expert " << chosen[j] << " twice";
        if (chosen[j] != order[j]) {
          // Another order of float32 summation may turn a near tie round; an exact one never.
          EXPECT_NE(logits[chosen[j]], logits[order[j]]) << row << " choice " << j << ": a tie, the lower id first";
          EXPECT_LE(std::abs(logits[chosen[j]] - logits[order[j]]), 1e-4) << row << " choice " << j;
          ++near_ties;
        }
        total += std::exp(logits[chosen[j]] - logits[order[0]]);
      }
      for (int64_t j = 0; j < top_k; ++j) {
        const double expected = std::exp(logits[chosen[j]] - logits[order[0]]) / total;
        EXPECT_NEAR(weights[i * top_k + j], expected, 1e-4) << row << " choice " << j;
      }
    }
  }
  std::printf("  Route: %lld choices, %lld of them near ties the other way\n", static_cast<long long>(choices),
              static_cast<long long>(near_ties));
  EXPECT_LE(near_ties * 200, choices + 200);
}

TEST(RouteTest, Small) {
  TestRoute({{kTinySizes, 16, 2, 0}, {kTinySizes, 16, 2, 5}, {kTinySizes, 16, 2, 9, 6}, {kOddSizes, 5, 1, 7, 0}});
}
TEST(RouteTest, Large) {
  TestRoute({{kTinySizes, 16, 2, 300},
             {kSmallSizes, 16, 2, 70, 69},
             {kTinySizes, 64, 4, 33},
             {kBenchSizes, 16, 1, 100},
             {kBenchSizes, 4, 4, 20, 20, false},
             {kBenchSizes, 256, 4, 40},
             {kPaperSizes, 16, 2, 1},
             {kPaperSizes, 16, 2, 130, 128},
             {kPaperSizes, 16, 2, 1000}});
}

struct DispatchCase {
  ModelSizes sizes;
  int experts, top_k, rows;
  bool masked;
  int headers = 0;
  bool begins = true;
};

void TestDispatch(const std::vector<DispatchCase>& cases) {
  Random random;
  for (const DispatchCase& c : cases) {
    ModelSizes sizes = c.sizes;
    sizes.experts = c.experts;
    Gpu& gpu = Gpu::For(LimitsOf(sizes));
    const int64_t hidden = sizes.hidden, n = c.rows, top_k = c.top_k, num_experts = c.experts;
    const std::string what = Text("%s experts=%d top_k=%d n=%d %s headers=%d", sizes.name, c.experts, c.top_k, c.rows,
                                  c.masked ? "masked" : "contiguous", c.headers);
    // Experts of a row differ; some are negative (padding); the first is popular.
    std::vector<int32_t> experts(n * top_k);
    for (int64_t i = 0; i < n; ++i) {
      const auto order = random.Permutation(c.experts);
      for (int64_t j = 0; j < top_k; ++j) experts[i * top_k + j] = random.Int(0, 9) == 0 ? -1 : order[j];
      if (i % 3 == 0 && std::count(&experts[i * top_k], &experts[i * top_k] + top_k, 0) == 0) experts[i * top_k] = 0;
      if (i % 7 == 6) std::fill_n(&experts[i * top_k], top_k, -1);
    }
    std::vector<int32_t> counts(num_experts, 0), slots(n * top_k, -1), begins(num_experts, 0);
    for (const int32_t e : experts) {
      if (e >= 0) ++counts[e];
    }
    const auto order = random.Permutation(c.experts);
    std::vector<int64_t> base(num_experts);
    // Masked: a place for n rows per expert, in another order than the ids, with rows between them that nobody writes.
    int64_t at = 0;
    for (const int32_t e : order) {
      base[e] = c.masked ? at + 1 : at;
      begins[e] = static_cast<int32_t>(base[e]);
      at += c.masked ? n + 2 : counts[e];
    }
    if (!c.masked) begins.push_back(static_cast<int32_t>(at));
    const int64_t dst_rows = c.masked ? at : n * top_k;
    std::vector<int32_t> used(num_experts, 0);
    for (int64_t i = 0; i < n * top_k; ++i) {
      if (experts[i] >= 0) slots[i] = static_cast<int32_t>(base[experts[i]] + used[experts[i]]++);
    }
    const auto x = random.NormalBf16(n * hidden);
    const DeviceArray<BFloat16> x_d(gpu, x);
    const DeviceArray<int32_t> experts_d(gpu, experts), order_d(gpu, order);
    const auto slots_d = DeviceArray<int32_t>::Poisoned(gpu, n * top_k);
    const auto counts_d = DeviceArray<int32_t>::Poisoned(gpu, num_experts);
    const auto begins_d = DeviceArray<int32_t>::Poisoned(gpu, std::ssize(begins));
    // Headers lie in front of the rows in the same allocation, as the dispatcher's chunks do.
    const int64_t header_rows = c.headers > 0 ? (num_experts * 4 + hidden * 2 - 1) / (hidden * 2) : 0;
    const int64_t chunk_rows = dst_rows + header_rows;
    const auto dst_d = DeviceArray<BFloat16>::Poisoned(gpu, chunk_rows * std::max(1, c.headers) * hidden);
    for (int64_t& b : base) b += header_rows;
    if (header_rows > 0) {
      for (int32_t& s : slots) s += s >= 0 ? static_cast<int32_t>(header_rows) : 0;
      for (int32_t& b : begins) b += static_cast<int32_t>(header_rows);
    }
    const DeviceArray<int64_t> base_d(gpu, base);
    gpu.ops().DispatchRows({.x = x_d.View(n, hidden),
                            .experts = experts_d.View(n, top_k),
                            .base = c.masked ? base_d.data() : nullptr,
                            .order = c.masked ? nullptr : order_d.data(),
                            .num_experts = c.experts,
                            .slots = slots_d.View(n, top_k),
                            .counts = counts_d.data(),
                            .begins = c.begins ? begins_d.data() : nullptr,
                            .dst = dst_d.View(chunk_rows * std::max(1, c.headers), hidden),
                            .num_headers = c.headers,
                            .header_stride_bytes = chunk_rows * hidden * 2},
                           gpu.stream());
    EXPECT_EQ(slots_d.Read(what), slots) << what;
    EXPECT_EQ(counts_d.Read(what), counts) << what;
    if (c.begins) {
      EXPECT_EQ(begins_d.Read(what), begins) << what;
    }
    std::vector<BFloat16> expected(dst_d.size());
    std::memset(static_cast<void*>(expected.data()), 0xFF, expected.size() * 2);
    for (int h = 0; h < c.headers; ++h) {
      std::memcpy(static_cast<void*>(&expected[h * chunk_rows * hidden]), counts.data(), num_experts * 4);
    }
    for (int64_t i = 0; i < n * top_k; ++i) {
      if (slots[i] >= 0) std::copy_n(&x[i / top_k * hidden], hidden, &expected[slots[i] * hidden]);
    }
    EXPECT_TRUE(SameBits(dst_d.Read(what).data(), expected.data(), std::ssize(expected))) << what << ": rows";
  }
}

TEST(DispatchRowsTest, Small) {
  TestDispatch({{kTinySizes, 16, 2, 0, true, 3},
                {kTinySizes, 16, 2, 0, false},
                {kTinySizes, 16, 2, 1, true, 1},
                {kTinySizes, 16, 2, 9, true, 2},
                {kTinySizes, 16, 2, 40, false},
                {kOddSizes, 5, 1, 7, false, 0, false}});
}
TEST(DispatchRowsTest, Large) {
  TestDispatch({{kTinySizes, 16, 2, 300, false},
                {kTinySizes, 16, 2, 1024, false},
                {kTinySizes, 16, 2, 1025, false},
                {kTinySizes, 16, 2, 2048, false},
                {kTinySizes, 16, 2, 1500, true, 4},
                {kSmallSizes, 16, 1, 512, true, 16},
                {kBenchSizes, 64, 4, 64, true, 1, false},
                {kBenchSizes, 64, 4, 1000, false},
                {kBenchSizes, 256, 2, 700, false},
                {kPaperSizes, 16, 2, 64, true, 16},
                {kPaperSizes, 16, 2, 128, false},
                {kPaperSizes, 16, 2, 2048, false}});
}

struct CombineCase {
  ModelSizes sizes;
  int top_k, rows;
  bool delta, residual;
};

void TestCombine(const std::vector<CombineCase>& cases) {
  Random random;
  Errors delta_errors("CombineRows delta", Errors::kRoundedOnce), sums("CombineRows residual", Errors::kF32),
      norms("CombineRows normed", Errors::kRoundedOnce);
  for (const CombineCase& c : cases) {
    Gpu& gpu = Gpu::For(LimitsOf(c.sizes));
    const int64_t hidden = c.sizes.hidden, n = c.rows, top_k = c.top_k, y_rows = n * top_k + 3;
    const std::string what =
        Text("%s top_k=%d n=%d delta=%d residual=%d", c.sizes.name, c.top_k, c.rows, c.delta, c.residual);
    auto y = random.NormalBf16(y_rows * hidden);
    auto slots = random.Permutation(static_cast<int32_t>(y_rows));
    slots.resize(n * top_k);
    std::vector<float> weights(n * top_k);
    std::vector<bool> read(y_rows, false);
    for (int64_t i = 0; i < n * top_k; ++i) {
      weights[i] = static_cast<float>(random.Unit());
      if (i % 5 == 3 || i / top_k % 6 == 5) slots[i] = -1;
      if (slots[i] >= 0) read[slots[i]] = true;
    }
    for (int64_t r = 0; r < y_rows; ++r) {  // what no slot names may be anything
      if (!read[r]) std::memset(static_cast<void*>(&y[r * hidden]), 0xFF, hidden * 2);
    }
    const auto before = random.Normal(n * hidden), weight = random.Normal(hidden);
    const float eps = 1e-5f;
    std::vector<double> sum(n * hidden, 0), residual_ref(n * hidden), normed_ref(n * hidden);
    for (int64_t i = 0; i < n; ++i) {
      double square = 0;
      for (int64_t d = 0; d < hidden; ++d) {
        const int64_t at = i * hidden + d;
        for (int64_t j = 0; j < top_k; ++j) {
          const int32_t slot = slots[i * top_k + j];
          if (slot >= 0) sum[at] += double{weights[i * top_k + j]} * Widened(y[slot * hidden + d]);
        }
        residual_ref[at] = before[at] + sum[at];
        square += residual_ref[at] * residual_ref[at];
      }
      const double scale = 1 / std::sqrt(square / static_cast<double>(hidden) + double{eps});
      for (int64_t d = 0; d < hidden; ++d)
        normed_ref[i * hidden + d] = residual_ref[i * hidden + d] * scale * weight[d];
    }
    const DeviceArray<BFloat16> y_d(gpu, y);
    const DeviceArray<int32_t> slots_d(gpu, slots);
    const DeviceArray<float> weights_d(gpu, weights), weight_d(gpu, weight);
    const auto delta = DeviceArray<BFloat16>::Poisoned(gpu, n * hidden);
    const auto normed = DeviceArray<BFloat16>::Poisoned(gpu, n * hidden);
    const auto residual = DeviceArray<float>::Guarded(gpu, before);
    CombineRowsArgs args{
        .y = y_d.View(y_rows, hidden), .slots = slots_d.View(n, top_k), .weights = weights_d.View(n, top_k)};
    if (c.delta) args.delta = delta.View(n, hidden);
    if (c.residual) {
      args.residual = residual.View(n, hidden);
      args.norm_weight = weight_d.View(1, hidden);
      args.eps = eps;
      args.normed = normed.View(n, hidden);
    }
    gpu.ops().CombineRows(args, gpu.stream());
    const auto delta_out = delta.Read(what), normed_out = normed.Read(what);
    const auto residual_out = residual.Read(what);
    if (c.delta) {
      delta_errors.Rows(delta_out, sum, hidden, what);
    } else {
      EXPECT_TRUE(std::ranges::all_of(delta_out, IsPoison<BFloat16>)) << what;
    }
    if (c.residual) {
      sums.Rows(residual_out, residual_ref, hidden, what);
      norms.Rows(normed_out, normed_ref, hidden, what);
    } else {
      EXPECT_EQ(residual_out, before) << what;
      EXPECT_TRUE(std::ranges::all_of(normed_out, IsPoison<BFloat16>)) << what;
    }
  }
}

TEST(CombineRowsTest, Small) {
  TestCombine({{kTinySizes, 2, 0, true, true},
               {kTinySizes, 2, 1, false, true},
               {kTinySizes, 2, 9, true, false},
               {kOddSizes, 1, 13, true, true}});
}
TEST(CombineRowsTest, Large) {
  TestCombine({{kTinySizes, 2, 2048, false, true},
               {kSmallSizes, 4, 100, true, false},
               {kBenchSizes, 2, 65, true, true},
               {kPaperSizes, 2, 1, false, true},
               {kPaperSizes, 2, 128, false, true},
               {kPaperSizes, 1, 1000, true, true},
               {kPaperSizes, 4, 37, true, false}});
}

}  // namespace
}  // namespace soloist
