// A plan staged into the room of a bucket: every section where the bucket alone says, padding that disturbs nobody.
#include "engine/worker/staged_plan.h"

#include <cstring>
#include <vector>

#include "gtest/gtest.h"

namespace soloist {
namespace {

// `chunks[s]` rows of sequence s, which has `lens[s]` keys after the step; a logit row for the last row of each.
HomePlan MakePlan(const std::vector<int32_t>& chunks, const std::vector<int32_t>& lens, int32_t max_blocks) {
  HomePlanParts parts;
  parts.query_starts = {0};
  parts.max_blocks = max_blocks;
  for (size_t s = 0; s < chunks.size(); ++s) {
    for (int32_t i = 0; i < chunks[s]; ++i) {
      parts.token_ids.push_back(static_cast<int32_t>(100 * s) + i);
      parts.positions.push_back(lens[s] - chunks[s] + i);
      parts.slot_mapping.push_back(static_cast<int32_t>(1000 * s) + i);
    }
    parts.query_starts.push_back(static_cast<int32_t>(parts.token_ids.size()));
    parts.seq_lens.push_back(lens[s]);
    for (int32_t b = 0; b < max_blocks; ++b) parts.block_tables.push_back(static_cast<int32_t>(10 * s) + b);
    parts.logit_rows.push_back(parts.query_starts.back() - 1);
    SamplingRow row;
    row.temperature = 0.5f + static_cast<float>(s);
    row.bias_begin = static_cast<int32_t>(parts.bias.size());
    row.history_begin = static_cast<int32_t>(parts.history.size());
    parts.sampling.push_back(row);
    parts.bias.push_back({static_cast<int32_t>(s), -1.0f});
    parts.history.push_back({static_cast<int32_t>(s), 2});
    parts.history.push_back({static_cast<int32_t>(s) + 50, 0});
  }
  return {parts, 1, static_cast<int32_t>(parts.token_ids.size()), 0};
}

std::vector<int32_t> Staged(const HomePlan& plan, StagedPlan& staged) {
  std::vector<int32_t> words(staged.words, -77);
  Stage(plan, staged, words.data());
  return words;
}

std::vector<int32_t> Section(const std::vector<int32_t>& words, int64_t begin, int64_t count) {
  return {words.begin() + begin, words.begin() + begin + count};
}

TEST(StagedPlanTest, SectionsBeginAtMultiplesOfFourWordsAndDoNotOverlap) {
  const StagedPlan s =
      StagedPlan::Layout({.tokens = 5, .sequences = 3, .max_blocks = 7, .logit_rows = 3, .bias = 1, .history = 2});
  const int64_t begins[] = {s.num_rows,     s.token_ids,  s.positions, s.slot_mapping, s.query_starts, s.seq_lens,
                            s.block_tables, s.logit_rows, s.sampling,  s.bias,         s.history,      s.words};
  const int64_t sizes[] = {1, 5, 5, 5, 4, 3, 21, 3, 4 * 16, 2, 4};
  for (size_t i = 0; i < std::size(sizes); ++i) {
    EXPECT_EQ(begins[i] % 4, 0) << "section " << i;
    EXPECT_GE(begins[i + 1], begins[i] + sizes[i]) << "section " << i;
  }
}

TEST(StagedPlanTest, PlanOfItsOwnSizeHasNoPadding) {
  const HomePlan plan = MakePlan({1, 1, 3}, {9, 4, 12}, 2);
  StagedPlan staged = StagedPlan::Layout(RoomOf(plan));
  const std::vector<int32_t> words = Staged(plan, staged);
  EXPECT_EQ(words[staged.num_rows], 5);
  EXPECT_EQ(Section(words, staged.token_ids, 5), (std::vector<int32_t>{0, 100, 200, 201, 202}));
  EXPECT_EQ(Section(words, staged.query_starts, 4), (std::vector<int32_t>{0, 1, 2, 5}));
  EXPECT_EQ(Section(words, staged.block_tables, 6), (std::vector<int32_t>{0, 1, 10, 11, 20, 21}));
  EXPECT_EQ(staged.num_decodes, 2);
  EXPECT_EQ(staged.max_query_rows, 3);
  EXPECT_EQ(staged.max_seq_len, 12);
  EXPECT_EQ(staged.rows, 3);
}

// A single row behind a chunk is not among the leading decodes.
TEST(StagedPlanTest, OnlyLeadingRowsCountAsDecodes) {
  StagedPlan staged = StagedPlan::Layout(RoomOf(MakePlan({2, 1}, {4, 4}, 1)));
  Staged(MakePlan({2, 1}, {4, 4}, 1), staged);
  EXPECT_EQ(staged.num_decodes, 0);
}

TEST(StagedPlanTest, PaddingOfABucket) {
  const PlanRoom room = {.tokens = 8, .sequences = 8, .max_blocks = 5, .logit_rows = 8, .bias = 16, .history = 16};
  StagedPlan staged = StagedPlan::Layout(room);
  const int64_t history = staged.history;
  const HomePlan plan = MakePlan({1, 1}, {9, 4}, 3);
  const std::vector<int32_t> words = Staged(plan, staged);
  EXPECT_EQ(words[staged.num_rows], 2);
  EXPECT_EQ(Section(words, staged.slot_mapping, 8), (std::vector<int32_t>{0, 1000, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(Section(words, staged.token_ids, 8), (std::vector<int32_t>{0, 100, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(Section(words, staged.seq_lens, 8), (std::vector<int32_t>{9, 4, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(Section(words, staged.query_starts, 9), (std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8}));
  // Rows of the table are as far apart as the bucket's, and padded with block 0.
  EXPECT_EQ(Section(words, staged.block_tables, 10), (std::vector<int32_t>{0, 1, 2, 0, 0, 10, 11, 12, 0, 0}));
  EXPECT_EQ(Section(words, staged.block_tables + 10, 30), std::vector<int32_t>(30, 0));
  const auto* sampling = reinterpret_cast<const SamplingRow*>(words.data() + staged.sampling);
  EXPECT_EQ(sampling[1].temperature, 1.5f);
  for (int r = 2; r <= 8; ++r) {
    // Greedy, without biases or penalties; the first of them ends the last real row.
    EXPECT_EQ(sampling[r].temperature, 0) << r;
    EXPECT_EQ(sampling[r].bias_begin, 2) << r;
    EXPECT_EQ(sampling[r].history_begin, 4) << r;
  }
  EXPECT_EQ(std::memcmp(words.data() + staged.history, plan.history().data(), plan.history().size_bytes()), 0);
  // Another plan lies at the same offsets.
  const HomePlan other = MakePlan({1, 1, 1, 1, 1}, {1, 2, 3, 4, 5}, 5);
  Staged(other, staged);
  EXPECT_EQ(staged.history, history);
  EXPECT_EQ(staged.rows, 5);
}

TEST(StagedPlanTest, AnEmptyPlanIsAllPadding) {
  StagedPlan staged = StagedPlan::Layout({.tokens = 2, .sequences = 2, .max_blocks = 1, .logit_rows = 2});
  const std::vector<int32_t> words = Staged(HomePlan(), staged);
  EXPECT_EQ(words[staged.num_rows], 0);
  EXPECT_EQ(Section(words, staged.slot_mapping, 2), (std::vector<int32_t>{-1, -1}));
  EXPECT_EQ(Section(words, staged.query_starts, 3), (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(staged.num_decodes, 0);
  EXPECT_EQ(staged.max_query_rows, 0);
}

TEST(StagedPlanTest, FitsComparesEverySize) {
  const PlanRoom room = {.tokens = 2, .sequences = 2, .max_blocks = 2, .logit_rows = 2, .bias = 2, .history = 2};
  EXPECT_TRUE(Fits(room, room));
  for (int64_t PlanRoom::* size : {&PlanRoom::tokens, &PlanRoom::sequences, &PlanRoom::max_blocks,
                                   &PlanRoom::logit_rows, &PlanRoom::bias, &PlanRoom::history}) {
    PlanRoom larger = room;
    ++(larger.*size);
    EXPECT_FALSE(Fits(larger, room));
  }
}

}  // namespace
}  // namespace soloist
