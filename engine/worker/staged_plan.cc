#include "engine/worker/staged_plan.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace soloist {
namespace {

constexpr int64_t kRowWords = sizeof(SamplingRow) / 4;

// Copies a section and pads it to `room` entries with `padding`.
template <typename T>
void Put(std::span<const T> from, int64_t room, const T& padding, int32_t* out) {
  static_assert(sizeof(T) % 4 == 0);
  T* to = reinterpret_cast<T*>(out);
  CHECK_LE(std::ssize(from), room);
  std::fill(std::copy(from.begin(), from.end(), to), to + room, padding);
}

// Calls f(sequence, first row, row behind the last) for those that have rows in [begin, end), with these rows.
template <typename F>
void ForSequences(const HomePlan& plan, int32_t begin, int32_t end, const F& f) {
  for (int32_t s = 0; s < plan.num_sequences(); ++s) {
    const int32_t first = std::max(plan.query_starts()[s], begin), last = std::min(plan.query_starts()[s + 1], end);
    if (first < last) f(s, first, last);
  }
}

// The sequences of rows [begin, end). A padding sequence is one padding row; only graphs have any, and there every
// sequence is one row.
void StageBatch(const HomePlan& plan, int32_t begin, int32_t end, int64_t max_blocks, StagedBatch& batch,
                int32_t* out) {
  int32_t* starts = out + batch.query_starts;
  int32_t* lens = out + batch.seq_lens;
  int32_t* table = out + batch.block_tables;
  *starts = 0;
  batch.num_decodes = 0;
  batch.max_query_rows = 0;
  batch.max_seq_len = 0;
  int64_t sequences = 0;
  ForSequences(plan, begin, end, [&](int32_t s, int32_t first, int32_t last) {
    const int rows = last - first;
    if (rows == 1 && batch.num_decodes == sequences) ++batch.num_decodes;
    ++sequences;
    const int32_t keys = plan.seq_lens()[s] - (plan.query_starts()[s + 1] - last);
    batch.max_query_rows = std::max(batch.max_query_rows, rows);
    batch.max_seq_len = std::max<int64_t>(batch.max_seq_len, keys);
    *++starts = last - begin;
    *lens++ = keys;
    const int32_t* from = plan.block_tables().data() + static_cast<int64_t>(s) * plan.max_blocks();
    std::fill(std::copy_n(from, plan.max_blocks(), table), table + max_blocks, 0);
    table += max_blocks;
  });
  CHECK_LE(sequences, batch.sequences);
  for (; sequences < batch.sequences; ++sequences) {
    starts[1] = *starts + 1;
    ++starts;
    *lens++ = 0;
    std::fill_n(table, max_blocks, 0);
    table += max_blocks;
  }
}

}  // namespace

StagedPlan StagedPlan::Layout(const PlanRoom& room) {
  StagedPlan staged;
  staged.room = room;
  int64_t at = 0;
  const auto take = [&](int64_t words) {
    const int64_t begin = at;
    at += (words + 3) / 4 * 4;
    return begin;
  };
  staged.num_rows = take(1);
  staged.token_ids = take(room.tokens);
  staged.positions = take(room.tokens);
  staged.slot_mapping = take(room.tokens);
  staged.batches[0].sequences = room.sequences;
  staged.batches[1].sequences = room.second_sequences;
  for (StagedBatch& batch : staged.batches) {
    batch.query_starts = take(batch.sequences + 1);
    batch.seq_lens = take(batch.sequences);
    batch.block_tables = take(batch.sequences * room.max_blocks);
  }
  staged.logit_rows = take(room.logit_rows);
  staged.mask_of_row = take(room.logit_rows);
  staged.targets = take(room.logit_rows);
  staged.sampling = take((room.logit_rows + 1) * kRowWords);
  staged.bias = take(room.bias * 2);
  staged.history = take(room.history * 2);
  staged.masks = take(room.masks * room.mask_words);
  staged.words = at;
  return staged;
}

PlanRoom RoomOf(const HomePlan& plan) {
  int64_t sequences = plan.num_sequences(), second_sequences = 0;
  if (plan.is_split()) {
    sequences = 0;
    ForSequences(plan, 0, plan.second_begin(), [&](int32_t, int32_t, int32_t) { ++sequences; });
    ForSequences(plan, plan.second_begin(), plan.num_tokens(), [&](int32_t, int32_t, int32_t) { ++second_sequences; });
  }
  return {.tokens = plan.num_tokens(),
          .sequences = sequences,
          .second_sequences = second_sequences,
          .max_blocks = plan.max_blocks(),
          .logit_rows = plan.num_logit_rows(),
          .bias = plan.num_bias(),
          .history = plan.num_history(),
          .masks = plan.num_masks(),
          .mask_words = plan.mask_words()};
}

bool Fits(const PlanRoom& plan, const PlanRoom& room) {
  return plan.tokens <= room.tokens && plan.sequences <= room.sequences &&
         plan.second_sequences <= room.second_sequences && plan.max_blocks <= room.max_blocks &&
         plan.logit_rows <= room.logit_rows && plan.bias <= room.bias && plan.history <= room.history &&
         plan.masks <= room.masks && (plan.masks == 0 || plan.mask_words == room.mask_words);
}

void Stage(const HomePlan& plan, StagedPlan& staged, int32_t* out) {
  const PlanRoom& room = staged.room;
  CHECK(Fits(RoomOf(plan), room));
  out[staged.num_rows] = plan.num_tokens();
  Put<int32_t>(plan.token_ids(), room.tokens, 0, out + staged.token_ids);
  Put<int32_t>(plan.positions(), room.tokens, 0, out + staged.positions);
  Put<int32_t>(plan.slot_mapping(), room.tokens, -1, out + staged.slot_mapping);
  staged.num_batches = plan.is_split() ? 2 : 1;
  const int32_t border = plan.is_split() ? plan.second_begin() : plan.num_tokens();
  StagedBatch& first = staged.batches[0];
  StagedBatch& second = staged.batches[1];
  CHECK(!plan.is_split() || room.tokens == plan.num_tokens());
  first.tokens = plan.is_split() ? border : room.tokens;
  second.tokens = room.tokens - first.tokens;
  StageBatch(plan, 0, border, room.max_blocks, first, out);
  StageBatch(plan, border, plan.num_tokens(), room.max_blocks, second, out);
  Put<int32_t>(plan.logit_rows(), room.logit_rows, 0, out + staged.logit_rows);
  SamplingRow end;
  end.bias_begin = plan.num_bias();
  end.history_begin = plan.num_history();
  Put<SamplingRow>(plan.sampling(), room.logit_rows + 1, end, out + staged.sampling);
  std::copy(plan.bias().begin(), plan.bias().end(), reinterpret_cast<LogitBias*>(out + staged.bias));
  std::copy(plan.history().begin(), plan.history().end(), reinterpret_cast<TokenHistory*>(out + staged.history));
  int32_t* mask_of_row = out + staged.mask_of_row;
  std::fill_n(mask_of_row, room.logit_rows, -1);
  for (int m = 0; m < plan.num_masks(); ++m) mask_of_row[plan.mask_rows()[m]] = m;
  std::copy(plan.masks().begin(), plan.masks().end(), out + staged.masks);
  Put<int32_t>(plan.targets(), room.logit_rows, -1, out + staged.targets);

  staged.rows = plan.num_logit_rows();
}

}  // namespace soloist
