// StepPlan and StepResult: what one engine step is asked and what it answers. Plain packed int32 sections, one per home
// rank: the same bytes in memory, on the wire and on the device.
#ifndef SOLOIST_ENGINE_STEP_H_
#define SOLOIST_ENGINE_STEP_H_

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
  int32_t max_sequences = 0;  // per home and step, also the limit of logit rows
};

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
};

// One home's part, packed:
//   header (16 words) | token_ids | positions | slot_mapping | query_starts | seq_lens | block_tables | logit_rows |
//   sampling (16 words a row) | bias (2 words) | history (2 words)
// query_starts always has num_sequences + 1 entries here. Header words: see step.cc. A value; cheap to move.
class HomePlan {
 public:
  static constexpr int kHeaderWords = 16;

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

  // All of it, for a copy to the wire or the device. `Offset(i)`: first word of section i (0 token_ids .. 9 history).
  std::span<const int32_t> words() const { return words_; }
  int64_t Offset(int section) const;

 private:
  static constexpr int kNumSections = 10;
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
  std::vector<int32_t> tokens;       // [rows]
  std::vector<float> logprobs;       // [rows] natural log, of raw logits
  std::vector<int32_t> top_tokens;   // [rows, kMaxTopLogprobs] if any row asked for log-probabilities, else empty
  std::vector<float> top_logprobs;   // the same
  std::vector<float> raw_logits;     // [rows, vocab] if any row asked for logits (other rows are zero), else empty
  std::vector<int64_t> expert_rows;  // [num_layers, num_experts] choices that this home's tokens made in this step
  int64_t device_ns = 0;             // from the step's first to its last work on the device
  int64_t idle_ns = 0;               // that the device had nothing to do before it, since the step before; 0: unknown
  int64_t enqueue_ns = 0;            // of the rank's thread, to enqueue the step
  std::vector<GroupTime> groups;     // of a profiled step, in order of first use; else empty
};

struct StepResult {
  int64_t step = 0;
  std::vector<HomeResult> homes;
  int64_t device_ns = 0;  // longest home's
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_STEP_H_
