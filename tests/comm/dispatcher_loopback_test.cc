// Loopback: one rank plays a group of many. Each row must come to the local expert that stands for the one it chose,
// and each token get the weighted sum of those, bit for bit.
#include <algorithm>
#include <numeric>
#include <string>

#include "gtest/gtest.h"
#include "tests/comm/dispatcher_harness.h"

namespace soloist {
namespace {

constexpr int64_t kMaxTokens = 12;

struct Shape {
  int ranks, experts_per_rank, top_k;
  bool permuted;  // experts are dealt to the ranks, not in blocks
  DispatchLayout layout;

  DispatcherOptions Options() const {
    DispatcherOptions options = {.hidden_size = 5,
                                 .num_experts = ranks * experts_per_rank,
                                 .top_k = top_k,
                                 .max_tokens_per_rank = kMaxTokens,
                                 .masked_max_tokens = layout == DispatchLayout::kMasked ? kMaxTokens : 0,
                                 .loopback_ranks = ranks};
    for (int e = 0; e < options.num_experts; ++e) {
      options.expert_rank.push_back(permuted ? e % ranks : e / experts_per_rank);
    }
    return options;
  }
  int LocalExpert(int expert) const { return permuted ? expert / ranks : expert % experts_per_rank; }
};

void PrintTo(const Shape& s, std::ostream* out) {
  *out << "R" << s.ranks << "L" << s.experts_per_rank << "K" << s.top_k << (s.permuted ? "Dealt" : "Blocked")
       << (s.layout == DispatchLayout::kMasked ? "Masked" : "Contiguous");
}

std::vector<Shape> Shapes() {
  std::vector<Shape> shapes;
  for (const auto layout : {DispatchLayout::kMasked, DispatchLayout::kContiguous}) {
    for (const bool permuted : {false, true}) {
      shapes.push_back({16, 1, 2, permuted, layout});
      shapes.push_back({4, 3, 4, permuted, layout});
      shapes.push_back({1, 4, 2, permuted, layout});
    }
  }
  return shapes;
}

class LoopbackTest : public testing::TestWithParam<Shape> {
 protected:
  // The step's outputs; checks counts, groups and rows on the way. `routed`: where the rows go.
  void CheckStep(TokenDispatcher& dispatcher, const std::vector<RoutedToken>& tokens,
                 const std::vector<RoutedToken>& routed, int64_t capacity) {
    const DispatcherOptions options = GetParam().Options();
    const int64_t n = std::ssize(tokens), k = options.top_k;
    const int hidden = options.hidden_size;
    std::vector<float> x, weights;
    std::vector<int32_t> experts, counts(static_cast<size_t>(options.num_experts), 0);
    for (int64_t t = 0; t < n; ++t) {
      x.insert(x.end(), tokens[t].x.begin(), tokens[t].x.end());
      experts.insert(experts.end(), tokens[t].experts.begin(), tokens[t].experts.end());
      weights.insert(weights.end(), tokens[t].weights.begin(), tokens[t].weights.end());
      for (const int32_t e : routed[t].experts) {
        if (e >= 0) ++counts[e];
      }
    }
    const Buffer x_data = rank_.Upload(x), experts_data = rank_.Upload(experts), weights_data = rank_.Upload(weights);
    const Buffer counts_data = rank_.Filled(options.num_experts * 4, 0xFF),
                 out_data = rank_.Filled(n * hidden * 4, 0xFF);
    EXPECT_FALSE(dispatcher.WaitsOnHost(capacity));
    const auto handle = dispatcher.Dispatch(x_data.View<float>(n, hidden), experts_data.View<int32_t>(n, k),
                                            weights_data.View<float>(n, k), {capacity},
                                            static_cast<int32_t*>(counts_data.data()), *rank_.stream);
    ASSERT_EQ(handle.status(), absl::OkStatus());
    const bool masked = GetParam().layout == DispatchLayout::kMasked && options.loopback_ranks > 1;
    EXPECT_EQ(handle->layout, masked ? DispatchLayout::kMasked : DispatchLayout::kContiguous);
    EXPECT_EQ(handle->expected_rows, (masked ? capacity : n) * k);
    if (handle->row_offsets != nullptr) {
      // All rows are the one local expert's, or, in a group of one, each expert's follow the one's before.
      const int local = options.num_experts / options.loopback_ranks;
      EXPECT_TRUE(local == 1 || options.loopback_ranks == 1);
      EXPECT_EQ(rank_.Download<int32_t>(handle->row_offsets, local + 1).back(),
                std::accumulate(counts.begin(), counts.end(), 0));
    }
    EXPECT_EQ(rank_.Download<int32_t>(counts_data.data(), options.num_experts), counts);
    RunExperts(*handle, std::accumulate(counts.begin(), counts.end(), 0));
    ASSERT_EQ(rank_.Finish(dispatcher.Combine(*handle, {.delta = out_data.View<float>(n, hidden)}, *rank_.stream)),
              absl::OkStatus());

    const std::vector<float> out = rank_.Download<float>(out_data.data(), n * hidden);
    for (int64_t t = 0; t < n; ++t) {
      RoutedToken expected = routed[t];
      for (int32_t& e : expected.experts) e = e < 0 ? e : GetParam().LocalExpert(e);
      const auto row = out.begin() + t * hidden;
      EXPECT_TRUE(SameBits({row, row + hidden}, ReferenceOutput(expected))) << "token " << t;
    }
  }

  TestGroup group_ = SelfTestGroup();
  TestRank& rank_ = group_.ranks[0];

 private:
  void RunExperts(const DispatchHandle& handle, int64_t choices) {
    const int hidden = GetParam().Options().hidden_size;
    const int64_t rows = handle.expert_input.rows;
    const std::vector<float> in = rank_.Download<float>(handle.expert_input.data, rows * hidden);
    std::vector<float> out(in.size(), std::nanf(""));
    int64_t total = 0;
    for (const ExpertRows& group : handle.groups) {
      const int32_t count = rank_.Download<int32_t>(group.row_count, 1)[0];
      ASSERT_TRUE(count >= 0 && count <= group.row_capacity);
      const int64_t begin = group.row_begin_on_device != nullptr
                                ? rank_.Download<int32_t>(group.row_begin_on_device, 1)[0]
                                : group.row_begin;
      ASSERT_TRUE(begin >= 0 && begin + count <= rows);
      total += count;
      for (int64_t i = begin; i < begin + count; ++i) {
        RunExpert(group.expert, in.data() + i * hidden, hidden, out.data() + i * hidden);
      }
    }
    EXPECT_EQ(total, choices);
    rank_.device->Copy(handle.expert_output.data, out.data(), handle.expert_output.bytes(), *rank_.stream);
    CHECK_OK(rank_.stream->Synchronize());
  }
};

TEST_P(LoopbackTest, RoutersChoice) {
  const DispatcherOptions options = GetParam().Options();
  PoisoningDevice device(*rank_.device);
  const auto dispatcher = CreateTokenDispatcher(options, device, *rank_.comm).value();
  for (const int64_t n : {kMaxTokens, int64_t{5}, int64_t{0}, int64_t{1}}) {
    std::vector<RoutedToken> tokens = RandomTokens(n, options, /*exact_weights=*/true, static_cast<uint32_t>(n));
    if (n > 2) std::ranges::fill(tokens.back().experts, -1);  // padding
    CheckStep(*dispatcher, tokens, tokens, std::min(kMaxTokens, n + 2));
  }
}

TEST_P(LoopbackTest, ForcedExperts) {
  DispatcherOptions options = GetParam().Options();
  std::vector<RoutedToken> forced(kMaxTokens);
  for (int64_t t = 0; t < kMaxTokens; ++t) {
    for (int j = 0; j < options.top_k; ++j) {
      // Half to the first experts, half round robin.
      const auto e = static_cast<int32_t>(t % 2 == 0 ? j : (t * options.top_k + j) % options.num_experts);
      options.loopback_experts.push_back(e);
      forced[t].experts.push_back(e);
    }
  }
  PoisoningDevice device(*rank_.device);
  const auto dispatcher = CreateTokenDispatcher(options, device, *rank_.comm).value();
  for (const int64_t n : {kMaxTokens, int64_t{4}}) {
    const std::vector<RoutedToken> tokens = RandomTokens(n, options, /*exact_weights=*/true, 9);
    std::vector<RoutedToken> routed = tokens;
    for (int64_t t = 0; t < n; ++t) routed[t].experts = forced[t].experts;
    CheckStep(*dispatcher, tokens, routed, kMaxTokens);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, LoopbackTest, testing::ValuesIn(Shapes()), testing::PrintToStringParamName());

TEST(LoopbackOptionsTest, RefusesWhatCannotBe) {
  TestGroup self = SelfTestGroup(), two = SharedMemoryTestGroup(2);
  const auto says = [&](TestGroup& group, auto change) {
    DispatcherOptions options = Shape{4, 2, 2, false, DispatchLayout::kMasked}.Options();
    change(options);
    return std::string(CreateTokenDispatcher(options, *group.ranks[0].device, *group.ranks[0].comm).status().message());
  };
  using Options = DispatcherOptions;
  EXPECT_EQ(says(self, [](Options&) {}), "");
  EXPECT_NE(says(two, [](Options&) {}).find("group of 2"), std::string::npos);
  EXPECT_NE(says(self, [](Options& o) { o.loopback_ranks = -1; }).find("-1"), std::string::npos);
  EXPECT_NE(says(self, [](Options& o) { o.expert_rank[7] = 0; }).find("all must own as many"), std::string::npos);
  EXPECT_NE(says(self, [](Options& o) { o.loopback_experts = {0, 1}; }).find("expected 24"), std::string::npos);
  EXPECT_NE(says(self, [](Options& o) { o.loopback_experts.assign(24, 8); }).find("holds 8"), std::string::npos);
  EXPECT_NE(says(self, [](Options& o) { o.loopback_experts.assign(24, 3); }).find("twice in row 0"), std::string::npos);
  EXPECT_NE(says(self,
                 [](Options& o) {
                   o.loopback_ranks = 0;
                   std::ranges::fill(o.expert_rank, 0);
                   o.loopback_experts = {0, 1};
                 })
                .find("without loopback_ranks"),
            std::string::npos);
}

// Ranks that share memory need memory that the host can reach.
TEST(SharedMemoryTest, RefusesOpaqueDevices) {
  const TestGroup group = SelfTestGroup();
  const auto comms = CreateSharedMemoryCommunicators(2, *group.ranks[0].device, {});
  EXPECT_EQ(comms.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(comms.status().message().find("opaque cpu"), std::string::npos) << comms.status();
}

}  // namespace
}  // namespace soloist
