#include "cli/loadtest/metrics.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "cli/loadtest/live.h"

namespace soloist::cli {
namespace {

constexpr int kResamples = 2000;

double Ms(int64_t ns) { return static_cast<double>(ns) * 1e-6; }

double Mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double ResampledMean(std::span<const double> values, std::mt19937_64& random) {
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) sum += values[random() % values.size()];
  return sum / static_cast<double>(values.size());
}

}  // namespace

const char* NameOf(TokenSource source) {
  switch (source) {
    case TokenSource::kTokenIds:
      return "token_ids";
    case TokenSource::kUsagePerChunk:
      return "usage_per_chunk";
    case TokenSource::kUsageAtEnd:
      return "usage_at_end";
    case TokenSource::kNone:
      break;
  }
  return "none";
}

void RequestRecord::AddChunk(int64_t now_ns, int tokens) {
  if (live != nullptr) {
    if (chunks.empty()) {
      live->FirstToken(now_ns - intended_ns);
    } else {
      live->Gap(now_ns - chunks.back().ns);
    }
    live->Tokens(tokens);
  }
  chunks.push_back({now_ns, tokens});
  output_tokens += tokens;
}

std::optional<double> TtftMs(const RequestRecord& record) {
  if (record.chunks.empty()) return std::nullopt;
  return Ms(record.chunks.front().ns - record.intended_ns);
}

std::optional<double> TpotMs(const RequestRecord& record) {
  if (record.output_tokens < 2 || record.chunks.empty()) return std::nullopt;
  return Ms(record.chunks.back().ns - record.chunks.front().ns) / (record.output_tokens - 1);
}

void AppendItlMs(const RequestRecord& record, std::vector<double>& out) {
  for (size_t i = 0; i < record.chunks.size(); ++i) {
    const int tokens = record.chunks[i].tokens;
    if (tokens == 0) continue;
    if (i > 0) out.push_back(Ms(record.chunks[i].ns - record.chunks[i - 1].ns));
    out.insert(out.end(), static_cast<size_t>(tokens) - 1, 0.0);
  }
}

double LatencyMs(const RequestRecord& record) { return Ms(record.end_ns - record.intended_ns); }

Distribution Distribute(std::vector<double> values) {
  Distribution out;
  if (values.empty()) return out;
  std::ranges::sort(values);
  // 1e-9: 0.9 * 10 must be rank 9, whatever its last bit.
  const auto quantile = [&](double q) {
    const double rank = std::ceil(q * static_cast<double>(values.size()) - 1e-9);
    return values[static_cast<size_t>(std::max(rank, 1.0)) - 1];
  };
  out.count = values.size();
  out.mean = Mean(values);
  out.median = quantile(0.5);
  out.p90 = quantile(0.9);
  out.p99 = quantile(0.99);
  out.p999 = quantile(0.999);
  out.max = values.back();
  return out;
}

absl::StatusOr<Goodput> ParseGoodput(std::string_view text) {
  Goodput out;
  if (text.empty()) return out;
  for (const auto part : absl::StrSplit(absl::string_view(text.data(), text.size()), ',')) {
    const std::vector<std::string> pair = absl::StrSplit(part, ':');
    double ms = 0;
    if (pair.size() != 2 || !absl::SimpleAtod(pair[1], &ms) || !(ms > 0)) {
      return InvalidArgument("--goodput: '{}' is not NAME:MILLISECONDS with NAME ttft, tpot or e2e", part);
    }
    if (pair[0] == "ttft") {
      out.ttft_ms = ms;
    } else if (pair[0] == "tpot") {
      out.tpot_ms = ms;
    } else if (pair[0] == "e2e") {
      out.latency_ms = ms;
    } else {
      return InvalidArgument("--goodput: '{}' is not ttft, tpot or e2e", pair[0]);
    }
  }
  return out;
}

bool Meets(const RequestRecord& record, const Goodput& objectives) {
  if (!record.ok()) return false;
  if (objectives.ttft_ms && TtftMs(record).value_or(HUGE_VAL) > *objectives.ttft_ms) return false;
  if (objectives.tpot_ms && TpotMs(record).value_or(0) > *objectives.tpot_ms) return false;
  return !objectives.latency_ms || LatencyMs(record) <= *objectives.latency_ms;
}

Summary Summarize(std::span<const RequestRecord> records, const Goodput& objectives) {
  Summary out;
  if (records.empty()) return out;
  std::vector<double> ttft, tpot, itl, gaps, latency, queue, engine_ttft, network, lag;
  int64_t first_ns = records.front().intended_ns, last_ns = records.front().end_ns;
  int ok = 0, good = 0;
  for (const RequestRecord& r : records) {
    ++out.outcomes[r.outcome];
    first_ns = std::min(first_ns, r.intended_ns);
    last_ns = std::max(last_ns, r.end_ns);
    lag.push_back(Ms(r.sent_ns - r.intended_ns));
    out.received_tokens += r.output_tokens;
    if (!r.ok()) continue;
    ++ok;
    ++out.token_sources[NameOf(r.token_source)];
    good += Meets(r, objectives) ? 1 : 0;
    out.prompt_tokens += r.prompt_tokens;
    out.output_tokens += r.output_tokens;
    latency.push_back(LatencyMs(r));
    if (const auto ms = TtftMs(r)) ttft.push_back(*ms);
    if (const auto ms = TpotMs(r)) tpot.push_back(*ms);
    for (size_t i = 1; i < r.chunks.size(); ++i) gaps.push_back(Ms(r.chunks[i].ns - r.chunks[i - 1].ns));
    AppendItlMs(r, itl);
    if (r.engine_queue_ns) queue.push_back(Ms(*r.engine_queue_ns));
    if (r.engine_ttft_ns && !r.chunks.empty()) {
      engine_ttft.push_back(Ms(*r.engine_ttft_ns));
      network.push_back(Ms(r.chunks.front().ns - r.sent_ns - *r.engine_ttft_ns));
    }
  }
  out.wall_s = std::max(Ms(last_ns - first_ns) * 1e-3, 1e-9);
  out.requests_per_s = ok / out.wall_s;
  out.goodput_per_s = good / out.wall_s;
  const auto cancelled = out.outcomes.find("cancelled");
  const auto asked = static_cast<double>(records.size()) - (cancelled == out.outcomes.end() ? 0 : cancelled->second);
  out.goodput_share = asked > 0 ? good / asked : 0;
  out.output_tokens_per_s = static_cast<double>(out.output_tokens) / out.wall_s;
  out.total_tokens_per_s = static_cast<double>(out.prompt_tokens + out.output_tokens) / out.wall_s;
  out.ttft_ms = Distribute(std::move(ttft));
  out.tpot_ms = Distribute(std::move(tpot));
  out.itl_ms = Distribute(std::move(itl));
  out.chunk_gap_ms = Distribute(std::move(gaps));
  out.latency_ms = Distribute(std::move(latency));
  out.engine_queue_ms = Distribute(std::move(queue));
  out.engine_ttft_ms = Distribute(std::move(engine_ttft));
  out.network_ttft_ms = Distribute(std::move(network));
  out.lag_ms = Distribute(std::move(lag));
  return out;
}

Ratio CompareMeans(std::span<const double> a, std::span<const double> b, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<double> ratios(kResamples);
  for (double& ratio : ratios) {
    const double mean_b = ResampledMean(b, random);
    ratio = mean_b / ResampledMean(a, random);
  }
  std::ranges::sort(ratios);
  return {
      .ratio = Mean(b) / Mean(a), .low = ratios[kResamples * 25 / 1000], .high = ratios[kResamples * 975 / 1000 - 1]};
}

}  // namespace soloist::cli
