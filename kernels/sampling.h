// Sampling on the device: the parameters of one row, as they travel in the StepPlan, and what Ops::Sample does with
// them.
#ifndef SOLOIST_KERNELS_SAMPLING_H_
#define SOLOIST_KERNELS_SAMPLING_H_

#include <cstdint>
#include <type_traits>

#include "kernels/tensor.h"

namespace soloist {

inline constexpr int kMaxTopLogprobs = 20;

// Words of a row's mask of allowed tokens: bit t % 32 of word t / 32 is token t's. Bits beyond the vocabulary are not
// looked at.
constexpr int64_t TokenMaskWords(int64_t vocab_size) { return (vocab_size + 31) / 32; }

// Parameters of one row; 16 words, plain bytes, part of the StepPlan.
struct SamplingRow {
  float temperature = 0;         // 0: greedy; else logits are divided by it
  float top_p = 1;               // (0, 1]
  float min_p = 0;               // [0, 1]: keeps tokens with p >= min_p * p_max
  int32_t top_k = 0;             // 0: off
  float repetition_penalty = 1;  // > 0; on tokens of prompt or output: logit > 0 ? logit / r : logit * r
  float presence_penalty = 0;    // subtracted once from tokens of the output
  float frequency_penalty = 0;   // subtracted times its count in the output
  uint32_t seed_low = 0;
  uint32_t seed_high = 0;
  int32_t output_index = 0;       // which of the request's n outputs
  int32_t position = 0;           // of the token being sampled, from the prompt's start
  int32_t num_top_logprobs = -1;  // -1: none, 0: only the token's own, up to kMaxTopLogprobs
  int32_t pending_row = -1;       // row of the previous step's result whose token also counts as output; -1: none
  int32_t return_logits = 0;      // 1: the raw logits row is returned too
  int32_t bias_begin = 0;         // first entry of this row in `bias`; its end is the next row's begin
  int32_t history_begin = 0;      // first entry of this row in `history`
};
static_assert(sizeof(SamplingRow) == 64 && std::is_trivially_copyable_v<SamplingRow>);

// Added to a token's logit after the penalties. -inf bans (min_tokens, logit_bias -100).
struct LogitBias {
  int32_t token;
  float bias;
};
// A distinct token of the sequence and how often it is in the output (0: in the prompt only).
struct TokenHistory {
  int32_t token;
  int32_t output_count;
};

// Order of work per row: raw log-softmax (log-probabilities are of the raw logits) -> mask (tokens that it does not
// allow have a logit of -inf from here on) -> penalties -> bias -> greedy argmax if temperature == 0 (ties: the lower
// id); else divide by temperature, top-k (ties at the k-th are kept), min-p, top-p (smallest set of most likely tokens
// with mass >= top_p, the crossing one included, ties at the threshold kept), each over what the one before left, then
// the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): argmax over survivors of logit + g, g = -log(-log(u)), u in
// (0, 1) from Philox4x32-10 (Salmon et al., SC'11) with key = (seed_low, seed_high) and counter = (token id / 4,
// position, output_index, 0), word = token id % 4. So a draw depends on nothing but request, output index, position and
// token id. Where mask and bans leave no token, the result is any token of the vocabulary: whoever made the mask sees
// that it is not allowed.
//
// A row with a target draws nothing: its token is the target, with the target's log-probability. Of its parameters only
// num_top_logprobs and return_logits count.
struct SampleArgs {
  Tensor logits;                        // F32 [rows, vocab], overwritten
  const SamplingRow* params = nullptr;  // [rows + 1]; the last only ends the row before it (bias_begin, history_begin)
  const LogitBias* bias = nullptr;      // [params[rows].bias_begin]
  const TokenHistory* history = nullptr;     // [params[rows].history_begin], distinct tokens within a row
  const int32_t* previous_tokens = nullptr;  // result of the previous step, for pending_row
  const int32_t* mask_of_row = nullptr;      // [rows] which of the masks is the row's; -1: none. Null: no row has one
  const int32_t* masks = nullptr;            // [masks, TokenMaskWords(vocab)]
  const int32_t* targets = nullptr;          // [rows] the row's token, or -1: sample one. Null: no row has a target
  // Outputs.
  int32_t* tokens = nullptr;      // [rows]
  float* logprobs = nullptr;      // [rows] of the row's token (natural log); written for every row
  int32_t* top_tokens = nullptr;  // [rows, kMaxTopLogprobs] most likely first; beyond num_top_logprobs: -1
  float* top_logprobs = nullptr;  // [rows, kMaxTopLogprobs]
  float* raw_logits = nullptr;    // [rows, vocab] copies of the rows with return_logits; null if none asks
};

}  // namespace soloist

#endif  // SOLOIST_KERNELS_SAMPLING_H_
