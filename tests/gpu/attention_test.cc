// PagedAttention on CUDA against float64 over the same cache: decodes, chunks and mixtures of them.
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "tests/gpu/attention_case.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {
namespace {

using Sequences = std::vector<SequenceShape>;

Gpu& GpuFor(const AttentionShape& shape) {
  ModelSizes sizes = kTinySizes;
  sizes.heads = shape.heads, sizes.kv_heads = shape.kv_heads, sizes.head_dim = shape.head_dim;
  return Gpu::For(LimitsOf(sizes));
}

void TestAttention(const char* name, const std::vector<AttentionShape>& shapes, const std::vector<Sequences>& batches,
                   int64_t pairs, Stale stale = Stale::kLarge) {
  Random random;
  Errors errors(name, Errors::kAttention);
  for (const AttentionShape& shape : shapes) {
    for (const Sequences& sequences : batches) {
      const AttentionCase attention(GpuFor(shape), shape, sequences, random, stale);
      attention.Check(attention.Run(), pairs, random, errors);
    }
  }
}

const std::vector<AttentionShape> kSmallHeads = {{.heads = 4, .kv_heads = 2, .head_dim = 64, .block = 16},
                                                 {.heads = 2, .kv_heads = 2, .head_dim = 128, .block = 64},
                                                 {.heads = 4, .kv_heads = 4, .head_dim = 32, .block = 16}};

std::vector<AttentionShape> With(std::vector<AttentionShape> shapes, int window, DType kv) {
  for (AttentionShape& shape : shapes) shape.window = window, shape.kv = kv;
  return shapes;
}

// Ragged: decodes first, then chunks; padding in both; a chunk from the start, one in the middle, a whole prompt.
const Sequences kMixed = {{70, 1}, {0, 1}, {1, 1}, {129, 1}, {40, 40}, {150, 33}, {0, 1}, {65, 2}, {16, 16}};

TEST(PagedAttentionTest, SmallDecode) {
  TestAttention("attention decode", kSmallHeads, {{{1, 1}}, {{17, 1}, {0, 1}, {64, 1}, {70, 1}}}, 1000);
  TestAttention("attention decode fp8", With(kSmallHeads, 0, DType::kF8E4M3), {{{33, 1}, {5, 1}}}, 1000);
}
TEST(PagedAttentionTest, SmallChunks) {
  TestAttention("attention chunks", kSmallHeads, {{{20, 20}}, kMixed}, 1000);
  TestAttention("attention window", With({kSmallHeads[0]}, 20, DType::kBF16), {kMixed}, 1000);
  TestAttention("attention chunks fp8", With(kSmallHeads, 0, DType::kF8E4M3), {kMixed}, 1000);
}

std::vector<AttentionShape> AllHeads() {
  std::vector<AttentionShape> shapes;
  for (const int dim : {32, 64, 128}) {
    for (const auto& [heads, kv_heads] : std::vector<std::pair<int, int>>{{8, 8}, {8, 2}, {8, 1}, {16, 8}, {6, 3}}) {
      for (const int block : {16, 64}) {
        shapes.push_back({.heads = heads, .kv_heads = kv_heads, .head_dim = dim, .block = block});
      }
    }
  }
  return shapes;
}

TEST(PagedAttentionTest, Decode) {
  Random random;
  Sequences sequences;
  for (int s = 0; s < 61; ++s) sequences.push_back({static_cast<int>(s % 9 == 4 ? 0 : random.Int(1, 700)), 1});
  for (const int length : {1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1024, 2049, 4097}) {
    sequences.push_back({length, 1});
  }
  TestAttention("attention decode", AllHeads(), {sequences}, 500);
  TestAttention("attention decode fp8", With(AllHeads(), 0, DType::kF8E4M3), {sequences}, 500);
}
TEST(PagedAttentionTest, DecodePeaked) {
  auto shapes = kSmallHeads;
  for (AttentionShape& shape : shapes) shape.q_scale = 8;
  TestAttention("attention decode, peaked", shapes, {{{3000, 1}, {100, 1}, {7, 1}}}, 1000);
  TestAttention("attention chunks, peaked", shapes, {kMixed}, 1000);
}
TEST(PagedAttentionTest, Window) {
  const Sequences sequences = {{1, 1}, {19, 1}, {20, 1}, {21, 1}, {700, 1}, {64, 1}, {300, 300}, {500, 77}, {30, 3}};
  for (const int window : {1, 20, 128, 4096}) {
    TestAttention("attention window", With(kSmallHeads, window, DType::kBF16), {sequences}, 1500);
    TestAttention("attention window fp8", With(kSmallHeads, window, DType::kF8E4M3), {sequences}, 700);
  }
}
TEST(PagedAttentionTest, Chunks) {
  TestAttention("attention chunks", AllHeads(), {kMixed, {{600, 600}}, {{1000, 1}, {3000, 100}, {257, 257}}}, 400);
}
TEST(PagedAttentionTest, ChunksFp8) {
  TestAttention("attention chunks fp8", With(AllHeads(), 0, DType::kF8E4M3),
                {kMixed, {{1000, 1}, {3000, 100}, {257, 257}}}, 400);
}
TEST(PagedAttentionTest, Paper16) {
  const AttentionShape shape = {.heads = 32, .kv_heads = 32, .head_dim = 128, .block = 64};
  Sequences decodes;
  Random random;
  for (int s = 0; s < 128; ++s) decodes.push_back({static_cast<int>(random.Int(100, 1500)), 1});
  const std::vector<Sequences> batches = {decodes, {{10000, 1}}, {{10000, 1}, {9000, 1}, {8000, 500}}, {{2000, 2000}}};
  TestAttention("attention paper16", {shape}, batches, 300);
  TestAttention("attention paper16 fp8", With({shape}, 0, DType::kF8E4M3), {batches[1], batches[2]}, 200);
}
// The blocks of a request that produced NaN are given to others; the slots behind their last key still hold it.
TEST(PagedAttentionTest, StaleNan) {
  const std::vector<Sequences> batches = {{{1, 1}, {70, 1}, {129, 1}, {1000, 1}}, {{40, 40}, {150, 33}, {65, 2}}};
  TestAttention("attention, NaN behind", kSmallHeads, batches, 500, Stale::kNan);
  TestAttention("attention, NaN behind, fp8", With(kSmallHeads, 0, DType::kF8E4M3), batches, 500, Stale::kNan);
}

}  // namespace
}  // namespace soloist
