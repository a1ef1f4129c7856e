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
  staged.query_starts = take(room.sequences + 1);
  staged.seq_lens = take(room.sequences);
  staged.block_tables = take(room.sequences * room.max_blocks);
  staged.logit_rows = take(room.logit_rows);
  staged.sampling = take((room.logit_rows + 1) * kRowWords);
  staged.bias = take(room.bias * 2);
  staged.history = take(room.history * 2);
  staged.words = at;
  return staged;
}

PlanRoom RoomOf(const HomePlan& plan) {
  return {.tokens = plan.num_tokens(),
          .sequences = plan.num_sequences(),
          .max_blocks = plan.max_blocks(),
          .logit_rows = plan.num_logit_rows(),
          .bias = plan.num_bias(),
          .history = plan.num_history()};
}

bool Fits(const PlanRoom& plan, const PlanRoom& room) {
  return plan.tokens <= room.tokens && plan.sequences <= room.sequences && plan.max_blocks <= room.max_blocks &&
         plan.logit_rows <= room.logit_rows && plan.bias <= room.bias && plan.history <= room.history;
}

void Stage(const HomePlan& plan, StagedPlan& staged, int32_t* out) {
  const PlanRoom& room = staged.room;
  CHECK(Fits(RoomOf(plan), room));
  out[staged.num_rows] = plan.num_tokens();
  Put<int32_t>(plan.token_ids(), room.tokens, 0, out + staged.token_ids);
  Put<int32_t>(plan.positions(), room.tokens, 0, out + staged.positions);
  Put<int32_t>(plan.slot_mapping(), room.tokens, -1, out + staged.slot_mapping);
  // A padding sequence is one padding row; only graphs have any, and there every sequence is one row.
  Put<int32_t>(plan.query_starts(), room.sequences + 1, 0, out + staged.query_starts);
  for (int64_t s = plan.num_sequences(); s < room.sequences; ++s) {
    out[staged.query_starts + s + 1] = out[staged.query_starts + s] + 1;
  }
  Put<int32_t>(plan.seq_lens(), room.sequences, 0, out + staged.seq_lens);
  int32_t* tables = out + staged.block_tables;
  const int64_t blocks = plan.max_blocks();
  for (int64_t s = 0; s < plan.num_sequences(); ++s) {
    const int32_t* from = plan.block_tables().data() + s * blocks;
    std::fill(std::copy_n(from, blocks, tables + s * room.max_blocks), tables + (s + 1) * room.max_blocks, 0);
  }
  std::fill(tables + plan.num_sequences() * room.max_blocks, tables + room.sequences * room.max_blocks, 0);
  Put<int32_t>(plan.logit_rows(), room.logit_rows, 0, out + staged.logit_rows);
  SamplingRow end;
  end.bias_begin = plan.num_bias();
  end.history_begin = plan.num_history();
  Put<SamplingRow>(plan.sampling(), room.logit_rows + 1, end, out + staged.sampling);
  std::copy(plan.bias().begin(), plan.bias().end(), reinterpret_cast<LogitBias*>(out + staged.bias));
  std::copy(plan.history().begin(), plan.history().end(), reinterpret_cast<TokenHistory*>(out + staged.history));

  staged.rows = plan.num_logit_rows();
  staged.num_decodes = 0;
  staged.max_query_rows = 0;
  staged.max_seq_len = 0;
  bool leading = true;
  for (int s = 0; s < plan.num_sequences(); ++s) {
    const int rows = plan.query_starts()[s + 1] - plan.query_starts()[s];
    leading = leading && rows == 1;
    staged.num_decodes += leading ? 1 : 0;
    staged.max_query_rows = std::max(staged.max_query_rows, rows);
    staged.max_seq_len = std::max<int64_t>(staged.max_seq_len, plan.seq_lens()[s]);
  }
}

}  // namespace soloist
