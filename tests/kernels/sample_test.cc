// Sampling: greedy ties, penalties, bias, log-probabilities, and the distribution that the random numbers give.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>
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
                const std::vector<TokenHistory>& history = {}, const std::vector<int32_t>& previous = {},
                const std::vector<int32_t>& mask_of_row = {}, const std::vector<int32_t>& masks = {},
                const std::vector<int32_t>& targets = {}) {
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
                  .mask_of_row = mask_of_row.empty() ? nullptr : mask_of_row.data(),
                  .masks = masks.data(),
                  .targets = targets.empty() ? nullptr : targets.data(),
                  .tokens = r.tokens.data(),
                  .logprobs = r.logprobs.data(),
                  .top_tokens = r.top_tokens.data(),
                  .top_logprobs = r.top_logprobs.data()},
                 stream());
    return r;
  }
};
INSTANTIATE_TEST_SUITE_P(Paths, SampleTest, testing::Values(std::tuple(std::string("auto"), 2)));

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

// Over a vocabulary of two words of a mask, the last one not whole.
TEST_P(SampleTest, MaskedRows) {
  constexpr int32_t kVocab = 45;
  std::vector<float> row(kVocab);
  for (int32_t t = 0; t < kVocab; ++t) row[t] = 0.1f * static_cast<float>(t);
  const auto logits = [&row](int rows) {
    std::vector<float> all;
    for (int r = 0; r < rows; ++r) all.insert(all.end(), row.begin(), row.end());
    return all;
  };
  const auto mask = [](const std::vector<int32_t>& tokens) {
    std::vector<int32_t> words(TokenMaskWords(kVocab), 0);
    for (const int32_t t : tokens) words[t / 32] |= static_cast<int32_t>(1u << (t % 32));
    return words;
  };
  std::vector<int32_t> masks = mask({0, 31, 32});
  const std::vector<int32_t> second = mask({3, 7, 11});
  masks.insert(masks.end(), second.begin(), second.end());
  // Row 0 has the second mask, row 1 none, row 2 the first, row 3 the second and a bias, row 4 the second and a
  // penalty.
  const std::vector<SamplingRow> rows = {
      {.num_top_logprobs = 2}, {}, {}, {.bias_begin = 0}, {.presence_penalty = 3, .bias_begin = 1, .history_begin = 0}};
  const Result r = Sample(logits(5), rows, {{3, 5}}, {{11, 1}}, {}, {1, -1, 0, 1, 1}, masks);
  EXPECT_EQ(r.tokens, (std::vector<int32_t>{11, 44, 32, 3, 7}));
  // Log-probabilities are the model's own.
  double sum = 0;
  for (const float l : row) sum += std::exp(l);
  EXPECT_NEAR(r.logprobs[0], 1.1 - std::log(sum), 1e-5);
  EXPECT_EQ(r.top_tokens[0], 44);
  EXPECT_EQ(r.top_tokens[1], 43);
  EXPECT_NEAR(r.top_logprobs[0], 4.4 - std::log(sum), 1e-5);
  // Draws, with filters that would keep only what the mask does not allow: they look at what is left.
  for (const SamplingRow& filter :
       {SamplingRow{.temperature = 1}, SamplingRow{.temperature = 1, .top_k = 2},
        SamplingRow{.temperature = 1, .top_p = 0.3f}, SamplingRow{.temperature = 1, .min_p = 0.95f}}) {
    constexpr int kDraws = 500;
    std::vector<SamplingRow> draws(kDraws, filter);
    for (int i = 0; i < kDraws; ++i) draws[i].seed_low = static_cast<uint32_t>(i);
    const Result drawn = Sample(logits(kDraws), draws, {}, {}, {}, std::vector<int32_t>(kDraws, 1), masks);
    std::array<int, kVocab> seen = {};
    for (const int32_t token : drawn.tokens) ++seen[token];
    EXPECT_EQ(seen[3] + seen[7] + seen[11], kDraws);
    EXPECT_GT(seen[11], 0);
    EXPECT_EQ(seen[7] > 0, filter.min_p == 0 && (filter.top_p == 1)) << filter.top_p;
    EXPECT_EQ(seen[3] > 0, filter.min_p == 0 && filter.top_p == 1 && filter.top_k == 0);
  }
  // Nothing is left: any token of the vocabulary.
  for (const float temperature : {0.0f, 1.0f}) {
    const int32_t token = Sample(logits(1), {{.temperature = temperature}},
                                 {{3, -INFINITY}, {7, -INFINITY}, {11, -INFINITY}}, {}, {}, {1}, masks)
                              .tokens[0];
    EXPECT_TRUE(token >= 0 && token < kVocab) << token;
  }
}

// Rows with a target, among others, against a log-softmax in float64: whatever else the rows ask for.
TEST_P(SampleTest, Targets) {
  constexpr int64_t kRows = 40;
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 4);
  double worst = 0;
  for (const int64_t vocab : {int64_t{7}, int64_t{512}, int64_t{4099}}) {
    std::vector<float> logits(kRows * vocab);
    for (float& logit : logits) logit = std::round(normal(random) * 64) / 64;  // with ties
    std::vector<SamplingRow> rows(kRows);
    std::vector<int32_t> targets(kRows), mask_of_row(kRows, -1), masks(TokenMaskWords(vocab), 0);
    std::vector<LogitBias> bias;
    masks[0] = 1;  // token 0 alone
    for (int64_t r = 0; r < kRows; ++r) {
      targets[r] = r % 4 == 3 ? -1 : static_cast<int32_t>(random() % vocab);
      rows[r].bias_begin = static_cast<int32_t>(bias.size());
      rows[r].num_top_logprobs = static_cast<int32_t>(r % 9) - 1;
      if (r % 2 == 0) continue;
      rows[r].temperature = 0.8f;
      rows[r].top_k = 2;
      rows[r].presence_penalty = 2;
      rows[r].seed_low = static_cast<uint32_t>(r);
      if (targets[r] >= 0) mask_of_row[r] = 0;
      bias.push_back({std::max(0, targets[r]), -INFINITY});
    }
    const std::vector<TokenHistory> history = {};
    const Result with = Sample(logits, rows, bias, history, {}, mask_of_row, masks, targets);
    const Result without = Sample(logits, rows, bias, history, {}, std::vector<int32_t>(kRows, -1), masks);
    for (int64_t r = 0; r < kRows; ++r) {
      const float* row = &logits[r * vocab];
      const int32_t token = targets[r] >= 0 ? targets[r] : without.tokens[r];
      ASSERT_EQ(with.tokens[r], token) << r;
      double sum = 0;
      const double max = *std::max_element(row, row + vocab);
      for (int64_t t = 0; t < vocab; ++t) sum += std::exp(row[t] - max);
      const double log_sum = max + std::log(sum);
      EXPECT_NEAR(with.logprobs[r], row[token] - log_sum, 1e-5) << r;
      worst = std::max(worst, std::abs(with.logprobs[r] - (row[token] - log_sum)));
      std::vector<int32_t> order(vocab);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [row](int32_t a, int32_t b) { return row[a] > row[b]; });
      for (int k = 0; k < kMaxTopLogprobs; ++k) {
        const int64_t at = r * kMaxTopLogprobs + k;
        const bool asked = k < std::min<int64_t>(vocab, rows[r].num_top_logprobs);
        ASSERT_EQ(with.top_tokens[at], asked ? order[k] : -1) << r << " top " << k;
        if (asked) {
          EXPECT_NEAR(with.top_logprobs[at], row[order[k]] - log_sum, 1e-5) << r << " top " << k;
        }
      }
    }
  }
  std::printf("log-probabilities of targets differ from float64 by %.1e at most\n", worst);
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
