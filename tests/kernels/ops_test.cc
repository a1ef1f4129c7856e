// Every CPU op against a float64 reference, with poisoned outputs, odd shapes, and row independence bit for bit.
#include "kernels/ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"
#include "kernels/device.h"
#include "kernels/philox.h"

namespace soloist {
namespace {

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

float Widened(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// ||out - ref|| / ||ref||.
double RelativeError(const std::vector<float>& out, const std::vector<double>& ref) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    difference += std::pow(out[i] - ref[i], 2);
    norm += ref[i] * ref[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

// Parameter: native bf16 dot product allowed, threads.
class OpsTest : public testing::TestWithParam<std::tuple<bool, int>> {
 protected:
  OpsTest() {
    DisableNativeBf16ForTest(!std::get<0>(GetParam()));
    factory_ = *CreateDeviceFactory({.cpu_threads = std::get<1>(GetParam())});
    device_ = *factory_->CreateDevice(0);
    stream_ = *device_->CreateStream();
  }
  ~OpsTest() override { DisableNativeBf16ForTest(false); }

  Ops& ops() { return device_->ops(); }
  Stream& stream() { return *stream_; }
  std::vector<float> Random(int64_t n, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> values(n);
    for (float& v : values) v = normal(random_);
    return values;
  }
  std::vector<BFloat16> RandomBf16(int64_t n, float scale = 1) {
    std::vector<float> wide = Random(n, scale);
    std::vector<BFloat16> values(n);
    Narrow(wide.data(), values.data(), n);
    return values;
  }

  std::mt19937 random_{20261124};
  std::unique_ptr<DeviceFactory> factory_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

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

class SampleTest : public OpsTest {
 protected:
  struct Result {
    std::vector<int32_t> tokens, top_tokens;
    std::vector<float> logprobs, top_logprobs;
  };
  Result Sample(std::vector<float> logits, const std::vector<SamplingRow>& rows,
                const std::vector<LogitBias>& bias = {}, const std::vector<TokenHistory>& history = {},
                const std::vector<int32_t>& previous = {}) {
    const auto n = static_cast<int64_t>(rows.size()), vocab = static_cast<int64_t>(logits.size()) / n;
    Result r{std::vector<int32_t>(n, -7), std::vector<int32_t>(n * kMaxTopLogprobs, -7), std::vector<float>(n, kPoison),
             std::vector<float>(n * kMaxTopLogprobs, kPoison)};
    ops().Sample({.logits = MakeTensor(logits.data(), n, vocab),
                  .params = rows.data(),
                  .bias = bias.data(),
                  .history = history.data(),
                  .num_bias = static_cast<int32_t>(bias.size()),
                  .num_history = static_cast<int32_t>(history.size()),
                  .previous_tokens = previous.data(),
                  .tokens = r.tokens.data(),
                  .logprobs = r.logprobs.data(),
                  .top_tokens = r.top_tokens.data(),
                  .top_logprobs = r.top_logprobs.data()},
                 stream());
    return r;
  }
};
INSTANTIATE_TEST_SUITE_P(Paths, SampleTest, testing::Values(std::tuple(true, 2)));

TEST_P(SampleTest, GreedyPenaltiesBias) {
  const std::vector<float> logits = {1, 3, 3, 2.5f, -1};
  EXPECT_EQ(Sample(logits, {{}}).tokens[0], 1);  // the lower id of a tie
  EXPECT_EQ(Sample(logits, {{.repetition_penalty = 2}}, {}, {{1, 0}}).tokens[0], 2);
  EXPECT_EQ(Sample(logits, {{.presence_penalty = 1}}, {}, {{1, 1}, {2, 0}}).tokens[0], 2);
  EXPECT_EQ(Sample(logits, {{.frequency_penalty = 0.3f}}, {}, {{1, 2}, {2, 2}}).tokens[0], 3);
  // The pending token counts once more than the history says.
  EXPECT_EQ(Sample(logits, {{.frequency_penalty = 0.3f, .pending_row = 0}}, {}, {{1, 1}, {2, 2}}, {1}).tokens[0], 3);
  EXPECT_EQ(Sample(logits, {{.presence_penalty = 1, .pending_row = 0}}, {}, {}, {1}).tokens[0], 2);
  EXPECT_EQ(Sample(logits, {{}}, {{1, -INFINITY}, {2, -INFINITY}}).tokens[0], 3);
  EXPECT_EQ(Sample(logits, {{}}, {{4, 10}}).tokens[0], 4);
  const Result top = Sample(logits, {{.num_top_logprobs = 3}});
  EXPECT_EQ(std::vector<int32_t>(top.top_tokens.begin(), top.top_tokens.begin() + 4),
            (std::vector<int32_t>{1, 2, 3, -1}));
  double sum = 0;
  for (const float l : logits) sum += std::exp(l);
  EXPECT_NEAR(top.logprobs[0], 3 - std::log(sum), 1e-5);
  EXPECT_NEAR(top.top_logprobs[2], 2.5 - std::log(sum), 1e-5);
}

// Frequencies over many seeds against the filtered softmax (chi-square, p > 1e-6 for 9 degrees of freedom: < 47).
TEST_P(SampleTest, Distribution) {
  const std::vector<float> logits = {0, 0.5f, 1, 1.5f, 2, -1, -2, 0.2f, 1.1f, 0.9f};
  struct Case {
    SamplingRow row;
    std::vector<int> kept;
  };
  for (const Case& c :
       {Case{{.temperature = 1}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}}, Case{{.temperature = 0.5f, .top_k = 3}, {4, 3, 8}},
        Case{{.temperature = 1, .min_p = 0.4f}, {4, 3, 8}}, Case{{.temperature = 1, .top_p = 0.5f}, {4, 3, 8}},
        Case{{.temperature = 2, .top_p = 0.01f}, {4}}}) {
    constexpr int kDraws = 20000;
    std::vector<int> seen(logits.size(), 0);
    std::vector<SamplingRow> rows(kDraws, c.row);
    std::vector<float> all;
    for (int i = 0; i < kDraws; ++i) {
      rows[i].seed_low = static_cast<uint32_t>(i);
      rows[i].position = i % 7;
      all.insert(all.end(), logits.begin(), logits.end());
    }
    const Result result = Sample(all, rows);
    for (const int32_t token : result.tokens) ++seen[token];
    EXPECT_EQ(Sample(all, rows).tokens, result.tokens);
    double sum = 0, chi = 0;
    for (const int t : c.kept) sum += std::exp(logits[t] / c.row.temperature);
    int total = 0;
    for (const int t : c.kept) {
      const double expected = kDraws * std::exp(logits[t] / c.row.temperature) / sum;
      chi += std::pow(seen[t] - expected, 2) / expected;
      total += seen[t];
    }
    EXPECT_EQ(total, kDraws);
    EXPECT_LT(chi, 47);
    std::printf("%zu tokens kept, chi-square %.1f\n", c.kept.size(), chi);
  }
}

// The known answers of Random123's kat_vectors.
TEST(PhiloxTest, KnownAnswers) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
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
