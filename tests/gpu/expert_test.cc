// ExpertMlp on CUDA against float64: both activations, groups of none, one and many rows, several groups per expert.
#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "tests/gpu/expert_case.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {
namespace {

using Rows = std::vector<std::vector<SourceRows>>;

// rows[expert][source] with about `mean` rows each; some none, some one.
Rows Uneven(int experts, int sources, int mean, Random& random) {
  Rows rows(experts, std::vector<SourceRows>(sources));
  for (int e = 0; e < experts; ++e) {
    for (SourceRows& group : rows[e]) {
      const int64_t draw = random.Int(0, 5);
      group.count = static_cast<int>(draw == 0 ? 0 : draw == 1 ? 1 : random.Int(0, 2 * mean));
      group.capacity = group.count + static_cast<int>(random.Int(0, 3));
    }
  }
  return rows;
}

Rows Even(int experts, int count, int capacity) { return Rows(experts, {{count, capacity}}); }

struct Named {
  std::string name;
  Rows rows;
};

// Checks each case with three guesses of the number of rows, which choose the kernel: right, far too low, far too high.
void TestExperts(ModelSizes sizes, const std::vector<Named>& cases, int64_t rows, int64_t columns, Random& random,
                 Errors& errors) {
  Gpu& gpu = Gpu::For(LimitsOf(sizes));
  const ExpertSet experts(gpu, sizes, random);
  for (const Named& c : cases) {
    const ExpertCase one(gpu, experts, c.rows, random, Text("%s %s", sizes.name, c.name.c_str()));
    const int64_t total = one.total_rows();
    one.Check(one.Run(total, ExpertCase::Begin::kOnHost), rows, columns, random, errors, "expected as it is");
    one.Check(one.Run(0, ExpertCase::Begin::kOnDevice), rows, columns, random, errors, "expected 0, begins on device");
    one.Check(one.Run(8192, ExpertCase::Begin::kOnHost), rows, columns, random, errors, "expected 8192");
    one.Check(one.Run(8192, ExpertCase::Begin::kOnDevice), rows, columns, random, errors,
              "expected 8192, begins on device");
  }
}

std::vector<Named> Cases(int experts, Random& random) {
  Rows first_only = Even(experts, 0, 4), last_full = Even(experts, 0, 0);
  first_only[0][0] = {1, 4};
  last_full[experts - 1][0] = {70, 70};
  return {{"no rows", Even(experts, 0, 5)},
          {"one row", first_only},
          {"a row each", Even(experts, 1, 1)},
          {"8 each", Even(experts, 8, 8)},
          {"last alone", last_full},
          {"4 sources", Uneven(experts, 4, 3, random)},
          {"16 sources", Uneven(experts, 16, 5, random)}};
}

TEST(ExpertMlpTest, Small) {
  Random random;
  Errors errors("ExpertMlp", Errors::kBf16);
  ModelSizes tiny = kTinySizes, small = kSmallSizes;
  tiny.experts = 3, small.experts = 2;
  const auto cases = [&](int experts) {
    return std::vector<Named>{{"no rows", Even(experts, 0, 2)}, {"2 sources", Uneven(experts, 2, 3, random)}};
  };
  TestExperts(tiny, cases(3), 1000, 1000, random, errors);
  TestExperts(small, cases(2), 1000, 1000, random, errors);
  TestExperts(kOddSizes, cases(kOddSizes.experts), 1000, 1000, random, errors);
}
// Rows without gaps: all experts on one rank alone, or one expert with many rows.
void TestPacked(ModelSizes sizes, const std::vector<int>& counts, Random& random, Errors& errors) {
  sizes.experts = static_cast<int>(counts.size());
  Gpu& gpu = Gpu::For(LimitsOf(sizes));
  const ExpertSet experts(gpu, sizes, random);
  Rows rows;
  for (const int count : counts) rows.push_back({{count, count}});
  const ExpertCase packed(gpu, experts, rows, random, Text("%s packed, %d experts", sizes.name, sizes.experts),
                          ExpertCase::Layout::kPacked);
  for (const int64_t expected : {packed.total_rows(), int64_t{0}, int64_t{8192}}) {
    packed.Check(packed.Run(expected, ExpertCase::Begin::kOnHost), 40, 100, random, errors, "begins on host");
    packed.Check(packed.Run(expected, ExpertCase::Begin::kOnDevice), 40, 100, random, errors, "begins on device");
  }
}
TEST(ExpertMlpTest, SmallPacked) {
  Random random;
  Errors errors("ExpertMlp packed", Errors::kBf16);
  TestPacked(kTinySizes, {3, 0, 1, 9}, random, errors);
}
TEST(ExpertMlpTest, Packed) {
  Random random;
  Errors errors("ExpertMlp packed", Errors::kBf16);
  for (const ModelSizes& sizes : {kTinySizes, kSmallSizes, kOddSizes, kBenchSizes}) {
    TestPacked(sizes, {0, 1, 70, 0, 8, 300, 64, 2}, random, errors);
    for (const int count : {1, 200, 1024, 1500}) TestPacked(sizes, {count}, random, errors);
  }
}
TEST(ExpertMlpTest, Models) {
  Random random;
  Errors errors("ExpertMlp", Errors::kBf16);
  for (const ModelSizes& sizes : {kTinySizes, kSmallSizes, kOddSizes, kBenchSizes}) {
    auto cases = Cases(sizes.experts, random);
    cases.push_back({"64 each", Even(sizes.experts, 64, 64)});
    cases.push_back({"uneven, many", Uneven(sizes.experts, 4, 60, random)});
    TestExperts(sizes, cases, 60, 200, random, errors);
  }
}
// Both activations at sizes that the models have with the other one.
TEST(ExpertMlpTest, OtherActivation) {
  Random random;
  Errors errors("ExpertMlp", Errors::kBf16);
  for (ModelSizes sizes : {kTinySizes, kSmallSizes, kBenchSizes}) {
    sizes.gated = !sizes.gated;
    sizes.experts = 4;
    TestExperts(sizes, {{"4 sources", Uneven(4, 4, 20, random)}, {"200 each", Even(4, 200, 210)}}, 60, 200, random,
                errors);
  }
}
TEST(ExpertMlpTest, Paper16) {
  Random random;
  Errors errors("ExpertMlp paper16", Errors::kBf16);
  TestExperts(kPaperSizes,
              {{"a row each", Even(2, 1, 1)},
               {"8 each", Even(2, 8, 8)},
               {"16 sources of 8", {std::vector<SourceRows>(16, {8, 16}), std::vector<SourceRows>(16, {7, 16})}},
               {"uneven", {{{100, 128}, {0, 128}}, {{3, 128}, {1, 128}}}},
               {"1500", {{{1100, 1100}}, {{400, 700}}}}},
              8, 60, random, errors);
}

}  // namespace
}  // namespace soloist
