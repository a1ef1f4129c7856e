// The ops of a mixture-of-experts layer: route, dispatch, experts, combine. Against a float64 reference, and fused ops
// against the single ones, bit for bit.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "tests/kernels/ops_fixture.h"

namespace soloist {
namespace {

class MoeOpsTest : public OpsTest {};
INSTANTIATE_TEST_SUITE_P(Paths, MoeOpsTest,
                         testing::Combine(testing::ValuesIn(GemmKernelNames()), testing::Values(1, 2)));

TEST_P(MoeOpsTest, RouteDispatchExpertsCombine) {
  const int n = 37, hidden = 48, inner = 40, num_experts = 5, top_k = 2;
  const auto gate = RandomBf16(num_experts * hidden, 0.3f);
  const auto norm = Random(hidden);
  for (const Activation activation : {Activation::kSiluGated, Activation::kGelu}) {
    const int rows_in = activation == Activation::kSiluGated ? 2 * inner : inner;
    std::vector<std::vector<BFloat16>> w_in, w_out;
    std::vector<Tensor> t_in, t_out;
    for (int e = 0; e < num_experts; ++e) {
      w_in.push_back(RandomBf16(rows_in * hidden, 0.2f));
      w_out.push_back(RandomBf16(hidden * inner, 0.2f));
    }
    for (int e = 0; e < num_experts; ++e) {
      t_in.push_back(MakeTensor(w_in[e].data(), rows_in, hidden));
      t_out.push_back(MakeTensor(w_out[e].data(), hidden, inner));
    }
    std::vector<int32_t> experts(n * top_k, -7), slots(n * top_k, -7), counts(num_experts, -7),
        begins(num_experts + 1, -7);
    std::vector<float> weights(n * top_k, kPoison), out(n * hidden, kPoison), x(n * hidden, kPoison);
    std::vector<float> residual = Random(n * hidden);
    const Tensor tx = MakeTensor(x.data(), n, hidden), te = MakeTensor(experts.data(), n, top_k),
                 tw = MakeTensor(weights.data(), n, top_k), ts = MakeTensor(slots.data(), n, top_k);
    ops().Route({.residual = MakeTensor(residual.data(), n, hidden),
                 .norm_weight = MakeTensor(norm.data(), 1, hidden),
                 .eps = 1e-5f,
                 .normed = tx,
                 .gate = MakeTensor(gate.data(), num_experts, hidden),
                 .experts = te,
                 .weights = tw},
                stream());
    const std::vector<int32_t> order = {3, 1, 4, 0, 2};
    std::vector<float> rows(n * top_k * hidden, kPoison), scratch(n * top_k * rows_in, kPoison),
        y(rows.size(), kPoison);
    const Tensor tr = MakeTensor(rows.data(), n * top_k, hidden), ty = MakeTensor(y.data(), n * top_k, hidden);
    ops().DispatchRows({.x = tx,
                        .experts = te,
                        .order = order.data(),
                        .num_experts = num_experts,
                        .slots = ts,
                        .counts = counts.data(),
                        .begins = begins.data(),
                        .dst = tr},
                       stream());
    // Each expert's rows in two segments, as from two sources, of which one is found by the host, one on the device.
    std::vector<ExpertRows> groups;
    int64_t at = 0;
    std::vector<int32_t> halves, second_begins;
    halves.reserve(2 * num_experts);
    second_begins.reserve(num_experts);
    for (const int32_t e : order) {
      EXPECT_EQ(begins[e], at);
      const int32_t first = counts[e] / 2;
      halves.push_back(first);
      groups.push_back({e, at, first, &halves.back()});
      halves.push_back(counts[e] - first);
      second_begins.push_back(static_cast<int32_t>(at + first));
      groups.push_back({e, -1, n, &halves.back(), &second_begins.back()});
      at += counts[e];
    }
    ASSERT_EQ(at, n * top_k);
    EXPECT_EQ(begins[num_experts], at);
    ops().ExpertMlp({.x = tr,
                     .groups = groups.data(),
                     .num_groups = static_cast<int>(groups.size()),
                     .w_in = t_in.data(),
                     .w_out = t_out.data(),
                     .num_experts = num_experts,
                     .activation = activation,
                     .expected_rows = n * top_k,
                     .scratch = MakeTensor(scratch.data(), n * top_k, rows_in),
                     .out = ty},
                    stream());
    ops().CombineRows({.y = ty, .slots = ts, .weights = tw, .delta = MakeTensor(out.data(), n, hidden)}, stream());

    std::vector<double> ref(out.size(), 0);
    for (int i = 0; i < n; ++i) {
      std::vector<std::pair<double, int>> logits;
      for (int e = 0; e < num_experts; ++e) {
        double dot = 0;
        for (int d = 0; d < hidden; ++d) dot += double{x[i * hidden + d]} * Widened(gate[e * hidden + d]);
        logits.push_back({-dot, e});
      }
      std::sort(logits.begin(), logits.end());
      const double second = std::exp(logits[0].first - logits[1].first);
      for (int j = 0; j < top_k; ++j) {
        const int e = logits[j].second;
        ASSERT_EQ(experts[i * top_k + j], e);
        const double weight = (j == 0 ? 1.0 : second) / (1 + second);
        EXPECT_NEAR(weights[i * top_k + j], weight, 1e-5);
        std::vector<double> in(rows_in), act(inner);
        for (int r = 0; r < rows_in; ++r) {
          for (int d = 0; d < hidden; ++d) in[r] += double{x[i * hidden + d]} * Widened(w_in[e][r * hidden + d]);
        }
        for (int r = 0; r < inner; ++r) {
          act[r] = activation == Activation::kSiluGated ? in[r] / (1 + std::exp(-in[r])) * in[inner + r]
                                                        : 0.5 * in[r] * (1 + std::erf(in[r] / std::sqrt(2.0)));
        }
        for (int d = 0; d < hidden; ++d) {
          for (int r = 0; r < inner; ++r) ref[i * hidden + d] += weight * act[r] * Widened(w_out[e][d * inner + r]);
        }
      }
    }
    EXPECT_LE(RelativeError(out, ref), 1e-5);
  }
}

// The norm within Route is AddRmsNorm; padding rows choose nothing and change nothing for others.
TEST_P(MoeOpsTest, RouteNormsAndPads) {
  const int n = 33, hidden = 70, num_experts = 8, top_k = 3;
  const auto before = Random(n * hidden), delta = Random(n * hidden), norm = Random(hidden);
  const auto gate = RandomBf16(num_experts * hidden, 0.3f);
  std::vector<float> residual = before, normed(n * hidden, kPoison);
  ops().AddRmsNorm(MakeTensor(residual.data(), n, hidden), MakeTensor(delta.data(), n, hidden),
                   MakeTensor(norm.data(), 1, hidden), 1e-5f, MakeTensor(normed.data(), n, hidden), stream());
  std::vector<int32_t> all_experts;
  std::vector<float> all_weights;
  for (const int32_t real : {n, 20, 0}) {
    std::vector<float> fused_residual = before, fused_normed(n * hidden, kPoison), weights(n * top_k, kPoison);
    std::vector<int32_t> experts(n * top_k, -7);
    ops().Route({.residual = MakeTensor(fused_residual.data(), n, hidden),
                 .delta = MakeTensor(delta.data(), n, hidden),
                 .norm_weight = MakeTensor(norm.data(), 1, hidden),
                 .eps = 1e-5f,
                 .normed = MakeTensor(fused_normed.data(), n, hidden),
                 .gate = MakeTensor(gate.data(), num_experts, hidden),
                 .num_rows = real == n ? nullptr : &real,
                 .experts = MakeTensor(experts.data(), n, top_k),
                 .weights = MakeTensor(weights.data(), n, top_k)},
                stream());
    EXPECT_TRUE(std::equal(fused_normed.begin(), fused_normed.begin() + real * hidden, normed.begin()));
    EXPECT_TRUE(std::equal(fused_residual.begin(), fused_residual.begin() + real * hidden, residual.begin()));
    if (real == n) {
      all_experts = experts;
      all_weights = weights;
    }
    for (int i = 0; i < n * top_k; ++i) {
      EXPECT_EQ(experts[i], i < real * top_k ? all_experts[i] : -1);
      EXPECT_EQ(weights[i], i < real * top_k ? all_weights[i] : 0.0f);
    }
  }
}

// Slots by the definition, with choices that have no row, given bases, headers for every destination.
TEST_P(MoeOpsTest, DispatchRows) {
  const int hidden = 3, top_k = 2, num_experts = 4, destinations = 2, chunk = 12;
  for (const int n : {0, 1, 5}) {
    const auto x = Random(n * hidden);
    // Chunk: 2 rows of header, then 5 rows for each of 2 experts.
    const std::vector<int64_t> base = {2, chunk + 2, 7, chunk + 7};
    std::vector<int32_t> experts;
    for (int i = 0; i < n; ++i) {
      experts.push_back(i % 3 == 2 ? -1 : i % num_experts);
      experts.push_back(i == 3 ? -1 : (i + 1) % num_experts);
    }
    std::vector<int32_t> slots(n * top_k, -7), counts(num_experts, -7), begins(num_experts, -7);
    std::vector<float> dst(destinations * chunk * hidden, kPoison);
    const int64_t stride = chunk * hidden * 4;
    ops().DispatchRows({.x = MakeTensor(x.data(), n, hidden),
                        .experts = MakeTensor(experts.data(), n, top_k),
                        .base = base.data(),
                        .num_experts = num_experts,
                        .slots = MakeTensor(slots.data(), n, top_k),
                        .counts = counts.data(),
                        .begins = begins.data(),
                        .dst = MakeTensor(dst.data(), destinations * chunk, hidden),
                        .num_headers = destinations,
                        .header_stride_bytes = stride},
                       stream());
    std::vector<int32_t> seen(num_experts, 0);
    int rows_written = 0;
    for (int i = 0; i < n * top_k; ++i) {
      if (experts[i] < 0) {
        EXPECT_EQ(slots[i], -1);
        continue;
      }
      ASSERT_EQ(slots[i], base[experts[i]] + seen[experts[i]]++);
      for (int d = 0; d < hidden; ++d) EXPECT_EQ(dst[slots[i] * hidden + d], x[i / top_k * hidden + d]);
      ++rows_written;
    }
    EXPECT_EQ(counts, seen);
    EXPECT_EQ(begins, std::vector<int32_t>(base.begin(), base.end()));
    for (int r = 0; r < destinations; ++r) {
      EXPECT_EQ(std::memcmp(reinterpret_cast<char*>(dst.data()) + r * stride, counts.data(), counts.size() * 4), 0);
    }
    const auto poisoned = std::ranges::count_if(dst, [](float v) { return std::isnan(v); });
    EXPECT_EQ(poisoned, std::ssize(dst) - rows_written * hidden - destinations * num_experts) << "nothing else written";
  }
}

// Room for two rows of each expert: later choices have no row, counts count them, headers stop at the room.
TEST_P(MoeOpsTest, DispatchRowsWithoutRoom) {
  const int hidden = 3, top_k = 2, num_experts = 3, n = 5, room = 2, rows = 1 + num_experts * room;
  const auto x = Random(n * hidden);
  const std::vector<int64_t> base = {1, 3, 5};
  const std::vector<int32_t> experts = {0, 1, 0, 2, 1, 0, -1, 0, 2, 1};
  std::vector<int32_t> slots(n * top_k, -7), counts(num_experts, -7);
  std::vector<float> dst(rows * hidden, kPoison);
  ops().DispatchRows({.x = MakeTensor(x.data(), n, hidden),
                      .experts = MakeTensor(experts.data(), n, top_k),
                      .base = base.data(),
                      .num_experts = num_experts,
                      .slots = MakeTensor(slots.data(), n, top_k),
                      .counts = counts.data(),
                      .dst = MakeTensor(dst.data(), rows, hidden),
                      .room = room,
                      .num_headers = 1,
                      .header_stride_bytes = rows * hidden * 4},
                     stream());
  EXPECT_EQ(slots, std::vector<int32_t>({1, 3, 2, 5, 4, -1, -1, -1, 6, -1}));
  EXPECT_EQ(counts, std::vector<int32_t>({4, 3, 2}));
  for (int e = 0; e < 3; ++e) EXPECT_EQ(std::bit_cast<int32_t>(dst[e]), 2) << "header, expert " << e;
  for (int i = 0; i < n * top_k; ++i) {
    for (int d = 0; d < hidden && slots[i] >= 0; ++d) EXPECT_EQ(dst[slots[i] * hidden + d], x[i / top_k * hidden + d]);
  }
}

// Into delta, into residual and norm, into both: the same sums as by single steps; rows of slot -1 are left out.
TEST_P(MoeOpsTest, CombineFused) {
  const int n = 21, hidden = 35, top_k = 3, rows = 40;
  const auto y = Random(rows * hidden), weights = Random(n * top_k), before = Random(n * hidden), norm = Random(hidden);
  std::vector<int32_t> slots;
  for (int i = 0; i < n * top_k; ++i) slots.push_back(i % 5 == 4 || i / top_k == 2 ? -1 : i * 7 % rows);
  const Tensor ty = MakeTensor(y.data(), rows, hidden), ts = MakeTensor(slots.data(), n, top_k),
               tw = MakeTensor(weights.data(), n, top_k), tn = MakeTensor(norm.data(), 1, hidden);
  std::vector<float> sum(n * hidden, kPoison), residual = before, normed(n * hidden, kPoison);
  std::vector<double> ref(n * hidden, 0);
  for (int i = 0; i < n * top_k; ++i) {
    for (int d = 0; d < hidden && slots[i] >= 0; ++d) {
      ref[i / top_k * hidden + d] += double{weights[i]} * y[slots[i] * hidden + d];
    }
  }
  ops().CombineRows({.y = ty, .slots = ts, .weights = tw, .delta = MakeTensor(sum.data(), n, hidden)}, stream());
  EXPECT_LE(RelativeError(sum, ref), 1e-6);
  ops().AddRmsNorm(MakeTensor(residual.data(), n, hidden), MakeTensor(sum.data(), n, hidden), tn, 1e-5f,
                   MakeTensor(normed.data(), n, hidden), stream());
  for (const bool with_delta : {false, true}) {
    std::vector<float> fused_sum(n * hidden, kPoison), fused_residual = before, fused_normed(n * hidden, kPoison);
    ops().CombineRows({.y = ty,
                       .slots = ts,
                       .weights = tw,
                       .delta = with_delta ? MakeTensor(fused_sum.data(), n, hidden) : Tensor{},
                       .residual = MakeTensor(fused_residual.data(), n, hidden),
                       .norm_weight = tn,
                       .eps = 1e-5f,
                       .normed = MakeTensor(fused_normed.data(), n, hidden)},
                      stream());
    EXPECT_EQ(fused_residual, residual);
    EXPECT_EQ(fused_normed, normed);
    if (with_delta) {
      EXPECT_EQ(fused_sum, sum);
    }
  }
}

}  // namespace
}  // namespace soloist
