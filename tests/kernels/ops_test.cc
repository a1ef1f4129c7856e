// Every CPU op against a float64 reference, with poisoned outputs, odd shapes, and row independence bit for bit.
#include "kernels/ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"
#include "kernels/device.h"
#include "tests/kernels/ops_fixture.h"

namespace soloist {
namespace {

float Widened(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

INSTANTIATE_TEST_SUITE_P(Paths, OpsTest, testing::Combine(testing::Bool(), testing::Values(1, 2)));

TEST_P(OpsTest, Linear) {
  for (const auto& [m, n, k] : std::vector<std::tuple<int, int, int>>{{0, 8, 8},
                                                                      {1, 1, 1},
                                                                      {1, 33, 31},
                                                                      {2, 16, 64},
                                                                      {3, 7, 100},
                                                                      {5, 257, 129},
                                                                      {70, 96, 256},
                                                                      {130, 300, 1000}}) {
    const auto x = Random(int64_t{m} * k);
    const auto w = RandomBf16(int64_t{n} * k);
    std::vector<float> out(int64_t{m} * n, kPoison);
    std::vector<double> ref(out.size());
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int l = 0; l < k; ++l) sum += double{x[i * k + l]} * Widened(w[j * k + l]);
        ref[i * n + j] = sum;
      }
    }
    const Tensor weights = MakeTensor(w.data(), n, k);
    ops().Linear(MakeTensor(x.data(), m, k), weights, MakeTensor(out.data(), m, n), stream());
    EXPECT_LE(RelativeError(out, ref), 1e-4) << m << " " << n << " " << k;
    // Row by row: the same bits.
    std::vector<float> alone(out.size(), kPoison);
    for (int i = 0; i < m; ++i) {
      ops().Linear(MakeTensor(x.data() + i * k, 1, k), weights, MakeTensor(alone.data() + i * n, 1, n), stream());
    }
    EXPECT_EQ(out, alone) << m << " " << n << " " << k;
  }
}

TEST_P(OpsTest, AddRmsNorm) {
  for (const int n : {1, 7, 64, 257}) {
    const auto weight = Random(n), delta = Random(3 * n), before = Random(3 * n);
    std::vector<float> residual = before, out(3 * n, kPoison);
    std::vector<double> ref(3 * n), sum(3 * n);
    for (int i = 0; i < 3; ++i) {
      double square = 0;
      for (int j = 0; j < n; ++j) {
        sum[i * n + j] = double{before[i * n + j]} + delta[i * n + j];
        square += sum[i * n + j] * sum[i * n + j];
      }
      for (int j = 0; j < n; ++j) ref[i * n + j] = sum[i * n + j] / std::sqrt(square / n + 1e-5) * weight[j];
    }
    ops().AddRmsNorm(MakeTensor(residual.data(), 3, n), MakeTensor(delta.data(), 3, n), MakeTensor(weight.data(), 1, n),
                     1e-5f, MakeTensor(out.data(), 3, n), stream());
    EXPECT_LE(RelativeError(out, ref), 1e-6) << n;
    EXPECT_LE(RelativeError(residual, sum), 1e-6) << n;
  }
}

TEST_P(OpsTest, EmbedAndGather) {
  const auto table = RandomBf16(10 * 6);
  const std::vector<int32_t> ids = {3, -2, 9, -1}, previous = {7, 0}, rows = {2, 2, 0};
  std::vector<float> out(4 * 6, kPoison), gathered(3 * 6, kPoison);
  ops().Embed(ids.data(), previous.data(), MakeTensor(table.data(), 10, 6), MakeTensor(out.data(), 4, 6), stream());
  const int expected[] = {3, 0, 9, 7};
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 6; ++j) EXPECT_EQ(out[i * 6 + j], Widened(table[expected[i] * 6 + j]));
  }
  ops().GatherRows(MakeTensor(out.data(), 4, 6), rows.data(), MakeTensor(gathered.data(), 3, 6), stream());
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 6; ++j) EXPECT_EQ(gathered[i * 6 + j], out[rows[i] * 6 + j]);
  }
}

// Rope, append and attention together: a ragged batch of chunks over a shuffled cache against plain attention on
// rotated keys.
TEST_P(OpsTest, RopeAndPagedAttention) {
  struct Case {
    int heads, kv_heads, dim, block, window;
    DType kv;
  };
  for (const Case& c :
       {Case{4, 2, 64, 16, 0, DType::kF32}, Case{3, 3, 6, 5, 0, DType::kF32}, Case{8, 1, 34, 16, 20, DType::kF32},
        Case{4, 2, 128, 64, 0, DType::kBF16}, Case{2, 1, 2, 1, 1, DType::kF32}}) {
    const std::vector<int> lens = {1, 70, 130}, chunks = {1, 33, 3};
    const int q_width = c.heads * c.dim, kv_width = c.kv_heads * c.dim, width = q_width + 2 * kv_width;
    const int pages = (130 + c.block - 1) / c.block, blocks = 3 * pages;
    std::vector<int32_t> ids(blocks);
    for (int b = 0; b < blocks; ++b) ids[b] = b;
    std::shuffle(ids.begin(), ids.end(), random_);
    std::vector<float> cos_sin(200 * c.dim);
    for (int p = 0; p < 200; ++p) {
      for (int d = 0; d < c.dim / 2; ++d) {
        const double angle = p * std::pow(10000.0, -2.0 * d / c.dim);
        cos_sin[p * c.dim + d] = static_cast<float>(std::cos(angle));
        cos_sin[p * c.dim + c.dim / 2 + d] = static_cast<float>(std::sin(angle));
      }
    }
    const int64_t cache = int64_t{blocks} * c.block * kv_width;
    std::vector<float> keys(cache, kPoison), values(cache, kPoison);
    const KvLayer kv{keys.data(), values.data(), c.kv, blocks, c.kv_heads, c.block, c.dim};
    const auto slot = [&](int s, int p) { return ids[s * pages + p / c.block] * c.block + p % c.block; };

    std::vector<int32_t> starts = {0}, tables(ids.begin(), ids.end());
    std::vector<float> q_all, out_all;
    std::vector<double> ref;
    const double bound = c.kv == DType::kF32 ? 1e-5 : 8e-3;
    for (size_t s = 0; s < lens.size(); ++s) {
      const auto qkv = Random(int64_t{lens[s]} * width);
      std::vector<int32_t> positions(lens[s]), slots(lens[s]);
      for (int p = 0; p < lens[s]; ++p) positions[p] = p, slots[p] = slot(static_cast<int>(s), p);
      std::vector<float> q(int64_t{lens[s]} * q_width, kPoison);
      ops().RopeAppendKv(MakeTensor(qkv.data(), lens[s], width), positions.data(), slots.data(),
                         MakeTensor(cos_sin.data(), 200, c.dim), kv, MakeTensor(q.data(), lens[s], q_width), stream());
      const auto rotated = [&](int p, int head, int d) {  // head: q heads, then k heads
        const int half = c.dim / 2, pair = d % half;
        const double angle = p * std::pow(10000.0, -2.0 * pair / c.dim);
        const double a = qkv[p * width + head * c.dim + pair], b = qkv[p * width + head * c.dim + half + pair];
        return d < half ? a * std::cos(angle) - b * std::sin(angle) : b * std::cos(angle) + a * std::sin(angle);
      };
      const int first = lens[s] - chunks[s];
      for (int p = first; p < lens[s]; ++p) {
        for (int h = 0; h < c.heads; ++h) {
          const int kv_head = h / (c.heads / c.kv_heads), begin = c.window > 0 ? std::max(0, p - c.window + 1) : 0;
          std::vector<double> scores;
          double sum = 0;
          for (int key = begin; key <= p; ++key) {
            double dot = 0;
            for (int d = 0; d < c.dim; ++d) dot += rotated(p, h, d) * rotated(key, c.heads + kv_head, d);
            scores.push_back(std::exp(dot / std::sqrt(c.dim)));
            sum += scores.back();
          }
          for (int d = 0; d < c.dim; ++d) {
            double value = 0;
            for (int key = begin; key <= p; ++key) {
              value += scores[key - begin] / sum * qkv[key * width + q_width + kv_width + kv_head * c.dim + d];
            }
            ref.push_back(value);
          }
        }
      }
      q_all.insert(q_all.end(), q.begin() + int64_t{first} * q_width, q.end());
      starts.push_back(starts.back() + chunks[s]);
    }
    const int n = starts.back();
    std::vector<float> out(int64_t{n} * q_width, kPoison);
    AttentionArgs args{.q = MakeTensor(q_all.data(), n, q_width),
                       .kv = kv,
                       .query_starts = starts.data(),
                       .seq_lens = lens.data(),
                       .block_tables = tables.data(),
                       .num_sequences = 3,
                       .max_blocks = pages,
                       .num_heads = c.heads,
                       .sliding_window = c.window,
                       .scale = 1.0f / std::sqrt(static_cast<float>(c.dim)),
                       .out = MakeTensor(out.data(), n, q_width)};
    ops().PagedAttention(args, stream());
    EXPECT_LE(RelativeError(out, ref), bound) << c.dim;
    // One query at a time: the same bits.
    std::vector<float> alone(out.size(), kPoison);
    for (int s = 0; s < 3; ++s) {
      for (int i = 0; i < chunks[s]; ++i) {
        const int32_t one[] = {0, 1}, len = lens[s] - chunks[s] + i + 1;
        const int64_t row = starts[s] + i;
        AttentionArgs single = args;
        single.q = args.q.Rows(row, 1);
        single.out = MakeTensor(alone.data(), n, q_width).Rows(row, 1);
        single.query_starts = one;
        single.seq_lens = &len;
        single.block_tables = tables.data() + s * pages;
        single.num_sequences = 1;
        ops().PagedAttention(single, stream());
      }
    }
    EXPECT_EQ(out, alone) << c.dim;
  }
}

TEST_P(OpsTest, RouteScatterExpertsCombine) {
  const int n = 37, hidden = 48, inner = 40, num_experts = 5, top_k = 2;
  const auto x = Random(n * hidden);
  const auto gate = RandomBf16(num_experts * hidden, 0.3f);
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
    std::vector<int32_t> experts(n * top_k, -1), slots(n * top_k, -1), counts(num_experts, -1);
    std::vector<float> weights(n * top_k, kPoison), out(n * hidden, kPoison);
    const Tensor tx = MakeTensor(x.data(), n, hidden), te = MakeTensor(experts.data(), n, top_k),
                 tw = MakeTensor(weights.data(), n, top_k), ts = MakeTensor(slots.data(), n, top_k);
    ops().Route(tx, MakeTensor(gate.data(), num_experts, hidden), te, tw, stream());
    const std::vector<int32_t> order = {3, 1, 4, 0, 2};
    ops().AssignSlots(
        {.experts = te, .order = order.data(), .num_experts = num_experts, .slots = ts, .counts = counts.data()},
        stream());
    std::vector<float> rows(n * top_k * hidden, kPoison), scratch(n * top_k * rows_in, kPoison),
        y(rows.size(), kPoison);
    const Tensor tr = MakeTensor(rows.data(), n * top_k, hidden), ty = MakeTensor(y.data(), n * top_k, hidden);
    ops().ScatterRows(tx, ts, tr, stream());
    std::vector<ExpertRows> groups;
    int64_t at = 0;
    std::vector<int32_t> halves;
    halves.reserve(2 * num_experts);
    for (const int32_t e : order) {  // each expert's rows in two segments, as from two sources
      for (const int32_t part : {counts[e] / 2, counts[e] - counts[e] / 2}) {
        halves.push_back(part);
        groups.push_back({e, at, part, &halves.back()});
        at += part;
      }
    }
    ASSERT_EQ(at, n * top_k);
    ops().ExpertMlp({.x = tr,
                     .groups = groups.data(),
                     .num_groups = static_cast<int>(groups.size()),
                     .w_in = t_in.data(),
                     .w_out = t_out.data(),
                     .num_experts = num_experts,
                     .activation = activation,
                     .scratch = MakeTensor(scratch.data(), n * top_k, rows_in),
                     .out = ty},
                    stream());
    ops().CombineRows(ty, ts, tw, MakeTensor(out.data(), n, hidden), stream());

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
    EXPECT_LE(RelativeError(out, ref), 1e-4);
  }
}

// Many rank threads use the pool at once.
TEST(ConcurrencyTest, SixteenRanks) {
  auto factory = *CreateDeviceFactory({.cpu_threads = 2});
  std::vector<std::thread> ranks;
  std::vector<std::vector<float>> results(16);
  for (int r = 0; r < 16; ++r) {
    ranks.emplace_back([&, r] {
      auto device = *factory->CreateDevice(r);
      auto stream = *device->CreateStream();
      std::vector<float> x(5 * 64, 0.5f), out(5 * 200);
      std::vector<BFloat16> w(200 * 64, BFloat16{0x3f80});
      for (int i = 0; i < 200; ++i) {
        device->ops().Linear(MakeTensor(x.data(), 5, 64), MakeTensor(w.data(), 200, 64), MakeTensor(out.data(), 5, 200),
                             *stream);
      }
      results[r] = out;
    });
  }
  for (std::thread& rank : ranks) rank.join();
  for (const auto& out : results) EXPECT_EQ(out, std::vector<float>(5 * 200, 32.0f));
}

}  // namespace
}  // namespace soloist
