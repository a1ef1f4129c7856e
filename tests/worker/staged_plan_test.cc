// A plan staged into the room of a bucket: every section where the bucket alone says, padding that disturbs nobody.
#include "engine/worker/staged_plan.h"

#include <cstring>
#include <string>
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
  const StagedPlan s = StagedPlan::Layout({.tokens = 5,
                                           .sequences = 3,
                                           .second_sequences = 2,
                                           .max_blocks = 7,
                                           .logit_rows = 3,
                                           .bias = 1,
                                           .history = 2,
                                           .masks = 2,
                                           .mask_words = 3});
  const StagedBatch &a = s.batches[0], &b = s.batches[1];
  const int64_t begins[] = {s.num_rows,     s.token_ids,    s.positions, s.slot_mapping, a.query_starts, a.seq_lens,
                            a.block_tables, b.query_starts, b.seq_lens,  b.block_tables, s.logit_rows,   s.mask_of_row,
                            s.targets,      s.sampling,     s.bias,      s.history,      s.masks,        s.words};
  const int64_t sizes[] = {1, 5, 5, 5, 4, 3, 21, 3, 2, 14, 3, 3, 3, 4 * 16, 2, 4, 6};
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
  EXPECT_EQ(Section(words, staged.batches[0].query_starts, 4), (std::vector<int32_t>{0, 1, 2, 5}));
  EXPECT_EQ(Section(words, staged.batches[0].block_tables, 6), (std::vector<int32_t>{0, 1, 10, 11, 20, 21}));
  EXPECT_EQ(staged.batches[0].num_decodes, 2);
  EXPECT_EQ(staged.batches[0].max_query_rows, 3);
  EXPECT_EQ(staged.batches[0].max_seq_len, 12);
  EXPECT_EQ(staged.rows, 3);
}

// A single row behind a chunk is not among the leading decodes.
TEST(StagedPlanTest, OnlyLeadingRowsCountAsDecodes) {
  StagedPlan staged = StagedPlan::Layout(RoomOf(MakePlan({2, 1}, {4, 4}, 1)));
  Staged(MakePlan({2, 1}, {4, 4}, 1), staged);
  EXPECT_EQ(staged.batches[0].num_decodes, 0);
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
  EXPECT_EQ(Section(words, staged.batches[0].seq_lens, 8), (std::vector<int32_t>{9, 4, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(Section(words, staged.batches[0].query_starts, 9), (std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8}));
  // Rows of the table are as far apart as the bucket's, and padded with block 0.
  EXPECT_EQ(Section(words, staged.batches[0].block_tables, 10),
            (std::vector<int32_t>{0, 1, 2, 0, 0, 10, 11, 12, 0, 0}));
  EXPECT_EQ(Section(words, staged.batches[0].block_tables + 10, 30), std::vector<int32_t>(30, 0));
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

// The chunk's rows lie on both sides: its keys end where the first micro-batch does, and go on in the second.
TEST(StagedPlanTest, TwoMicroBatchesInsideAChunk) {
  HomePlan plan = MakePlan({1, 5, 2}, {9, 12, 4}, 2);
  plan.Split(4);
  StagedPlan staged = StagedPlan::Layout(RoomOf(plan));
  const std::vector<int32_t> words = Staged(plan, staged);
  EXPECT_EQ(staged.num_batches, 2);
  EXPECT_EQ(Section(words, staged.token_ids, 8), (std::vector<int32_t>{0, 100, 101, 102, 103, 104, 200, 201}));
  const StagedBatch &a = staged.batches[0], &b = staged.batches[1];
  EXPECT_EQ(a.tokens, 4);
  EXPECT_EQ(a.sequences, 2);
  EXPECT_EQ(Section(words, a.query_starts, 3), (std::vector<int32_t>{0, 1, 4}));
  EXPECT_EQ(Section(words, a.seq_lens, 2), (std::vector<int32_t>{9, 10}));
  EXPECT_EQ(Section(words, a.block_tables, 4), (std::vector<int32_t>{0, 1, 10, 11}));
  EXPECT_EQ(a.num_decodes, 1);
  EXPECT_EQ(a.max_query_rows, 3);
  EXPECT_EQ(a.max_seq_len, 10);
  EXPECT_EQ(b.tokens, 4);
  EXPECT_EQ(b.sequences, 2);
  EXPECT_EQ(Section(words, b.query_starts, 3), (std::vector<int32_t>{0, 2, 4}));
  EXPECT_EQ(Section(words, b.seq_lens, 2), (std::vector<int32_t>{12, 4}));
  EXPECT_EQ(Section(words, b.block_tables, 4), (std::vector<int32_t>{10, 11, 20, 21}));
  EXPECT_EQ(b.num_decodes, 0);
  EXPECT_EQ(b.max_query_rows, 2);
  EXPECT_EQ(b.max_seq_len, 12);
}

// At a border no sequence is in both; a last row alone is a decode of the second; either side may be empty.
TEST(StagedPlanTest, TwoMicroBatchesAtBordersAndEnds) {
  for (const int32_t second_begin : {0, 1, 5, 6, 8}) {
    HomePlan plan = MakePlan({1, 5, 2}, {9, 12, 4}, 2);
    plan.Split(second_begin);
    StagedPlan staged = StagedPlan::Layout(RoomOf(plan));
    const std::vector<int32_t> words = Staged(plan, staged);
    const StagedBatch &a = staged.batches[0], &b = staged.batches[1];
    EXPECT_EQ(a.tokens, second_begin);
    EXPECT_EQ(b.tokens, 8 - second_begin);
    EXPECT_EQ(a.sequences + b.sequences, second_begin == 5 ? 4 : 3) << second_begin;
    EXPECT_EQ(words[a.query_starts + a.sequences], a.tokens);
    EXPECT_EQ(words[b.query_starts + b.sequences], b.tokens);
    EXPECT_EQ(b.num_decodes, second_begin == 0 || second_begin == 5 ? 1 : 0) << second_begin;
  }
}

TEST(StagedPlanTest, AnEmptyPlanIsAllPadding) {
  StagedPlan staged = StagedPlan::Layout({.tokens = 2, .sequences = 2, .max_blocks = 1, .logit_rows = 2});
  const std::vector<int32_t> words = Staged(HomePlan(), staged);
  EXPECT_EQ(words[staged.num_rows], 0);
  EXPECT_EQ(Section(words, staged.slot_mapping, 2), (std::vector<int32_t>{-1, -1}));
  EXPECT_EQ(Section(words, staged.batches[0].query_starts, 3), (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(staged.batches[0].num_decodes, 0);
  EXPECT_EQ(staged.batches[0].max_query_rows, 0);
}

TEST(StagedPlanTest, MasksOfSomeRows) {
  HomePlanParts parts;
  for (int32_t r = 0; r < 3; ++r) {
    parts.token_ids.push_back(r);
    parts.positions.push_back(0);
    parts.slot_mapping.push_back(r);
    parts.query_starts.push_back(r);
    parts.seq_lens.push_back(1);
    parts.block_tables.push_back(r);
    parts.logit_rows.push_back(r);
    parts.sampling.emplace_back();
  }
  parts.query_starts.push_back(3);
  parts.max_blocks = 1;
  parts.mask_rows = {0, 2};
  parts.masks = {1, 2, 3, 4};
  const HomePlan plan(parts, 1, 3, 0);
  const PlanLimits limits = {
      .vocab_size = 40, .max_model_len = 8, .num_blocks = 4, .block_size = 1, .max_tokens = 8, .max_sequences = 8};
  EXPECT_EQ(plan.Validate(limits), absl::OkStatus());
  StagedPlan staged = StagedPlan::Layout({.tokens = 4,
                                          .sequences = 4,
                                          .max_blocks = 1,
                                          .logit_rows = 4,
                                          .bias = 1,
                                          .history = 1,
                                          .masks = 4,
                                          .mask_words = 2});
  const std::vector<int32_t> words = Staged(plan, staged);
  EXPECT_EQ(Section(words, staged.mask_of_row, 4), (std::vector<int32_t>{0, -1, 1, -1}));
  EXPECT_EQ(Section(words, staged.masks, 4), (std::vector<int32_t>{1, 2, 3, 4}));

  const auto refusal = [&limits](const HomePlanParts& wrong) {
    return std::string(HomePlan(wrong, 1, 3, 0).Validate(limits).message());
  };
  HomePlanParts bad = parts;
  bad.mask_rows = {0, 0};
  EXPECT_EQ(refusal(bad), "plan: mask_rows[1] is 0, allowed: 1 to 2");
  bad.mask_rows = {0, 3};
  EXPECT_EQ(refusal(bad), "plan: mask_rows[1] is 3, allowed: 1 to 2");
  bad = parts;
  bad.masks = {1, 2, 0, 0x100};  // bit 8 of word 1 is token 40, of a vocabulary of 40
  EXPECT_EQ(refusal(bad), "plan: mask 1, of logit row 2, allows no token");
  bad.masks = {1, 2};
  EXPECT_EQ(refusal(bad), "plan: masks of 1 words, not 2");
}

// Any rows of a chunk are logit rows, with targets or without; more than there may be sequences.
TEST(StagedPlanTest, TargetsOfSomeRows) {
  HomePlanParts parts;
  parts.query_starts = {0, 6};
  parts.seq_lens = {6};
  parts.block_tables = {3};
  parts.max_blocks = 1;
  for (int32_t i = 0; i < 6; ++i) {
    parts.token_ids.push_back(10 + i);
    parts.positions.push_back(i);
    parts.slot_mapping.push_back(3 * 8 + i);
    if (i == 0) continue;
    parts.logit_rows.push_back(i);
    parts.sampling.emplace_back();
    parts.targets.push_back(i < 5 ? 11 + i : -1);
  }
  const PlanLimits limits = {
      .vocab_size = 40, .max_model_len = 8, .num_blocks = 4, .block_size = 8, .max_tokens = 8, .max_sequences = 4};
  EXPECT_EQ(limits.max_logit_rows(), 8);
  const HomePlan plan(parts, 1, 6, 0);
  EXPECT_EQ(plan.Validate(limits), absl::OkStatus());
  EXPECT_EQ(std::vector(plan.targets().begin(), plan.targets().end()), parts.targets);
  const auto parsed = HomePlan::Parse({plan.words().begin(), plan.words().end()});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->num_targets(), 5);
  StagedPlan staged = StagedPlan::Layout({.tokens = 8, .sequences = 8, .max_blocks = 1, .logit_rows = 8});
  const std::vector<int32_t> words = Staged(plan, staged);
  EXPECT_EQ(Section(words, staged.targets, 8), (std::vector<int32_t>{12, 13, 14, 15, -1, -1, -1, -1}));
  EXPECT_EQ(Section(words, staged.logit_rows, 5), (std::vector<int32_t>{1, 2, 3, 4, 5}));
  // Without the section there is no word of it in the plan, and -1 for each row behind it.
  HomePlanParts none = parts;
  none.targets.clear();
  const HomePlan without(none, 1, 6, 0);
  EXPECT_EQ(without.words().size() + 5, plan.words().size());
  EXPECT_EQ(Section(Staged(without, staged), staged.targets, 8), std::vector<int32_t>(8, -1));

  const auto refusal = [&limits](const HomePlanParts& wrong) {
    return std::string(HomePlan(wrong, 1, 6, 0).Validate(limits).message());
  };
  HomePlanParts bad = parts;
  bad.targets[2] = 40;
  EXPECT_EQ(refusal(bad), "plan: targets[2] is 40, allowed: -1 to 39");
  bad.targets[2] = -2;
  EXPECT_EQ(refusal(bad), "plan: targets[2] is -2, allowed: -1 to 39");
  bad.targets.pop_back();
  EXPECT_EQ(refusal(bad), "plan: 4 targets for 5 logit rows, allowed: 0 or one each");
  PlanLimits fewer = limits;
  fewer.max_tokens = 4;
  fewer.max_sequences = 2;
  EXPECT_EQ(fewer.max_logit_rows(), 4);
  fewer.max_tokens = 512;
  EXPECT_EQ(fewer.max_logit_rows(), 64);
  fewer.max_sequences = 100;
  EXPECT_EQ(fewer.max_logit_rows(), 100);
  std::vector<int32_t> raw(plan.words().begin(), plan.words().end());
  for (const int zero : {17, 18, 19}) {
    std::vector<int32_t> wrong = raw;
    wrong[zero] = 1;
    EXPECT_EQ(HomePlan::Parse(wrong).status().message(), "plan: header word " + std::to_string(zero) + " is 1, not 0");
  }
}

TEST(StagedPlanTest, FitsComparesEverySize) {
  const PlanRoom room = {.tokens = 2,
                         .sequences = 2,
                         .second_sequences = 2,
                         .max_blocks = 2,
                         .logit_rows = 2,
                         .bias = 2,
                         .history = 2,
                         .masks = 2,
                         .mask_words = 2};
  EXPECT_TRUE(Fits(room, room));
  for (int64_t PlanRoom::* size :
       {&PlanRoom::tokens, &PlanRoom::sequences, &PlanRoom::second_sequences, &PlanRoom::max_blocks,
        &PlanRoom::logit_rows, &PlanRoom::bias, &PlanRoom::history, &PlanRoom::masks, &PlanRoom::mask_words}) {
    PlanRoom larger = room;
    ++(larger.*size);
    EXPECT_FALSE(Fits(larger, room));
  }
}

}  // namespace
}  // namespace soloist
