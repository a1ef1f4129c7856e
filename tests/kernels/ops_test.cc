// Every CPU op against a float64 reference, with poisoned outputs, odd shapes, and row independence bit for bit.
#include "kernels/ops.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"
#include "kernels/device.h"
#include "kernels/uniform.h"
#include "tests/kernels/ops_fixture.h"

namespace soloist {

void OpsTest::CheckLinear(const std::string& name) {
  for (const auto& [m, n, k] : std::vector<std::tuple<int, int, int>>{{0, 8, 8},
                                                                      {1, 1, 1},
                                                                      {1, 33, 31},
                                                                      {2, 16, 64},
                                                                      {3, 7, 100},
                                                                      {4, 48, 32},
                                                                      {5, 257, 129},
                                                                      {17, 65, 48},
                                                                      {33, 16, 2},
                                                                      {70, 96, 256},
                                                                      {9, 20, 1100},
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
    EXPECT_LE(RelativeError(out, ref), GemmBound(name)) << name << " " << m << " " << n << " " << k;
    // Row by row: the same bits.
    std::vector<float> alone(out.size(), kPoison);
    for (int i = 0; i < m; ++i) {
      ops().Linear(MakeTensor(x.data() + i * k, 1, k), weights, MakeTensor(alone.data() + i * n, 1, n), stream());
    }
    EXPECT_EQ(out, alone) << name << " " << m << " " << n << " " << k;
  }
}

namespace {

INSTANTIATE_TEST_SUITE_P(Paths, OpsTest, testing::Combine(testing::ValuesIn(GemmKernelNames()), testing::Values(1, 2)));

TEST_P(OpsTest, Linear) {
  const std::string& gemm = std::get<0>(GetParam());
  CheckLinear(gemm);
  if (gemm != "fma") return;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    CheckLinear(std::string("fma ") + hwy::TargetName(target));
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(GemmKernelsTest, AreFoundByName) {
  const std::vector<std::string> names = GemmKernelNames();
  EXPECT_EQ(std::count(names.begin(), names.end(), "fma"), 1);
  EXPECT_EQ((*FindGemmKernel("auto"))->name, names[0]);
  for (const std::string& name : names) EXPECT_EQ((*FindGemmKernel(name))->name, name);
  const auto none = CreateDeviceFactory({.cpu_gemm = "sme"});
  EXPECT_EQ(none.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(none.status().message(), testing::HasSubstr("--cpu-gemm is 'sme', this CPU has: auto, " + names[0]));
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

// Padding: a row without a slot leaves the cache alone, a sequence without keys gives zeros; others keep their bits.
TEST_P(OpsTest, RopeAndAttentionPadding) {
  const int heads = 4, kv_heads = 2, dim = 16, block = 4, blocks = 6;
  const int q_width = heads * dim, width = q_width + 2 * kv_heads * dim;
  const auto qkv = Random(7 * width), cos_sin = Random(10 * dim);
  struct Cache {
    std::vector<float> keys = std::vector<float>(blocks * block * kv_heads * dim, 0.5f), values = keys;
    KvLayer Layer() { return {keys.data(), values.data(), DType::kF32, blocks, kv_heads, block, dim}; }
  };
  Cache padded, plain;
  std::vector<float> q(7 * q_width, kPoison), q_plain(5 * q_width, kPoison);
  const std::vector<int32_t> positions = {3, 0, 1, 2, 0, 0, 9}, slots = {7, 8, 9, 10, 20, -1, -1};
  const Tensor rotation = MakeTensor(cos_sin.data(), 10, dim);
  ops().RopeAppendKv(MakeTensor(qkv.data(), 7, width), positions.data(), slots.data(), rotation, padded.Layer(),
                     MakeTensor(q.data(), 7, q_width), stream());
  ops().RopeAppendKv(MakeTensor(qkv.data(), 5, width), positions.data(), slots.data(), rotation, plain.Layer(),
                     MakeTensor(q_plain.data(), 5, q_width), stream());
  EXPECT_EQ(padded.keys, plain.keys);
  EXPECT_EQ(padded.values, plain.values);
  EXPECT_TRUE(std::equal(q_plain.begin(), q_plain.end(), q.begin()));
  EXPECT_TRUE(std::ranges::none_of(q, [](float x) { return std::isnan(x); }));

  // Two decodes, of which one is padding, a chunk, a padding chunk, and a padding sequence without rows.
  const std::vector<int32_t> starts = {0, 1, 2, 5, 7, 7}, lens = {4, 0, 3, 0, 0};
  const std::vector<int32_t> tables = {1, 0, 0, 0, 2, 0, 0, 0, 0, 0};
  std::vector<float> out(7 * q_width, kPoison);
  AttentionArgs args{.q = MakeTensor(q.data(), 7, q_width),
                     .kv = padded.Layer(),
                     .query_starts = starts.data(),
                     .seq_lens = lens.data(),
                     .block_tables = tables.data(),
                     .num_sequences = 5,
                     .num_decodes = 2,
                     .max_query_rows = 3,
                     .max_seq_len = 8,
                     .max_blocks = 2,
                     .num_heads = heads,
                     .scale = 0.25f,
                     .out = MakeTensor(out.data(), 7, q_width)};
  ops().PagedAttention(args, stream());
  const auto row_is_zero = [&](int row) {
    return std::all_of(out.begin() + row * q_width, out.begin() + (row + 1) * q_width, [](float x) { return x == 0; });
  };
  for (const int row : {1, 5, 6}) EXPECT_TRUE(row_is_zero(row)) << row;
  for (const int row : {0, 2, 3, 4}) EXPECT_FALSE(row_is_zero(row)) << row;
  for (const auto& [sequence, row, rows] : {std::tuple(0, 0, 1), std::tuple(2, 2, 3)}) {
    const std::vector<int32_t> alone_starts = {0, rows};
    std::vector<float> alone(rows * q_width, kPoison);
    AttentionArgs one = args;
    one.q = args.q.Rows(row, rows);
    one.out = MakeTensor(alone.data(), rows, q_width);
    one.query_starts = alone_starts.data();
    one.seq_lens = lens.data() + sequence;
    one.block_tables = tables.data() + 2 * sequence;
    one.num_sequences = 1;
    ops().PagedAttention(one, stream());
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), out.begin() + row * q_width));
  }
}

TEST_P(OpsTest, FillUniform) {
  const uint64_t key = 0x1234567890abcdef;
  for (const int cols : {1, 5, 512, 1030}) {
    std::vector<float> wide(37 * cols, kPoison);
    std::vector<BFloat16> narrow(wide.size(), BFloat16{0xffff}), expected(wide.size());
    const int64_t first_row = 1000;
    ops().FillUniform(key, 0.3f, first_row, MakeTensor(wide.data(), 37, cols), stream());
    ops().FillUniform(key, 0.3f, first_row, MakeTensor(narrow.data(), 37, cols), stream());
    for (int64_t i = 0; i < std::ssize(wide); ++i) {
      ASSERT_EQ(wide[i], UniformAt(key, first_row * cols + i, 0.3f)) << cols << " " << i;
    }
    Narrow(wide.data(), expected.data(), std::ssize(wide));
    for (size_t i = 0; i < wide.size(); ++i) ASSERT_EQ(narrow[i].bits, expected[i].bits) << cols << " " << i;
  }
}

TEST_P(OpsTest, EventsAndCapture) {
  const auto before = *device_->CreateEvent(), after = *device_->CreateEvent();
  device_->Record(*before, stream());
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  device_->Record(*after, stream());
  EXPECT_TRUE(after->Done());
  EXPECT_TRUE(after->Wait().ok());
  EXPECT_GE(after->NsSince(*before), 2'000'000);
  EXPECT_EQ(after->NsSince(*after), 0);
  EXPECT_FALSE(device_->can_capture());
  EXPECT_EQ(device_->Capture(stream(), [] { return absl::OkStatus(); }).status().code(),
            absl::StatusCode::kUnimplemented);
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
