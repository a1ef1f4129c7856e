// Embed, AddRmsNorm, GatherRows, FillUniform and RopeAppendKv on CUDA against float64, or bit for bit where nothing is
// rounded. (Named ...Small: small shapes only, for compute-sanitizer.)
#include <algorithm>
#include <cmath>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "kernels/uniform.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {
namespace {

struct Shape {
  ModelSizes sizes;
  std::vector<int> rows;
};
std::vector<Shape> SmallShapes() { return {{kTinySizes, {0, 1, 5, 33}}, {kOddSizes, {1, 7}}}; }
std::vector<Shape> LargeShapes() {
  return {{kSmallSizes, {1, 130, 513}}, {kBenchSizes, {3, 200}}, {kPaperSizes, {1, 2, 17, 128, 2048}}};
}

void TestEmbed(const std::vector<Shape>& shapes) {
  Random random;
  for (const Shape& shape : shapes) {
    const int64_t hidden = shape.sizes.hidden, vocab = shape.sizes.vocab;
    Gpu& gpu = Gpu::For(LimitsOf(shape.sizes));
    const auto table = random.NormalBf16(vocab * hidden);
    const DeviceArray<BFloat16> table_d(gpu, table);
    for (const int n : shape.rows) {
      const std::string what = Text("%s n=%d", shape.sizes.name, n);
      std::vector<int32_t> ids(n), previous(n + 1);
      for (int32_t& id : previous) id = static_cast<int32_t>(random.Int(0, vocab - 1));
      for (int i = 0; i < n; ++i) {
        ids[i] = static_cast<int32_t>(i % 3 == 1 ? -1 - random.Int(0, n) : random.Int(0, vocab - 1));
      }
      if (n > 2) ids[0] = 0, ids[2] = static_cast<int32_t>(vocab - 1);
      const DeviceArray<int32_t> ids_d(gpu, ids), previous_d(gpu, previous);
      const auto out_d = DeviceArray<float>::Poisoned(gpu, n * hidden);
      gpu.ops().Embed(ids_d.data(), previous_d.data(), table_d.View(vocab, hidden), out_d.View(n, hidden),
                      gpu.stream());
      const auto out = out_d.Read(what);
      int64_t wrong = 0;
      for (int i = 0; i < n; ++i) {
        const int64_t id = ids[i] < 0 ? previous[-1 - ids[i]] : ids[i];
        for (int64_t j = 0; j < hidden; ++j) wrong += out[i * hidden + j] != Widened(table[id * hidden + j]);
      }
      EXPECT_EQ(wrong, 0) << what;
    }
  }
}
TEST(EmbedTest, Small) { TestEmbed(SmallShapes()); }
TEST(EmbedTest, Large) { TestEmbed(LargeShapes()); }

void TestAddRmsNorm(const std::vector<Shape>& shapes) {
  Random random;
  Errors errors("AddRmsNorm", Errors::kRoundedOnce);
  for (const Shape& shape : shapes) {
    const int64_t hidden = shape.sizes.hidden;
    Gpu& gpu = Gpu::For(LimitsOf(shape.sizes));
    const auto weight = random.Normal(hidden);
    const DeviceArray<float> weight_d(gpu, weight);
    for (const int n : shape.rows) {
      for (const bool with_delta : {true, false}) {
        const std::string what = Text("%s n=%d delta=%d", shape.sizes.name, n, with_delta);
        // Rows of very different sizes; one of zeros, which eps keeps finite.
        auto before = random.Normal(n * hidden);
        auto delta = random.NormalBf16(n * hidden);
        for (int i = 0; i < n; ++i) {
          const float scale = i % 4 == 1 ? 1e-4f : i % 4 == 2 ? 300.0f : i % 16 == 7 ? 0.0f : 1.0f;
          for (int64_t j = i * hidden; j < (i + 1) * hidden; ++j) {
            // Plus zero: minus zero would lose its sign to the zero that is added.
            before[j] = scale == 0 ? 0.0f : before[j] * scale;
            delta[j] = Rounded(Widened(delta[j]) * scale);
          }
        }
        const float eps = 1e-5f;
        std::vector<float> sum(before);
        std::vector<double> ref(n * hidden);
        for (int i = 0; i < n; ++i) {
          double square = 0;
          for (int64_t j = i * hidden; j < (i + 1) * hidden; ++j) {
            if (with_delta) sum[j] = before[j] + Widened(delta[j]);
            square += double{sum[j]} * sum[j];
          }
          const double scale = 1 / std::sqrt(square / static_cast<double>(hidden) + double{eps});
          for (int64_t j = 0; j < hidden; ++j) ref[i * hidden + j] = sum[i * hidden + j] * scale * weight[j];
        }
        const auto residual = DeviceArray<float>::Guarded(gpu, before);
        const DeviceArray<BFloat16> delta_d(gpu, delta);
        const auto out = DeviceArray<BFloat16>::Poisoned(gpu, n * hidden);
        gpu.ops().AddRmsNorm(residual.View(n, hidden), with_delta ? delta_d.View(n, hidden) : Tensor{},
                             weight_d.View(1, hidden), eps, out.View(n, hidden), gpu.stream());
        errors.Rows(out.Read(what), ref, hidden, what);
        const auto after = residual.Read(what);
        EXPECT_TRUE(SameBits(after.data(), sum.data(), std::ssize(sum))) << what << ": residual";
      }
    }
  }
}
TEST(AddRmsNormTest, Small) { TestAddRmsNorm(SmallShapes()); }
TEST(AddRmsNormTest, Large) { TestAddRmsNorm(LargeShapes()); }

void TestGatherRows(const std::vector<Shape>& shapes) {
  Random random;
  for (const Shape& shape : shapes) {
    const int64_t hidden = shape.sizes.hidden;
    Gpu& gpu = Gpu::For(LimitsOf(shape.sizes));
    for (const int n : shape.rows) {
      const std::string what = Text("%s n=%d", shape.sizes.name, n);
      const auto x = random.NormalBf16((n + 1) * hidden);
      std::vector<int32_t> rows(n);
      for (int32_t& row : rows) row = static_cast<int32_t>(random.Int(0, n));
      const DeviceArray<BFloat16> x_d(gpu, x);
      const DeviceArray<int32_t> rows_d(gpu, rows);
      const auto out_d = DeviceArray<BFloat16>::Poisoned(gpu, n * hidden);
      gpu.ops().GatherRows(x_d.View(n + 1, hidden), rows_d.data(), out_d.View(n, hidden), gpu.stream());
      const auto out = out_d.Read(what);
      for (int i = 0; i < n; ++i) {
        EXPECT_TRUE(SameBits(&out[i * hidden], &x[rows[i] * hidden], hidden)) << what << " row " << i;
      }
    }
  }
}
TEST(GatherRowsTest, Small) { TestGatherRows(SmallShapes()); }
TEST(GatherRowsTest, Large) { TestGatherRows(LargeShapes()); }

template <typename T>
void TestFillUniform(int64_t rows, int64_t cols, int64_t first_row) {
  Gpu& gpu = Gpu::For(LimitsOf(kTinySizes));
  Random random;
  const uint64_t key = random.Bits();
  const float scale = 0.37f;
  const auto out_d = DeviceArray<T>::Poisoned(gpu, rows * cols);
  gpu.ops().FillUniform(key, scale, first_row, out_d.View(rows, cols), gpu.stream());
  const std::string what = Text("%lld x %lld from row %lld", (long long)rows, (long long)cols, (long long)first_row);
  const auto out = out_d.Read(what);
  int64_t wrong = 0;
  for (int64_t i = 0; i < rows * cols; ++i) {
    const float value = UniformAt(key, first_row * cols + i, scale);
    if constexpr (sizeof(T) == 2) {
      wrong += out[i].bits != Rounded(value).bits;
    } else {
      wrong += !(out[i] == value);
    }
  }
  EXPECT_EQ(wrong, 0) << what;
}
TEST(FillUniformTest, Small) {
  for (const auto& [rows, cols] : std::vector<std::pair<int, int>>{{0, 8}, {1, 1}, {3, 7}, {5, 33}, {2, 256}}) {
    for (const int first : {0, 1, 77}) {
      TestFillUniform<float>(rows, cols, first);
      TestFillUniform<BFloat16>(rows, cols, first);
    }
  }
}
TEST(FillUniformTest, Large) {
  TestFillUniform<BFloat16>(1024, 4096, 15000);
  TestFillUniform<float>(1000, 1001, 7);
}

void TestCopyBytes(const std::vector<int64_t>& sizes) {
  Gpu& gpu = Gpu::For(LimitsOf(kTinySizes));
  Random random;
  for (const int64_t bytes : sizes) {
    std::vector<uint8_t> from(bytes);
    for (uint8_t& byte : from) byte = static_cast<uint8_t>(random.Bits());
    const DeviceArray<uint8_t> from_d(gpu, from);
    const auto to = DeviceArray<uint8_t>::Poisoned(gpu, bytes);
    gpu.ops().CopyBytes(to.data(), from_d.data(), bytes, gpu.stream());
    EXPECT_TRUE(to.Read(Text("%lld bytes", static_cast<long long>(bytes))) == from) << bytes;
    if (bytes < 3) continue;
    const auto shifted = DeviceArray<uint8_t>::Poisoned(gpu, bytes);  // not aligned
    gpu.ops().CopyBytes(shifted.data() + 1, from_d.data(), bytes - 2, gpu.stream());
    std::vector<uint8_t> expected(bytes, 0xFF);
    std::copy(from.begin(), from.end() - 2, expected.begin() + 1);
    EXPECT_TRUE(shifted.Read("shifted") == expected) << bytes << " shifted";
  }
}
TEST(CopyBytesTest, Small) { TestCopyBytes({0, 1, 4, 15, 16, 20, 48, 4096, 5003}); }
TEST(CopyBytesTest, Large) { TestCopyBytes({1 << 20, (1 << 20) + 5, 50'000'012}); }

struct RopeCase {
  int heads, kv_heads, head_dim, block, rows;
  DType kv;
};

template <typename CacheT>
void TestRope(const RopeCase& c, Random& random, Errors& errors) {
  constexpr bool kFp8 = sizeof(CacheT) == 1;
  ModelSizes sizes = kTinySizes;
  sizes.heads = c.heads, sizes.kv_heads = c.kv_heads, sizes.head_dim = c.head_dim;
  Gpu& gpu = Gpu::For(LimitsOf(sizes));
  const std::string what =
      Text("heads=%d/%d dim=%d block=%d rows=%d fp8=%d", c.heads, c.kv_heads, c.head_dim, c.block, c.rows, kFp8);
  const int64_t n = c.rows, dim = c.head_dim, half = dim / 2, q_width = c.heads * dim, kv_width = c.kv_heads * dim;
  const int64_t width = q_width + 2 * kv_width, positions_max = 3000, blocks = n / c.block + 4;
  auto qkv = random.NormalBf16(n * width, 2);
  if (n > 0) qkv[q_width + kv_width] = Rounded(1000), qkv[q_width + kv_width + 1] = Rounded(-5000);  // saturates in FP8
  std::vector<float> cos_sin(positions_max * dim);
  for (int64_t p = 0; p < positions_max; ++p) {
    for (int64_t d = 0; d < half; ++d) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -2.0 * static_cast<double>(d) / c.head_dim);
      cos_sin[p * dim + d] = static_cast<float>(std::cos(angle));
      cos_sin[p * dim + half + d] = static_cast<float>(std::sin(angle));
    }
  }
  std::vector<int32_t> positions(n), slots(n);
  const auto order = random.Permutation(static_cast<int32_t>(blocks * c.block));
  for (int64_t i = 0; i < n; ++i) {
    positions[i] = static_cast<int32_t>(i == 0 ? positions_max - 1 : random.Int(0, positions_max - 1));
    slots[i] = i % 5 == 4 ? -1 : order[i];
  }
  const DeviceArray<BFloat16> qkv_d(gpu, qkv);
  const DeviceArray<float> cos_sin_d(gpu, cos_sin);
  const DeviceArray<int32_t> positions_d(gpu, positions), slots_d(gpu, slots);
  const int64_t cache_size = blocks * c.block * kv_width;
  const auto keys = DeviceArray<CacheT>::Poisoned(gpu, cache_size),
             values = DeviceArray<CacheT>::Poisoned(gpu, cache_size);
  const auto q = DeviceArray<BFloat16>::Poisoned(gpu, n * q_width);
  const KvLayer kv{keys.data(), values.data(), c.kv, blocks, c.kv_heads, c.block, c.head_dim};
  gpu.ops().RopeAppendKv(qkv_d.View(n, width), positions_d.data(), slots_d.data(), cos_sin_d.View(positions_max, dim),
                         kv, q.View(n, q_width), gpu.stream());
  const auto q_out = q.Read(what);
  auto keys_out = keys.Read(what), values_out = values.Read(what);
  int64_t wrong_values = 0, wrong_keys = 0;
  for (int64_t i = 0; i < n; ++i) {
    // Head h of q, then of k, rotated.
    const auto rotated = [&](int64_t head) {
      std::vector<double> out(dim);
      const BFloat16* x = &qkv[i * width + head * dim];
      const float* table = &cos_sin[positions[i] * dim];
      for (int64_t d = 0; d < half; ++d) {
        const double a = Widened(x[d]), b = Widened(x[d + half]), cos = table[d], sin = table[half + d];
        out[d] = a * cos - b * sin;
        out[d + half] = b * cos + a * sin;
      }
      return out;
    };
    const std::string row = what + Text(" row %d", static_cast<int>(i));
    if (slots[i] < 0) continue;
    for (int64_t h = 0; h < c.heads; ++h) errors.Row(&q_out[i * q_width + h * dim], rotated(h).data(), dim, row + " q");
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      const int64_t at = ((slots[i] / c.block * c.kv_heads + h) * c.block + slots[i] % c.block) * dim;
      const auto key = rotated(c.heads + h);
      const BFloat16* value = &qkv[i * width + q_width + kv_width + h * dim];
      if constexpr (kFp8) {
        for (int64_t d = 0; d < dim; ++d) {
          wrong_values += values_out[at + d] != ToF8(Widened(value[d]));
          // Half a step of E4M3: 2^-4 of the value, 2^-10 near zero; more only by saturation.
          const double allowed = 0x1p-4 * 1.001 * std::abs(key[d]) + 0x1p-10 * 1.001;
          wrong_keys += !(std::abs(FromF8(keys_out[at + d]) - std::clamp(key[d], -448.0, 448.0)) <= allowed);
        }
      } else {
        errors.Row(&keys_out[at], key.data(), dim, row + " k");
        wrong_values += !SameBits(&values_out[at], value, dim);
      }
      std::memset(static_cast<void*>(&keys_out[at]), 0xFF, dim * sizeof(CacheT));
      std::memset(static_cast<void*>(&values_out[at]), 0xFF, dim * sizeof(CacheT));
    }
  }
  EXPECT_EQ(wrong_values, 0) << what;
  EXPECT_EQ(wrong_keys, 0) << what;
  EXPECT_TRUE(std::ranges::all_of(keys_out, IsPoison<CacheT>)) << what << ": another slot's key was written";
  EXPECT_TRUE(std::ranges::all_of(values_out, IsPoison<CacheT>)) << what << ": another slot's value was written";
}

void TestRopeCases(const std::vector<RopeCase>& cases) {
  Random random;
  Errors errors("RopeAppendKv", Errors::kRoundedOnce);
  for (const RopeCase& c : cases) {
    if (c.kv == DType::kBF16) {
      TestRope<BFloat16>(c, random, errors);
    } else {
      TestRope<uint8_t>(c, random, errors);
    }
  }
}
TEST(RopeAppendKvTest, Small) {
  TestRopeCases({{4, 2, 64, 16, 0, DType::kBF16},
                 {4, 2, 64, 16, 1, DType::kBF16},
                 {6, 3, 32, 16, 37, DType::kBF16},
                 {2, 2, 128, 64, 10, DType::kF8E4M3},
                 {4, 1, 32, 16, 9, DType::kF8E4M3}});
}
TEST(RopeAppendKvTest, Large) {
  TestRopeCases({{32, 32, 128, 64, 1, DType::kBF16},
                 {32, 32, 128, 64, 300, DType::kBF16},
                 {32, 8, 128, 16, 129, DType::kF8E4M3},
                 {16, 8, 64, 64, 500, DType::kBF16},
                 {4, 4, 48, 16, 70, DType::kBF16},
                 {4, 4, 32, 64, 1000, DType::kF8E4M3}});
}

}  // namespace
}  // namespace soloist
