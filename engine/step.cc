#include "engine/step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/status.h"

namespace soloist {
namespace {

// Header words.
enum : int {
  kMagicWord = 0,   // "SLP1"
  kSchemaWord = 1,  // layout of this struct; peers must agree
  kStepLow = 2,
  kStepHigh = 3,
  kNumTokens = 4,
  kNumSequences = 5,
  kMaxBlocks = 6,
  kNumLogitRows = 7,
  kNumBias = 8,
  kNumHistory = 9,
  kMaxHomeTokens = 10,
  kPreviousRows = 11,
  kDispatchRows = 12,
  kNumMasks = 13,
  kMaskWords = 14,    // of one mask
  kSecondBegin = 15,  // + 1; 0: one micro-batch
  kNumTargets = 16,   // words 17 to 19 are zero
};
constexpr int kCounts[] = {kNumTokens,  kNumSequences,  kMaxBlocks,    kNumLogitRows, kNumBias,
                           kNumHistory, kMaxHomeTokens, kPreviousRows, kDispatchRows, kNumMasks,
                           kMaskWords,  kSecondBegin,   kNumTargets};
constexpr int kZeros[] = {17, 18, 19};
constexpr int32_t kMagic = 0x31504c53;
constexpr int32_t kSchema = 3;
constexpr int kSamplingWords = sizeof(SamplingRow) / 4;
// No section may hold more entries than that: keeps every product within int64 and a hostile header cheap to refuse.
constexpr int32_t kMaxCount = 1 << 28;

template <typename T>
std::span<const T> As(std::span<const int32_t> words) {
  static_assert(sizeof(T) % 4 == 0 && alignof(T) == 4);
  return {reinterpret_cast<const T*>(words.data()), words.size() * 4 / sizeof(T)};
}

template <typename T>
void Append(const std::vector<T>& from, std::vector<int32_t>& to) {
  const size_t old = to.size();
  to.resize(old + from.size() * sizeof(T) / 4);
  if (!from.empty()) std::memcpy(to.data() + old, from.data(), from.size() * sizeof(T));
}

absl::Status CheckSampling(const SamplingRow& row, int r, const PlanLimits& limits, int32_t previous_rows) {
  const auto bad = [r](const char* name, auto value, const char* allowed) {
    return InvalidArgument("plan: sampling[{}].{} is {}, allowed: {}", r, name, value, allowed);
  };
  if (!(row.temperature >= 0) || !std::isfinite(row.temperature)) return bad("temperature", row.temperature, ">= 0");
  if (!(row.top_p > 0 && row.top_p <= 1)) return bad("top_p", row.top_p, "(0, 1]");
  if (!(row.min_p >= 0 && row.min_p <= 1)) return bad("min_p", row.min_p, "[0, 1]");
  if (row.top_k < 0) return bad("top_k", row.top_k, ">= 0");
  if (!(row.repetition_penalty > 0) || !std::isfinite(row.repetition_penalty)) {
    return bad("repetition_penalty", row.repetition_penalty, "> 0");
  }
  if (!std::isfinite(row.presence_penalty)) return bad("presence_penalty", row.presence_penalty, "finite");
  if (!std::isfinite(row.frequency_penalty)) return bad("frequency_penalty", row.frequency_penalty, "finite");
  if (row.output_index < 0) return bad("output_index", row.output_index, ">= 0");
  if (row.position < 0 || row.position > limits.max_model_len) {
    return InvalidArgument("plan: sampling[{}].position is {}, allowed: 0 to {}", r, row.position,
                           limits.max_model_len);
  }
  if (row.num_top_logprobs < -1 || row.num_top_logprobs > kMaxTopLogprobs) {
    return InvalidArgument("plan: sampling[{}].num_top_logprobs is {}, allowed: -1 to {}", r, row.num_top_logprobs,
                           kMaxTopLogprobs);
  }
  if (row.pending_row < -1 || row.pending_row >= previous_rows) {
    return InvalidArgument("plan: sampling[{}].pending_row is {}, the previous step has {} rows", r, row.pending_row,
                           previous_rows);
  }
  if (row.return_logits != 0 && row.return_logits != 1) return bad("return_logits", row.return_logits, "0 or 1");
  return absl::OkStatus();
}

// The CSR sections: begins grow from 0 to the section's size and token ids are of the vocabulary.
absl::Status CheckBegins(std::span<const SamplingRow> rows, int32_t SamplingRow::* begin, int32_t size,
                         const char* name) {
  int32_t last = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    const int32_t value = rows[r].*begin;
    if (value < last || value > size || (r == 0 && value != 0)) {
      return InvalidArgument("plan: sampling[{}].{} is {}, allowed: {} to {} (first row: 0)", r, name, value, last,
                             size);
    }
    last = value;
  }
  if (rows.empty() && size != 0) return InvalidArgument("plan: {} entries but no logit row", size);
  return absl::OkStatus();
}

// Masks are of distinct logit rows, of the vocabulary's size, and allow something.
absl::Status CheckMasks(const HomePlan& plan, int32_t vocab_size) {
  const int64_t words = plan.num_masks() > 0 ? TokenMaskWords(vocab_size) : 0;
  if (plan.mask_words() != words) return InvalidArgument("plan: masks of {} words, not {}", plan.mask_words(), words);
  int32_t last = -1;
  for (int m = 0; m < plan.num_masks(); ++m) {
    const int32_t row = plan.mask_rows()[m];
    if (row <= last || row >= plan.num_logit_rows()) {
      return InvalidArgument("plan: mask_rows[{}] is {}, allowed: {} to {}", m, row, last + 1,
                             plan.num_logit_rows() - 1);
    }
    last = row;
    if (!AllowsAny(plan.masks().subspan(m * words, words), vocab_size)) {
      return InvalidArgument("plan: mask {}, of logit row {}, allows no token", m, row);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckTargets(const HomePlan& plan, int32_t vocab_size) {
  if (plan.num_targets() != 0 && plan.num_targets() != plan.num_logit_rows()) {
    return InvalidArgument("plan: {} targets for {} logit rows, allowed: 0 or one each", plan.num_targets(),
                           plan.num_logit_rows());
  }
  for (int r = 0; r < plan.num_targets(); ++r) {
    const int32_t target = plan.targets()[r];
    if (target >= -1 && target < vocab_size) continue;
    return InvalidArgument("plan: targets[{}] is {}, allowed: -1 to {}", r, target, vocab_size - 1);
  }
  return absl::OkStatus();
}

}  // namespace

bool AllowsToken(std::span<const int32_t> mask, int32_t token) {
  return (static_cast<uint32_t>(mask[token / 32]) >> (token % 32) & 1u) != 0;
}

bool AllowsAny(std::span<const int32_t> mask, int32_t vocab_size) {
  const int32_t whole = vocab_size / 32, rest = vocab_size % 32;
  if (std::ranges::any_of(mask.first(whole), [](int32_t word) { return word != 0; })) return true;
  return rest > 0 && (static_cast<uint32_t>(mask[whole]) & ((1u << rest) - 1)) != 0;
}

HomePlan::HomePlan(const HomePlanParts& parts, int64_t step, int32_t max_home_tokens, int32_t previous_rows) {
  const auto size = [](const auto& v) { return static_cast<int32_t>(v.size()); };
  words_ = {kMagic,
            kSchema,
            static_cast<int32_t>(step & 0xffffffff),
            static_cast<int32_t>(step >> 32),
            size(parts.token_ids),
            size(parts.seq_lens),
            parts.max_blocks,
            size(parts.logit_rows),
            size(parts.bias),
            size(parts.history),
            max_home_tokens,
            previous_rows,
            0,
            size(parts.mask_rows),
            parts.mask_rows.empty() ? 0 : size(parts.masks) / size(parts.mask_rows),
            0,
            size(parts.targets),
            0,
            0,
            0};
  CHECK_EQ(words_.size(), static_cast<size_t>(kHeaderWords));
  Append(parts.token_ids, words_);
  Append(parts.positions, words_);
  Append(parts.slot_mapping, words_);
  if (parts.query_starts.empty()) {
    words_.push_back(0);
  } else {
    Append(parts.query_starts, words_);
  }
  Append(parts.seq_lens, words_);
  Append(parts.block_tables, words_);
  Append(parts.logit_rows, words_);
  Append(parts.sampling, words_);
  Append(parts.bias, words_);
  Append(parts.history, words_);
  Append(parts.mask_rows, words_);
  Append(parts.masks, words_);
  Append(parts.targets, words_);
  CHECK_EQ(static_cast<int64_t>(words_.size()), Offset(kNumSections));
}

absl::StatusOr<HomePlan> HomePlan::Parse(std::vector<int32_t> words) {
  if (words.size() < kHeaderWords) {
    return InvalidArgument("plan: {} words, the header alone has {}", words.size(), kHeaderWords);
  }
  if (words[kMagicWord] != kMagic) return InvalidArgument("plan: magic is {:#x}, not {:#x}", words[0], kMagic);
  if (words[kSchemaWord] != kSchema) return InvalidArgument("plan: schema {}, ours is {}", words[1], kSchema);
  for (const int i : kCounts) {
    if (words[i] < 0 || words[i] > kMaxCount) {
      return InvalidArgument("plan: header word {} is {}, allowed: 0 to {}", i, words[i], kMaxCount);
    }
  }
  for (const int i : kZeros) {
    if (words[i] != 0) return InvalidArgument("plan: header word {} is {}, not 0", i, words[i]);
  }
  HomePlan plan(std::move(words));
  const int64_t expected = plan.Offset(kNumSections);
  if (static_cast<int64_t>(plan.words_.size()) != expected) {
    return InvalidArgument("plan: {} words, the header says {}", plan.words_.size(), expected);
  }
  return plan;
}

int64_t HomePlan::step() const {
  return (static_cast<int64_t>(words_[kStepHigh]) << 32) | static_cast<uint32_t>(words_[kStepLow]);
}

void HomePlan::Split(int32_t second_begin) {
  CHECK(second_begin >= 0 && second_begin <= num_tokens());
  words_[kSecondBegin] = second_begin + 1;
}

void HomePlan::Renumber(int64_t step, int32_t dispatch_rows) {
  words_[kStepLow] = static_cast<int32_t>(step & 0xffffffff);
  words_[kStepHigh] = static_cast<int32_t>(step >> 32);
  words_[kDispatchRows] = dispatch_rows;
}

int64_t HomePlan::SectionWords(int section) const {
  const int64_t tokens = num_tokens(), sequences = num_sequences(), rows = num_logit_rows();
  switch (section) {
    case 0:
    case 1:
    case 2:
      return tokens;
    case 3:
      return sequences + 1;
    case 4:
      return sequences;
    case 5:
      return sequences * max_blocks();
    case 6:
      return rows;
    case 7:
      return rows * kSamplingWords;
    case 8:
      return static_cast<int64_t>(num_bias()) * 2;
    case 9:
      return static_cast<int64_t>(num_history()) * 2;
    case 10:
      return num_masks();
    case 11:
      return static_cast<int64_t>(num_masks()) * mask_words();
    default:
      return num_targets();
  }
}

int64_t HomePlan::Offset(int section) const {
  int64_t offset = kHeaderWords;
  for (int i = 0; i < section; ++i) offset += SectionWords(i);
  return offset;
}

std::span<const SamplingRow> HomePlan::sampling() const { return As<SamplingRow>(Words(7)); }
std::span<const LogitBias> HomePlan::bias() const { return As<LogitBias>(Words(8)); }
std::span<const TokenHistory> HomePlan::history() const { return As<TokenHistory>(Words(9)); }

absl::Status HomePlan::Validate(const PlanLimits& limits) const {
  const auto at_most = [](const char* what, int64_t value, int64_t limit) {
    return value <= limit ? absl::OkStatus() : InvalidArgument("plan: {} {}, limit {}", value, what, limit);
  };
  RETURN_IF_ERROR(at_most("tokens", num_tokens(), limits.max_tokens));
  RETURN_IF_ERROR(at_most("sequences", num_sequences(), limits.max_sequences));
  RETURN_IF_ERROR(at_most("logit rows", num_logit_rows(), limits.max_logit_rows()));
  RETURN_IF_ERROR(at_most("previous rows", previous_rows(), limits.max_logit_rows()));
  RETURN_IF_ERROR(at_most("tokens on the busiest home", max_home_tokens(), limits.max_tokens));
  RETURN_IF_ERROR(at_most("rows of dispatch room", dispatch_rows(), limits.max_tokens));
  RETURN_IF_ERROR(at_most("tokens on this home, more than the step's largest,", num_tokens(), max_home_tokens()));
  RETURN_IF_ERROR(at_most("as first row of the second micro-batch", second_begin(), num_tokens()));
  const int32_t blocks_per_sequence = (limits.max_model_len + limits.block_size - 1) / limits.block_size;
  RETURN_IF_ERROR(at_most("blocks per sequence", max_blocks(), blocks_per_sequence));

  const auto ids = token_ids(), pos = positions(), slots = slot_mapping(), starts = query_starts(), lens = seq_lens(),
             tables = block_tables();
  if (starts[0] != 0 || starts[num_sequences()] != num_tokens()) {
    return InvalidArgument("plan: query_starts go from {} to {}, expected 0 to {}", starts[0], starts[num_sequences()],
                           num_tokens());
  }
  for (int i = 0; i < num_tokens(); ++i) {
    if (ids[i] >= limits.vocab_size || ids[i] < -previous_rows()) {
      return InvalidArgument("plan: token_ids[{}] is {}, allowed: {} to {}", i, ids[i], -previous_rows(),
                             limits.vocab_size - 1);
    }
  }
  for (int s = 0; s < num_sequences(); ++s) {
    const int64_t rows = static_cast<int64_t>(starts[s + 1]) - starts[s];
    if (rows < 1 || starts[s + 1] > num_tokens()) {
      return InvalidArgument("plan: sequence {} has rows {} to {} of {}", s, starts[s], starts[s + 1], num_tokens());
    }
    if (lens[s] < rows || lens[s] > limits.max_model_len) {
      return InvalidArgument("plan: seq_lens[{}] is {}, allowed: {} to {}", s, lens[s], rows, limits.max_model_len);
    }
    const int64_t used = (static_cast<int64_t>(lens[s]) + limits.block_size - 1) / limits.block_size;
    if (used > max_blocks()) {
      return InvalidArgument("plan: sequence {} of length {} needs {} blocks, the table has {}", s, lens[s], used,
                             max_blocks());
    }
    const auto table = tables.subspan(static_cast<int64_t>(s) * max_blocks(), max_blocks());
    for (int b = 0; b < max_blocks(); ++b) {
      if (table[b] < 0 || table[b] >= limits.num_blocks) {
        return InvalidArgument("plan: block_tables[{}][{}] is {}, allowed: 0 to {}", s, b, table[b],
                               limits.num_blocks - 1);
      }
    }
    for (int i = starts[s]; i < starts[s + 1]; ++i) {
      const int32_t expected = static_cast<int32_t>(lens[s] - rows + (i - starts[s]));
      if (pos[i] != expected) {
        return InvalidArgument("plan: positions[{}] is {}, expected {}", i, pos[i], expected);
      }
      const int64_t slot =
          static_cast<int64_t>(table[expected / limits.block_size]) * limits.block_size + expected % limits.block_size;
      if (slots[i] != slot) return InvalidArgument("plan: slot_mapping[{}] is {}, expected {}", i, slots[i], slot);
    }
  }
  int32_t last_row = -1;
  for (int r = 0; r < num_logit_rows(); ++r) {
    const int32_t row = logit_rows()[r];
    if (row <= last_row || row >= num_tokens()) {
      return InvalidArgument("plan: logit_rows[{}] is {}, allowed: {} to {}", r, row, last_row + 1, num_tokens() - 1);
    }
    last_row = row;
    RETURN_IF_ERROR(CheckSampling(sampling()[r], r, limits, previous_rows()));
  }
  RETURN_IF_ERROR(CheckBegins(sampling(), &SamplingRow::bias_begin, num_bias(), "bias_begin"));
  RETURN_IF_ERROR(CheckBegins(sampling(), &SamplingRow::history_begin, num_history(), "history_begin"));
  RETURN_IF_ERROR(CheckMasks(*this, limits.vocab_size));
  RETURN_IF_ERROR(CheckTargets(*this, limits.vocab_size));
  for (const LogitBias& entry : bias()) {
    if (entry.token < 0 || entry.token >= limits.vocab_size || std::isnan(entry.bias) || entry.bias == HUGE_VALF) {
      return InvalidArgument("plan: bias {} on token {}, allowed: < inf on 0 to {}", entry.bias, entry.token,
                             limits.vocab_size - 1);
    }
  }
  for (const TokenHistory& entry : history()) {
    if (entry.token < 0 || entry.token >= limits.vocab_size || entry.output_count < 0) {
      return InvalidArgument("plan: history count {} of token {}, allowed: >= 0 of 0 to {}", entry.output_count,
                             entry.token, limits.vocab_size - 1);
    }
  }
  return absl::OkStatus();
}

}  // namespace soloist
