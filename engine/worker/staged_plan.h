// StagedPlan: a HomePlan as the ops want it: padded to a bucket, sections at offsets that depend on the bucket alone
// (so that a graph finds them at the same addresses in every step), ready to be copied to the device in one piece.
#ifndef SOLOIST_ENGINE_WORKER_STAGED_PLAN_H_
#define SOLOIST_ENGINE_WORKER_STAGED_PLAN_H_

#include <cstdint>

#include "engine/comm/dispatcher.h"
#include "engine/step.h"

namespace soloist {

// Room of a staged plan, in entries.
struct PlanRoom {
  int64_t tokens = 0;
  int64_t sequences = 0;         // of the first micro-batch
  int64_t second_sequences = 0;  // of the second; one whose rows are in both counts in both
  int64_t max_blocks = 0;
  int64_t logit_rows = 0;
  int64_t bias = 0;
  int64_t history = 0;
  int64_t masks = 0;
  int64_t mask_words = 0;  // of one mask
};

// The sequences of a micro-batch.
struct StagedBatch {
  // Sections; starts count from the micro-batch's first row.
  int64_t query_starts = 0, seq_lens = 0, block_tables = 0;
  int64_t tokens = 0;     // rows, padding too
  int64_t sequences = 0;  // room
  // Of the plan itself.
  int num_decodes = 0;  // leading sequences with one row
  int max_query_rows = 0;
  int64_t max_seq_len = 0;
};

// Offsets in int32 words from the start; every section begins at a multiple of 4 words.
struct StagedPlan {
  int64_t num_rows = 0;  // one word: tokens that are not padding
  int64_t token_ids = 0, positions = 0, slot_mapping = 0, logit_rows = 0, mask_of_row = 0, targets = 0, sampling = 0,
          bias = 0, history = 0, masks = 0;
  StagedBatch batches[kMaxMicroBatches];
  int64_t words = 0;  // all of it
  PlanRoom room;
  // Of the plan itself.
  int num_batches = 1;
  DispatchCapacity capacity;  // see StepInputs
  int rows = 0;               // real logit rows

  static StagedPlan Layout(const PlanRoom& room);
};

// Exactly the plan's sizes.
PlanRoom RoomOf(const HomePlan& plan);
bool Fits(const PlanRoom& plan, const PlanRoom& room);

// Writes the plan to `out` (staged.words words) with padding: tokens 0 at position 0 with slot -1, each a sequence of
// one row and no keys; logit rows 0, greedy, without mask or target. A plan of two micro-batches needs its own room,
// exactly. Fills the fields of `staged` that describe the plan.
void Stage(const HomePlan& plan, StagedPlan& staged, int32_t* out);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_WORKER_STAGED_PLAN_H_
