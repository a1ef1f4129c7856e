// StepPlan and StepResult: what one engine step is asked and what it answers. Plain packed int32 sections, one per home
// rank: the same bytes in memory, on the wire and on the device.
#ifndef SOLOIST_ENGINE_STEP_H_
#define SOLOIST_ENGINE_STEP_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/sampling.h"

namespace soloist {

// What a plan for one home must respect; from EngineInfo.
struct PlanLimits {
  int32_t vocab_size = 0;
  int32_t max_model_len = 0;  // positions are in [0, max_model_len)
  int32_t num_blocks = 0;     // KV blocks of one home
  int32_t block_size = 0;     // tokens per block
  int32_t max_tokens = 0;     // per home and step
  int32_t max_sequences = 0;  // per home and step

  // Per home and step. Logits in memory are that many rows of the vocabulary in F32. At least one for each sequence;
  // where few run, as many more as make a prompt that is scored (HomePlanParts::targets) worth a step.
  int32_t max_logit_rows() const { return std::max(max_sequences, std::min(max_tokens, kMinLogitRows)); }
  static constexpr int32_t kMinLogitRows = 64;
};

// Of a mask over the vocabulary (kernels/sampling.h).
bool AllowsToken(std::span<const int32_t> mask, int32_t token);
bool AllowsAny(std::span<const int32_t> mask, int32_t vocab_size);

// The content of one home's part, before packing. Sequences in order; a sequence's rows are consecutive. A prefill
// chunk is a sequence with more than one row; there is no phase flag. All zero sizes is a valid part: every rank runs
// every step.
struct HomePlanParts {
  std::vector<int32_t> token_ids;     // [num_tokens] an id, or -1 - i: the token in row i of the previous step's result
  std::vector<int32_t> positions;     // [num_tokens]
  std::vector<int32_t> slot_mapping;  // [num_tokens] block * block_size + slot: where the row's key and value go
  std::vector<int32_t> query_starts;  // [num_sequences + 1]; empty means no sequence
  std::vector<int32_t> seq_lens;      // [num_sequences] keys after this step
  std::vector<int32_t> block_tables;  // [num_sequences, max_blocks] row-major, padded with 0
  int32_t max_blocks = 0;
  std::vector<int32_t> logit_rows;    // [num_logit_rows] rows of token_ids whose logits are sampled
  std::vector<SamplingRow> sampling;  // [num_logit_rows]
  std::vector<LogitBias> bias;        // entries of row r: [sampling[r].bias_begin, sampling[r + 1].bias_begin or end)
  std::vector<TokenHistory> history;  // the same with history_begin
  std::vector<int32_t> mask_rows;     // [num_masks] entries of logit_rows that may only sample some tokens; ascending
  std::vector<int32_t> masks;         // [num_masks, TokenMaskWords(vocab)] which ones
  // [num_logit_rows], or empty: none has one. The token whose log-probability is wanted of the row, which is then also
  // its token in the result; -1: a token is sampled.
  std::vector<int32_t> targets;
};

// One home's part, packed:
//   header (20 words) | token_ids | positions | slot_mapping | query_starts | seq_lens | block_tables | logit_rows |
//   sampling (16 words a row) | bias (2 words) | history (2 words) | mask_rows | masks | targets
// query_starts always has num_sequences + 1 entries here. Header words: see step.cc. A value; cheap to move.
class HomePlan {
 public:
  static constexpr int kHeaderWords = 20;

  HomePlan() : HomePlan(HomePlanParts{}, 0, 0, 0) {}
  // `max_home_tokens`: the largest num_tokens of any home in this step. `previous_rows`: logit rows of this home in the
  // previous step (bounds the references to its result).
  HomePlan(const HomePlanParts& parts, int64_t step, int32_t max_home_tokens, int32_t previous_rows);

  // Takes bytes from anywhere. INVALID_ARGUMENT unless the header is ours and the sections add up to the size; after
  // that the accessors are safe. Contents still need Validate.
  static absl::StatusOr<HomePlan> Parse(std::vector<int32_t> words);

  // Everything that an op would otherwise have to check: ids, positions, block ids, slots inside the sequence's own
  // blocks and consistent with positions, order of starts, row references, parameters in range and finite, distinct
  // logit rows. INVALID_ARGUMENT names section, index, value, limit.
  absl::Status Validate(const PlanLimits& limits) const;

  int64_t step() const;
  int32_t num_tokens() const { return words_[4]; }
  int32_t num_sequences() const { return words_[5]; }
  int32_t max_blocks() const { return words_[6]; }
  int32_t num_logit_rows() const { return words_[7]; }
  int32_t num_bias() const { return words_[8]; }
  int32_t num_history() const { return words_[9]; }
  int32_t max_home_tokens() const { return words_[10]; }
  int32_t previous_rows() const { return words_[11]; }
  // Rows that each (home, expert) has room for in the masked dispatch layout; 0: for all that may come.
  int32_t dispatch_rows() const { return words_[12]; }
  int32_t num_masks() const { return words_[13]; }
  int32_t mask_words() const { return words_[14]; }   // of one mask; 0 without masks
  int32_t num_targets() const { return words_[16]; }  // 0 or num_logit_rows()

  // Two micro-batches: rows before second_begin() go through each layer together, and so do the others, so that the
  // tokens of one travel while the other computes. Either may be empty; a sequence's rows may lie on both sides, as the
  // first micro-batch's keys are there before the second's attention. All homes of a step are split, or none.
  bool is_split() const { return words_[15] > 0; }
  int32_t second_begin() const { return words_[15] - 1; }  // row, 0 to num_tokens; -1: one micro-batch
  void Split(int32_t second_begin);

  // The same plan under another number and with another room.
  void Renumber(int64_t step, int32_t dispatch_rows);

  std::span<const int32_t> token_ids() const { return Words(0); }
  std::span<const int32_t> positions() const { return Words(1); }
  std::span<const int32_t> slot_mapping() const { return Words(2); }
  std::span<const int32_t> query_starts() const { return Words(3); }
  std::span<const int32_t> seq_lens() const { return Words(4); }
  std::span<const int32_t> block_tables() const { return Words(5); }
  std::span<const int32_t> logit_rows() const { return Words(6); }
  std::span<const SamplingRow> sampling() const;
  std::span<const LogitBias> bias() const;
  std::span<const TokenHistory> history() const;
  std::span<const int32_t> mask_rows() const { return Words(10); }
  std::span<const int32_t> masks() const { return Words(11); }
  std::span<const int32_t> targets() const { return Words(12); }

  // All of it, for a copy to the wire or the device. `Offset(i)`: first word of section i (0 token_ids .. 12 targets).
  std::span<const int32_t> words() const { return words_; }
  int64_t Offset(int section) const;

 private:
  static constexpr int kNumSections = 13;
  explicit HomePlan(std::vector<int32_t> words) : words_(std::move(words)) {}
  int64_t SectionWords(int section) const;
  std::span<const int32_t> Words(int section) const {
    return std::span<const int32_t>(words_).subspan(Offset(section), SectionWords(section));
  }

  std::vector<int32_t> words_;
};

struct StepPlan {
  int64_t step = 0;             // 1, 2, 3, ...
  std::vector<HomePlan> homes;  // [num_homes]
};

// Device time of one group of ops (all layers together) in a profiled step.
struct GroupTime {
  std::string group;
  int64_t ns = 0;
};

// Row r belongs to logit row r of that home's plan.
struct HomeResult {
  std::vector<int32_t> tokens;       // [rows] sampled, or the row's target
  std::vector<float> logprobs;       // [rows] natural log, of raw logits
  std::vector<int32_t> top_tokens;   // [rows, kMaxTopLogprobs] if any row asked for log-probabilities, else empty
  std::vector<float> top_logprobs;   // the same
  std::vector<float> raw_logits;     // [rows, vocab] if any row asked for logits (other rows are zero), else empty
  std::vector<int64_t> expert_rows;  // [num_layers, num_experts] choices that this home's tokens made in this step
  // 0: every row had its room (HomePlan::dispatch_rows). Else the step is void, and so are those submitted before this
  // result was known: the most rows that this home had for one expert in a layer.
  int64_t overflow_rows = 0;
  int64_t device_ns = 0;   // from the step's first to its last work on the device
  int64_t idle_ns = 0;     // that the device had nothing to do before it, since the step before; 0: unknown
  int64_t enqueue_ns = 0;  // of the rank's thread, to enqueue the step
  // Time in the rank's collectives, and of it the time in which its compute stream waited for them: with one
  // micro-batch all of it. Where a device runs the collectives, 0 in steps of one micro-batch.
  int64_t comm_ns = 0;
  int64_t comm_wait_ns = 0;
  std::vector<GroupTime> groups;  // of a profiled step, in order of first use; else empty
};

struct StepResult {
  int64_t step = 0;
  std::vector<HomeResult> homes;
  int64_t device_ns = 0;  // longest home's
  int32_t replays = 0;    // times that the step was run before this result, in vain; see replay.h
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_STEP_H_
