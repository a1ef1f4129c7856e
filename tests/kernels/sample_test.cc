// Sampling: greedy ties, penalties, bias, log-probabilities, and the distribution that the random numbers give.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/ops.h"
#include "kernels/philox.h"
#include "tests/kernels/ops_fixture.h"

namespace soloist {
namespace {

class SampleTest : public OpsTest {
 protected:
  struct Result {
    std::vector<int32_t> tokens, top_tokens;
    std::vector<float> logprobs, top_logprobs;
  };
  Result Sample(std::vector<float> logits, std::vector<SamplingRow> rows, const std::vector<LogitBias>& bias = {},
                const std::vector<TokenHistory>& history = {}, const std::vector<int32_t>& previous = {}) {
    const auto n = static_cast<int64_t>(rows.size()), vocab = static_cast<int64_t>(logits.size()) / n;
    Result r{std::vector<int32_t>(n, -7), std::vector<int32_t>(n * kMaxTopLogprobs, -7), std::vector<float>(n, kPoison),
             std::vector<float>(n * kMaxTopLogprobs, kPoison)};
    rows.push_back(
        {.bias_begin = static_cast<int32_t>(bias.size()), .history_begin = static_cast<int32_t>(history.size())});
    ops().Sample({.logits = MakeTensor(logits.data(), n, vocab),
                  .params = rows.data(),
                  .bias = bias.data(),
                  .history = history.data(),
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

}  // namespace
}  // namespace soloist
