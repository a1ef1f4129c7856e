// TokenDispatcher against the definition: each expert gets exactly its rows, each token the weighted sum of its experts
// in the router's order, bit for bit, whatever the group, the placement and the layout.
#include "engine/comm/dispatcher.h"

#include <algorithm>
#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/comm/dispatcher_harness.h"

namespace soloist {
namespace {

using Homes = std::vector<std::vector<int>>;

std::vector<int> Blocked(int experts, int ranks) {
  std::vector<int> expert_rank(experts);
  for (int e = 0; e < experts; ++e) expert_rank[e] = e * ranks / experts;
  return expert_rank;
}

// Deals the tokens to the homes whose turn it is.
Homes Deal(int64_t tokens, int ranks, const std::vector<int>& turns) {
  Homes homes(ranks);
  for (int t = 0; t < tokens; ++t) homes[turns[t % turns.size()]].push_back(t);
  return homes;
}

std::vector<int> AllRanks(int ranks) {
  std::vector<int> turns(ranks);
  for (int r = 0; r < ranks; ++r) turns[r] = r;
  return turns;
}

void ExpectReference(const std::vector<RoutedToken>& tokens, const std::vector<std::vector<float>>& outputs) {
  for (size_t t = 0; t < tokens.size(); ++t) {
    EXPECT_TRUE(SameBits(outputs[t], ReferenceOutput(tokens[t]))) << "token " << t;
  }
}

constexpr int64_t kMaxTokens = 20;  // per rank

struct Shape {
  int ranks, experts_per_rank, top_k;
  DispatchLayout layout;
  DispatcherOptions Options() const {
    return {.hidden_size = 6,
            .num_experts = ranks * experts_per_rank,
            .top_k = top_k,
            .max_tokens_per_rank = kMaxTokens,
            .expert_rank = Blocked(ranks * experts_per_rank, ranks),
            .masked_max_tokens = layout == DispatchLayout::kMasked ? kMaxTokens : 0};
  }
  // No token anywhere is not more than no token.
  DispatchLayout LayoutOf(const Homes& homes) const {
    for (const std::vector<int>& home : homes) {
      if (!home.empty()) return layout;
    }
    return DispatchLayout::kMasked;
  }
};

std::vector<Shape> Shapes() {
  std::vector<Shape> shapes;
  for (const int ranks : {1, 2, 4, 8, 16}) {
    for (const int experts_per_rank : {1, 3}) {
      for (const int top_k : {1, 2, 4}) {
        if (top_k > ranks * experts_per_rank) continue;
        for (const DispatchLayout layout : {DispatchLayout::kMasked, DispatchLayout::kContiguous}) {
          shapes.push_back({ranks, experts_per_rank, top_k, layout});
        }
      }
    }
  }
  return shapes;
}

std::string ShapeName(const testing::TestParamInfo<Shape>& info) {
  const Shape& s = info.param;
  return absl::StrCat("R", s.ranks, "E", s.ranks * s.experts_per_rank, "K", s.top_k,
                      s.layout == DispatchLayout::kMasked ? "Masked" : "Contiguous");
}
void PrintTo(const Shape& shape, std::ostream* out) { *out << ShapeName({shape, 0}); }

class DispatcherTest : public testing::TestWithParam<Shape> {
 protected:
  void CheckStep(DispatcherGroup& group, const std::vector<RoutedToken>& tokens, const Homes& homes) {
    ExpectReference(tokens, group.Step(tokens, homes, GetParam().LayoutOf(homes)));
  }
};

TEST_P(DispatcherTest, RandomRouting) {
  const DispatcherOptions options = GetParam().Options();
  const int n = GetParam().ranks;
  DispatcherGroup group(n, options);
  for (const int64_t per_rank : {int64_t{1}, kMaxTokens, int64_t{7}}) {
    const std::vector<RoutedToken> tokens = RandomTokens(per_rank * n, options, /*exact_weights=*/true, per_rank);
    CheckStep(group, tokens, Deal(per_rank * n, n, AllRanks(n)));
  }
}

TEST_P(DispatcherTest, ZeroTokensOnSomeOrAllRanks) {
  const DispatcherOptions options = GetParam().Options();
  const int n = GetParam().ranks;
  DispatcherGroup group(n, options);
  std::vector<int> some;
  for (int r = 0; r < n; r += 2) some.push_back(r);
  int seed = 0;
  for (const std::vector<int>& turns : {some, {n - 1}, {0}, {n / 2}}) {
    for (const int64_t count : {kMaxTokens * std::ssize(turns), int64_t{1}, int64_t{0}}) {
      CheckStep(group, RandomTokens(count, options, /*exact_weights=*/true, ++seed), Deal(count, n, turns));
    }
  }
}

// The worst case of each layout: all first choices go to one expert, and all choices to as few ranks as can be.
TEST_P(DispatcherTest, AllTokensToOneExpert) {
  const DispatcherOptions options = GetParam().Options();
  const int n = GetParam().ranks;
  DispatcherGroup group(n, options);
  for (const int target : {0, options.num_experts - 1, options.num_experts / 2}) {
    std::vector<RoutedToken> tokens = RandomTokens(kMaxTokens * n, options, /*exact_weights=*/true, target);
    for (RoutedToken& token : tokens) {
      for (int j = 0; j < options.top_k; ++j) token.experts[j] = (target + j) % options.num_experts;
    }
    CheckStep(group, tokens, Deal(std::ssize(tokens), n, AllRanks(n)));
  }
}

// Experts in no order, with more on some ranks than on others, and ranks that have none.
TEST_P(DispatcherTest, PermutedPlacements) {
  const int n = GetParam().ranks;
  for (uint32_t seed = 0; seed < 3; ++seed) {
    DispatcherOptions options = GetParam().Options();
    std::mt19937 random(seed);
    if (seed == 0) {
      std::shuffle(options.expert_rank.begin(), options.expert_rank.end(), random);
    } else {
      for (int& rank : options.expert_rank) rank = static_cast<int>(random() % n);
    }
    DispatcherGroup group(n, options);
    for (const int64_t count : {kMaxTokens * n, int64_t{3}}) {
      const std::vector<RoutedToken> tokens = RandomTokens(count, options, /*exact_weights=*/true, seed + 10);
      CheckStep(group, tokens, Deal(count, n, AllRanks(n)));
    }
  }
}

// A bucket has room for more rows than any home has, and padding rows among its tokens, which go nowhere.
TEST_P(DispatcherTest, PaddedBuckets) {
  const DispatcherOptions options = GetParam().Options();
  const int n = GetParam().ranks;
  DispatcherGroup group(n, options);
  for (const int64_t per_rank : {int64_t{1}, int64_t{8}, kMaxTokens}) {
    std::vector<RoutedToken> tokens = RandomTokens(per_rank * n, options, /*exact_weights=*/true, 50 + per_rank);
    for (int64_t t = 0; t < std::ssize(tokens); ++t) {
      if (t / n >= per_rank / 2) std::ranges::fill(tokens[t].experts, -1);
    }
    const Homes homes = Deal(per_rank * n, n, AllRanks(n));
    for (const int64_t spare : {int64_t{0}, kMaxTokens - per_rank}) {
      ExpectReference(tokens, group.Step(tokens, homes, GetParam().layout, spare));
    }
  }
}

// Room for fewer rows than an expert may get: what fits comes out as ever, also where all of it does; what does not is
// left out, said, and nothing else is touched. The next step with room for all is whole again.
TEST_P(DispatcherTest, LessRoomThanTheWorstCase) {
  const DispatcherOptions options = GetParam().Options();
  const int n = GetParam().ranks;
  DispatcherGroup group(n, options);
  int64_t left_out = 0;
  for (const bool skewed : {false, true}) {
    std::vector<RoutedToken> tokens =
        RandomTokens(kMaxTokens * n, options, /*exact_weights=*/true, 90 + (skewed ? 1 : 0));
    if (skewed) {
      for (RoutedToken& token : tokens) std::ranges::sort(token.experts);
    }
    const Homes homes = Deal(kMaxTokens * n, n, AllRanks(n));
    for (const int64_t room : {int64_t{1}, int64_t{3}, kMaxTokens / 2, kMaxTokens - 1, kMaxTokens, int64_t{0}}) {
      const bool masked = n > 1 && GetParam().layout == DispatchLayout::kMasked;
      const std::vector<RoutedToken> kept = WithRoom(tokens, homes, masked ? room : 0);
      for (size_t t = 0; t < tokens.size(); ++t) left_out += kept[t].experts != tokens[t].experts ? 1 : 0;
      ExpectReference(kept, group.Step(tokens, homes, n > 1 ? GetParam().layout : DispatchLayout::kContiguous,
                                       /*spare=*/0, room));
    }
  }
  EXPECT_EQ(left_out > 0, n > 1 && GetParam().layout == DispatchLayout::kMasked);
}

INSTANTIATE_TEST_SUITE_P(Shapes, DispatcherTest, testing::ValuesIn(Shapes()), ShapeName);

DispatcherOptions SixteenExperts(int ranks, int64_t max_tokens_per_rank, int64_t masked_max_tokens) {
  return {.hidden_size = 33,
          .num_experts = 16,
          .top_k = 4,
          .max_tokens_per_rank = max_tokens_per_rank,
          .expert_rank = Blocked(16, ranks),
          .masked_max_tokens = masked_max_tokens};
}

// Weights as a router makes them; homes, group sizes, placements and layouts as they come.
TEST(DispatcherParityTest, SameBitsWhateverTheGroupThePlacementAndTheLayout) {
  constexpr int64_t kTokens = 61;
  const std::vector<RoutedToken> tokens =
      RandomTokens(kTokens, SixteenExperts(1, kTokens, kTokens), /*exact_weights=*/false, 77);
  std::vector<std::vector<float>> first;
  for (const int ranks : {1, 2, 4, 8, 16}) {
    for (const bool masked : {true, false}) {
      for (int placement = 0; placement < 4; ++placement) {
        DispatcherOptions options = SixteenExperts(ranks, kTokens, masked ? kTokens : 0);
        std::mt19937 random(static_cast<uint32_t>(ranks * 10 + placement));
        if (placement == 1) std::shuffle(options.expert_rank.begin(), options.expert_rank.end(), random);
        if (placement == 2) std::fill(options.expert_rank.begin(), options.expert_rank.end(), ranks - 1);
        std::vector<int> turns(kTokens);
        for (int& turn : turns) turn = static_cast<int>(random() % (placement == 3 ? 1 : ranks));
        Homes homes = Deal(kTokens, ranks, turns);
        for (std::vector<int>& home : homes) std::shuffle(home.begin(), home.end(), random);

        DispatcherGroup group(ranks, options);
        const std::vector<std::vector<float>> outputs =
            group.Step(tokens, homes, masked ? DispatchLayout::kMasked : DispatchLayout::kContiguous);
        if (first.empty()) first = outputs;
        for (int64_t t = 0; t < kTokens; ++t) {
          ASSERT_TRUE(SameBits(outputs[t], first[t]))
              << "token " << t << ", ranks " << ranks << ", masked " << masked << ", placement " << placement;
        }
      }
    }
  }
  // The test can tell: in another order of the experts, the sums of some token differ.
  RoutedToken reversed = tokens[0];
  std::reverse(reversed.experts.begin(), reversed.experts.end());
  std::reverse(reversed.weights.begin(), reversed.weights.end());
  EXPECT_FALSE(SameBits(ReferenceOutput(reversed), ReferenceOutput(tokens[0])));
}

// One dispatcher, steps of all sizes: the layout follows the step's largest home on all ranks.
TEST(DispatcherParityTest, LayoutsAlternateByTheLargestHome) {
  constexpr int kRanks = 4;
  const DispatcherOptions options = SixteenExperts(kRanks, /*max_tokens_per_rank=*/12, /*masked_max_tokens=*/5);
  DispatcherGroup group(kRanks, options);
  std::mt19937 random(5);
  for (int step = 0; step < 60; ++step) {
    Homes homes(kRanks);
    int tokens = 0;
    size_t largest = 0;
    for (std::vector<int>& home : homes) {
      const int count = static_cast<int>(random() % (step % 2 == 0 ? 6 : 13));
      for (int i = 0; i < count; ++i) home.push_back(tokens++);
      largest = std::max(largest, home.size());
    }
    const std::vector<RoutedToken> routed = RandomTokens(tokens, options, /*exact_weights=*/true, 1000 + step);
    ExpectReference(routed,
                    group.Step(routed, homes, largest <= 5 ? DispatchLayout::kMasked : DispatchLayout::kContiguous));
  }
}

}  // namespace
}  // namespace soloist
