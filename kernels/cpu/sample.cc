// Sampling of one token per row; the order of work is in kernels/sampling.h. Per row: a few passes over the vocabulary;
// a sort of what survives only where top-k or top-p ask for it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"
#include "kernels/philox.h"

namespace soloist {
namespace {

constexpr float kBanned = -std::numeric_limits<float>::infinity();

// The lowest id among the largest.
int32_t ArgMax(const float* x, int64_t n) {
  const float best = Max(x, n);
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] == best) return static_cast<int32_t>(i);
  }
  return 0;  // all NaN
}

// The k most likely, ties by id.
void TopLogprobs(const float* logits, int64_t n, int k, float log_sum, int32_t* ids, float* logprobs) {
  std::fill_n(ids, kMaxTopLogprobs, -1);
  std::fill_n(logprobs, kMaxTopLogprobs, 0.0f);
  int found = 0;
  for (int64_t i = 0; i < n && k > 0; ++i) {
    if (found == k && !(logits[i] > logprobs[k - 1])) continue;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && logits[i] > logprobs[at - 1]; --at) {
      logprobs[at] = logprobs[at - 1];
      ids[at] = ids[at - 1];
    }
    logprobs[at] = logits[i];
    ids[at] = static_cast<int32_t>(i);
  }
  for (int i = 0; i < found; ++i) logprobs[i] -= log_sum;
}

void ApplyMask(const uint32_t* mask, float* logits, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += 32) {
    const uint32_t word = mask[begin / 32];
    if (word == ~0u) continue;
    const int64_t end = std::min<int64_t>(begin + 32, n);
    for (int64_t i = begin; i < end; ++i) {
      if ((word >> (i - begin) & 1u) == 0) logits[i] = kBanned;
    }
  }
}

void Penalize(const SampleArgs& args, int r, const SamplingRow& row, float* logits) {
  const int32_t end = args.params[r + 1].history_begin;
  const int32_t pending = row.pending_row >= 0 ? args.previous_tokens[row.pending_row] : -1;
  bool pending_seen = pending < 0;
  const auto apply = [&](int32_t token, int32_t count) {
    float& logit = logits[token];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    if (count > 0) logit -= row.presence_penalty + row.frequency_penalty * static_cast<float>(count);
  };
  for (int32_t i = row.history_begin; i < end; ++i) {
    const TokenHistory& entry = args.history[i];
    const bool is_pending = entry.token == pending;
    pending_seen |= is_pending;
    apply(entry.token, entry.output_count + (is_pending ? 1 : 0));
  }
  if (!pending_seen) apply(pending, 1);
}

// Bans what top-k, min-p and top-p leave out. logits are already divided by the temperature.
void Filter(const SamplingRow& row, float* logits, int64_t n) {
  if (row.top_k > 0 && row.top_k < n) {
    thread_local std::vector<float> sorted;
    sorted.assign(logits, logits + n);
    std::nth_element(sorted.begin(), sorted.begin() + row.top_k - 1, sorted.end(), std::greater<>());
    const float least = sorted[row.top_k - 1];
    for (int64_t i = 0; i < n; ++i) {
      if (logits[i] < least) logits[i] = kBanned;
    }
  }
  const float max = Max(logits, n);
  if (row.min_p > 0) {
    const float least = max + std::log(row.min_p);
    for (int64_t i = 0; i < n; ++i) {
      if (logits[i] < least) logits[i] = kBanned;
    }
  }
  if (row.top_p < 1) {
    thread_local std::vector<float> sorted;
    sorted.clear();
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (logits[i] == kBanned) continue;
      total += std::exp(static_cast<double>(logits[i]) - max);
      sorted.push_back(logits[i]);
    }
    // The head of the distribution is enough nearly always: sort growing prefixes.
    const double wanted = row.top_p * total;
    double mass = 0;
    float least = kBanned;
    size_t done = 0;
    for (size_t part = 64; done < sorted.size() && mass < wanted; part *= 8) {
      const size_t end = std::min(sorted.size(), done + part);
      std::partial_sort(sorted.begin() + done, sorted.begin() + end, sorted.end(), std::greater<>());
      for (; done < end && mass < wanted; ++done) {
        mass += std::exp(static_cast<double>(sorted[done]) - max);
        least = sorted[done];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      if (logits[i] < least) logits[i] = kBanned;
    }
  }
}

// argmax of logit + Gumbel noise: a draw from softmax(logits).
int32_t GumbelArgMax(const SamplingRow& row, const float* logits, int64_t n) {
  float best = kBanned;
  int32_t chosen = -1;
  for (int64_t block = 0; block * 4 < n; ++block) {
    const float* four = logits + block * 4;
    const int64_t count = std::min<int64_t>(4, n - block * 4);
    if (std::all_of(four, four + count, [](float x) { return x == kBanned; })) continue;
    const auto random = Philox4x32(
        {static_cast<uint32_t>(block), static_cast<uint32_t>(row.position), static_cast<uint32_t>(row.output_index), 0},
        {row.seed_low, row.seed_high});
    for (int64_t lane = 0; lane < count; ++lane) {
      const float value = four[lane] - std::log(-std::log(ToUnit(random[lane])));
      if (value > best) {
        best = value;
        chosen = static_cast<int32_t>(block * 4 + lane);
      }
    }
  }
  return chosen >= 0 ? chosen : ArgMax(logits, n);
}

void SampleRow(const SampleArgs& args, int r) {
  const SamplingRow& row = args.params[r];
  const int64_t n = args.logits.cols;
  float* logits = args.logits.row<float>(r);
  if (row.return_logits != 0) std::memcpy(args.raw_logits + r * n, logits, n * sizeof(float));
  const float max = Max(logits, n), log_sum = max + std::log(SumExp(logits, max, nullptr, n));
  TopLogprobs(logits, n, std::max(0, row.num_top_logprobs), log_sum, args.top_tokens + int64_t{r} * kMaxTopLogprobs,
              args.top_logprobs + int64_t{r} * kMaxTopLogprobs);
  if (const int32_t target = args.targets == nullptr ? -1 : args.targets[r]; target >= 0) {
    args.tokens[r] = target;
    args.logprobs[r] = logits[target] - log_sum;
    return;
  }

  const int32_t bias_end = args.params[r + 1].bias_begin;
  const bool penalties = row.repetition_penalty != 1 || row.presence_penalty != 0 || row.frequency_penalty != 0;
  // The chosen token's raw logit is needed after the row has been changed.
  thread_local std::vector<float> raw;
  raw.assign(logits, logits + n);
  if (const int32_t mask = args.mask_of_row == nullptr ? -1 : args.mask_of_row[r]; mask >= 0) {
    ApplyMask(reinterpret_cast<const uint32_t*>(args.masks) + mask * TokenMaskWords(n), logits, n);
  }
  if (penalties) Penalize(args, r, row, logits);
  for (int32_t i = row.bias_begin; i < bias_end; ++i) logits[args.bias[i].token] += args.bias[i].bias;
  int32_t token;
  if (row.temperature == 0) {
    token = ArgMax(logits, n);
  } else {
    Scale(1.0f / row.temperature, logits, n);
    Filter(row, logits, n);
    token = GumbelArgMax(row, logits, n);
  }
  args.tokens[r] = token;
  args.logprobs[r] = raw[token] - log_sum;
}

}  // namespace

void CpuSample(const SampleArgs& args, ThreadPool& pool) {
  pool.ParallelFor(args.logits.rows, [&](int64_t r) { SampleRow(args, static_cast<int>(r)); });
}

}  // namespace soloist
