// How experts of ranks that are gone are shared out.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "engine/placement/parallel_plan.h"
#include "gtest/gtest.h"

namespace soloist {
namespace {

TEST(ShareOut, TheFewestGetTheNext) {
  const ExpertPlacement all = ExpertPlacement::FromMap({0, 0, 0, 1, 2, 2, 3, 3}, 4).value();
  const ExpertPlacement without_2 = ExpertPlacement::ShareOut(all, all, {true, true, false, true});
  EXPECT_EQ(without_2.expert_rank(), (std::vector<int>{0, 0, 0, 1, 1, 1, 3, 3}));
  // Rank 2 is back and rank 1 goes: rank 2's are its own again, rank 1's goes where fewest are.
  const ExpertPlacement without_1 = ExpertPlacement::ShareOut(all, without_2, {true, false, true, true});
  EXPECT_EQ(without_1.expert_rank(), (std::vector<int>{0, 0, 0, 2, 2, 2, 3, 3}));
  EXPECT_EQ(ExpertPlacement::ShareOut(all, without_1, {true, true, true, true}).expert_rank(), all.expert_rank());
}

TEST(ShareOut, RandomGoingsAndComings) {
  std::mt19937 random(3);
  int orphans = 0, stayed = 0;
  for (int world = 0; world < 300; ++world) {
    const int ranks = 1 + static_cast<int>(random() % 9), experts = 1 + static_cast<int>(random() % 40);
    std::vector<int> map(experts);
    for (int& rank : map) rank = static_cast<int>(random() % ranks);
    const ExpertPlacement all = ExpertPlacement::FromMap(map, ranks).value();
    ExpertPlacement now = all;
    for (int change = 0; change < 10; ++change) {
      std::vector<bool> present(ranks);
      for (int r = 0; r < ranks; ++r) present[r] = random() % 3 != 0;
      present[random() % ranks] = true;
      const ExpertPlacement next = ExpertPlacement::ShareOut(all, now, present);
      ASSERT_EQ(next.expert_rank().size(), map.size());
      size_t most = 0, fewest = map.size();  // of those that were given one, and of all
      for (int e = 0; e < experts; ++e) {
        const int rank = next.expert_rank()[e], before = now.expert_rank()[e];
        ASSERT_TRUE(present[rank]);
        if (present[map[e]]) {
          EXPECT_EQ(rank, map[e]);
          continue;
        }
        ++orphans;
        if (present[before]) {
          EXPECT_EQ(rank, before);
          ++stayed;
        } else {
          most = std::max(most, next.ExpertsOf(rank).size());
        }
      }
      for (int r = 0; r < ranks; ++r) {
        if (present[r]) fewest = std::min(fewest, next.ExpertsOf(r).size());
      }
      EXPECT_LE(most, fewest + 1);
      now = next;
    }
  }
  std::printf("%d orphans, of which %d stayed where they were\n", orphans, stayed);
  EXPECT_GT(stayed, 0);
  EXPECT_GT(orphans, stayed);
}

}  // namespace
}  // namespace soloist
