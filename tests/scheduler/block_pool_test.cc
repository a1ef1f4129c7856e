#include "scheduler/block_pool.h"

#include <cstdio>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace soloist {
namespace {

using Tokens = std::vector<int32_t>;

Tokens Range(int32_t first, int32_t count) {
  Tokens tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// Registers all full blocks of `tokens` in `table`.
ChainId RegisterAll(BlockPool& pool, const Tokens& tokens, std::string_view salt, const Tokens& table) {
  ChainId chain = 0;
  for (int32_t i = 0; i < static_cast<int32_t>(tokens.size()) / pool.block_size(); ++i) {
    chain = pool.Register(chain, std::span(tokens).subspan(i * pool.block_size(), pool.block_size()), salt, table[i]);
  }
  return chain;
}

absl::Status Check(const BlockPool& pool, std::initializer_list<const Tokens*> tables) {
  return pool.CheckIntegrity(std::vector<const Tokens*>(tables));
}

TEST(BlockPool, AllocatesAllAndNoMore) {
  BlockPool pool(4, 2, true);
  Tokens a, b;
  EXPECT_TRUE(pool.Allocate(3, a));
  EXPECT_FALSE(pool.Allocate(2, b));
  EXPECT_TRUE(b.empty());
  EXPECT_TRUE(pool.Allocate(1, b));
  EXPECT_EQ(std::set<int32_t>({a[0], a[1], a[2], b[0]}).size(), 4u);
  EXPECT_EQ(pool.used(), 4);
  EXPECT_TRUE(Check(pool, {&a, &b}).ok());
  pool.Release(a);
  pool.Release(b);
  EXPECT_EQ(pool.available(), 4);
  EXPECT_EQ(pool.cached(), 0);
  EXPECT_TRUE(Check(pool, {}).ok());
  std::printf("4 blocks handed out once each, a fifth refused, all back\n");
}

TEST(BlockPool, SharesEqualPrefixesOfOneSalt) {
  BlockPool pool(8, 4, true);
  const Tokens tokens = Range(0, 10);
  Tokens a, b, c, d;
  ASSERT_TRUE(pool.Allocate(3, a));
  const ChainId chain = RegisterAll(pool, tokens, "red", a);
  EXPECT_EQ(pool.CountCached(tokens, "red", 8), 2);
  EXPECT_EQ(pool.CountCached(tokens, "red", 1), 1);
  EXPECT_EQ(pool.CountCached(tokens, "blue", 8), 0);
  EXPECT_EQ(pool.CountCached(Range(4, 8), "red", 8), 0);  // the second block's tokens, but not after the first's
  EXPECT_EQ(pool.Match(tokens, "red", 8, b), chain);
  EXPECT_EQ(b, Tokens(a.begin(), a.begin() + 2));
  EXPECT_EQ(pool.Match(tokens, "blue", 8, c), 0u);
  Tokens other = tokens;
  other[5] = 77;
  EXPECT_EQ(pool.CountCached(other, "red", 8), 1);
  EXPECT_TRUE(Check(pool, {&a, &b}).ok());
  pool.Release(a);
  EXPECT_EQ(pool.used(), 2);
  pool.Release(b);
  EXPECT_EQ(pool.cached(), 2);
  pool.Match(tokens, "red", 8, d);
  EXPECT_EQ(pool.used(), 2);
  EXPECT_TRUE(Check(pool, {&d}).ok());
  EXPECT_FALSE(Check(pool, {}).ok());
  pool.Release(d);
  std::printf("2 of 3 blocks shared; not across salts, not at another place, not with one other token\n");
}

TEST(BlockPool, DuplicatesKeepTheFirst) {
  BlockPool pool(4, 2, true);
  Tokens a, b;
  ASSERT_TRUE(pool.Allocate(2, a) && pool.Allocate(2, b));
  const ChainId first = RegisterAll(pool, Range(0, 4), "", a);
  EXPECT_EQ(RegisterAll(pool, Range(0, 4), "", b), first);
  pool.Release(b);
  EXPECT_EQ(pool.cached(), 0);
  EXPECT_EQ(pool.available(), 2);
  pool.Release(a);
  EXPECT_EQ(pool.cached(), 2);
  EXPECT_TRUE(Check(pool, {}).ok());
  std::printf("two equal blocks: one is registered, the other goes back empty\n");
}

TEST(BlockPool, UnregisteredBlocksAreFoundNoMore) {
  BlockPool pool(6, 2, true);
  Tokens a, b, c, found;
  ASSERT_TRUE(pool.Allocate(3, a) && pool.Allocate(2, b));
  const ChainId chain = RegisterAll(pool, Range(0, 6), "", a);
  RegisterAll(pool, Range(0, 4), "", b);  // duplicates: not registered
  const Tokens first_of_b(b.begin(), b.end());
  pool.Match(Range(0, 6), "", 3, c);
  pool.Release(a);
  pool.Unregister(Tokens{c[1], c[2]});
  pool.Unregister(Tokens{c[1], c[2]});  // again: nothing to do
  pool.Unregister(first_of_b);
  EXPECT_EQ(pool.CountCached(Range(0, 6), "", 3), 1);
  EXPECT_TRUE(Check(pool, {&b, &c}).ok());
  pool.Release(c);
  EXPECT_EQ(pool.cached(), 1);
  EXPECT_EQ(pool.available(), 4);
  pool.Match(Range(0, 2), "", 1, found);
  pool.Unregister(found);
  pool.Release(found);
  EXPECT_EQ(pool.cached(), 0);
  // Also of a block that nobody references; and what comes after it is another prefix than before.
  ASSERT_TRUE(pool.Allocate(3, a));
  EXPECT_NE(RegisterAll(pool, Range(0, 6), "", a), chain);
  const Tokens again = a;
  pool.Release(a);
  EXPECT_EQ(pool.cached(), 3);
  pool.Unregister(again);
  EXPECT_EQ(pool.cached(), 0);
  EXPECT_EQ(pool.available(), 4);
  EXPECT_TRUE(Check(pool, {&b}).ok());
  pool.Release(b);
  std::printf("taken back while referenced, while cached, twice and of duplicates\n");
}

TEST(BlockPool, ClearForgetsAll) {
  BlockPool pool(6, 2, true);
  Tokens a, b;
  ASSERT_TRUE(pool.Allocate(3, a) && pool.Allocate(2, b));
  const ChainId chain = RegisterAll(pool, Range(0, 6), "red", a);
  pool.Release(b);
  pool.Release(a);
  ASSERT_TRUE(pool.Allocate(1, b));
  pool.Clear();
  EXPECT_EQ(pool.available(), 6);
  EXPECT_EQ(pool.cached(), 0);
  EXPECT_EQ(pool.CountCached(Range(0, 6), "red", 3), 0);
  EXPECT_TRUE(Check(pool, {}).ok());
  ASSERT_TRUE(pool.Allocate(6, a));
  EXPECT_EQ(std::set<int32_t>(a.begin(), a.end()).size(), 6u);
  EXPECT_GT(RegisterAll(pool, Range(0, 6), "red", a), chain);  // names are never given twice
  EXPECT_TRUE(Check(pool, {&a}).ok());
  std::printf("all 6 blocks free and unknown\n");
}

TEST(BlockPool, EvictsLeastRecentlyUsedEndsFirst) {
  BlockPool pool(4, 1, true);
  Tokens a, b, c;
  ASSERT_TRUE(pool.Allocate(2, a));
  RegisterAll(pool, {1, 2}, "", a);
  ASSERT_TRUE(pool.Allocate(2, b));
  RegisterAll(pool, {5, 6}, "", b);
  pool.Release(a);
  pool.Release(b);
  ASSERT_TRUE(pool.Allocate(1, c));
  EXPECT_EQ(pool.CountCached(Tokens{1, 2}, "", 2), 1);  // its end went first
  EXPECT_EQ(pool.CountCached(Tokens{5, 6}, "", 2), 2);
  Tokens touched;
  pool.Match(Tokens{1}, "", 1, touched);
  pool.Release(touched);  // now the most recently used
  ASSERT_TRUE(pool.Allocate(2, c));
  EXPECT_EQ(pool.CountCached(Tokens{1}, "", 1), 1);
  EXPECT_EQ(pool.CountCached(Tokens{5}, "", 1), 0);
  EXPECT_TRUE(Check(pool, {&c}).ok());
  pool.Release(c);
  std::printf("eviction order: oldest first, a prefix from its end, a hit renews\n");
}

TEST(BlockPool, OffMeansOff) {
  BlockPool pool(4, 1, false);
  Tokens a;
  ASSERT_TRUE(pool.Allocate(2, a));
  RegisterAll(pool, {1, 2}, "", a);
  EXPECT_EQ(pool.CountCached(Tokens{1, 2}, "", 2), 0);
  pool.Release(a);
  EXPECT_EQ(pool.cached(), 0);
  EXPECT_EQ(pool.available(), 4);
  std::printf("without the prefix cache nothing is kept\n");
}

// A model of the pool: what each block holds. A match must return exactly the asked prefix.
TEST(BlockPool, RandomAgainstModel) {
  int64_t operations = 0, hits = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    std::mt19937_64 random(seed);
    const auto below = [&random](int n) { return static_cast<int32_t>(random() % static_cast<uint64_t>(n)); };
    const int32_t block_size = 1 + below(3), num_blocks = 1 + below(24);
    BlockPool pool(num_blocks, block_size, true);
    std::vector<std::pair<std::string, Tokens>> content(num_blocks);  // salt and prefix up to the block's end
    std::vector<Tokens> held;
    for (int i = 0; i < 400; ++i, ++operations) {
      if (below(3) == 0 && !held.empty()) {
        std::swap(held[below(static_cast<int>(held.size()))], held.back());
        pool.Release(held.back());
        held.pop_back();
        continue;
      }
      Tokens tokens(block_size * (1 + below(6)));
      for (int32_t& token : tokens) token = below(2);
      const std::string salt = below(2) == 0 ? "" : "s";
      Tokens table;
      ChainId chain = pool.Match(tokens, salt, 6, table);
      const int32_t found = static_cast<int32_t>(table.size());
      hits += found;
      for (int32_t b = 0; b < found; ++b) {
        ASSERT_EQ(content[table[b]].first, salt);
        ASSERT_EQ(content[table[b]].second, Tokens(tokens.begin(), tokens.begin() + (b + 1) * block_size));
      }
      const int32_t blocks = static_cast<int32_t>(tokens.size()) / block_size;
      if (!pool.Allocate(blocks - found, table)) {
        pool.Release(table);
        continue;
      }
      for (int32_t b = found; b < blocks; ++b) {
        content[table[b]] = {salt, Tokens(tokens.begin(), tokens.begin() + (b + 1) * block_size)};
        chain = pool.Register(chain, std::span(tokens).subspan(b * block_size, block_size), salt, table[b]);
      }
      held.push_back(table);
      std::vector<const Tokens*> tables;
      for (const Tokens& t : held) tables.push_back(&t);
      const absl::Status status = pool.CheckIntegrity(tables);
      ASSERT_TRUE(status.ok()) << status;
    }
    for (Tokens& table : held) pool.Release(table);
    ASSERT_EQ(pool.used(), 0);
  }
  EXPECT_GT(hits, 0);
  std::printf("%ld random operations, %ld blocks found, each with the content asked for\n", operations, hits);
}

}  // namespace
}  // namespace soloist
