#include "engine/dispatch_room.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <system_error>

#include "base/status.h"

namespace soloist {
namespace {

constexpr int64_t kStep = 8;  // products work in tiles of so many rows

int64_t RoundUp(double rows) { return static_cast<int64_t>(std::ceil(rows / kStep)) * kStep; }

// A quarter more than was seen, since the next step is another.
int64_t WithMargin(int64_t most_rows) { return RoundUp(static_cast<double>(most_rows) * 1.25); }

}  // namespace

absl::StatusOr<DispatchRoomOptions> ParseDispatchRoom(std::string_view text) {
  DispatchRoomOptions options;
  if (text == "auto") return options;
  if (text == "worst") {
    options.kind = DispatchRoomOptions::Kind::kWorst;
    return options;
  }
  options.kind = DispatchRoomOptions::Kind::kFixed;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), options.rows);
  if (error != std::errc() || end != text.data() + text.size() || options.rows < 1) {
    return InvalidArgument("dispatch capacity is '{}', allowed: auto, worst, a number of rows >= 1", text);
  }
  return options;
}

DispatchRoom::DispatchRoom(const DispatchRoomOptions& options, const EngineInfo& info)
    : options_(options), exchanges_(info.num_ranks > 1) {
  // The choices of one expert by n tokens are about binomial.
  const double p = static_cast<double>(info.experts_per_token) / info.num_experts;
  const int64_t largest = std::min<int64_t>(options.masked_max_tokens, info.limits.max_tokens);
  for (int64_t tokens = kFewTokens; tokens < largest + kFewTokens; tokens += kFewTokens) {
    const double n = static_cast<double>(tokens);
    classes_.push_back({.rows = RoundUp(n * p + 4 * std::sqrt(n * p * (1 - p)))});
  }
}

bool DispatchRoom::Observes(int32_t max_home_tokens) const {
  return options_.kind == DispatchRoomOptions::Kind::kAuto && exchanges_ && max_home_tokens > kFewTokens &&
         max_home_tokens <= options_.masked_max_tokens;
}

int32_t DispatchRoom::Choose(int32_t max_home_tokens) const {
  if (!exchanges_ || max_home_tokens > options_.masked_max_tokens) return 0;
  int64_t rows = 0;
  if (options_.kind == DispatchRoomOptions::Kind::kFixed) rows = options_.rows;
  if (Observes(max_home_tokens)) rows = ClassOf(max_home_tokens).rows;
  return rows < max_home_tokens ? static_cast<int32_t>(rows) : 0;
}

void DispatchRoom::Observe(int32_t max_home_tokens, int64_t most_rows, bool overflowed) {
  if (!Observes(max_home_tokens)) return;
  Class& c = classes_[(max_home_tokens - 1) / kFewTokens];
  if (overflowed) {
    c = {.rows = std::max(c.rows, WithMargin(most_rows))};
    return;
  }
  c.most = std::max(c.most, most_rows);
  if (++c.steps < kWindow) return;
  if (WithMargin(c.most) < c.rows) c.rows -= kStep;
  c.most = 0;
  c.steps = 0;
}

}  // namespace soloist
