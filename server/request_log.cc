#include "server/request_log.h"

#include <algorithm>
#include <cmath>

#include "nlohmann/json.hpp"

namespace soloist {
namespace {

bool IsLowerHex(std::string_view text) {
  return std::ranges::all_of(text, [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

bool IsZero(std::string_view text) {
  return std::ranges::all_of(text, [](char c) { return c == '0'; });
}

}  // namespace

std::optional<TraceParent> ParseTraceParent(std::string_view header) {
  // version "-" trace-id "-" parent-id "-" flags; later versions may append more.
  if (header.size() < 55 || header[2] != '-' || header[35] != '-' || header[52] != '-') return std::nullopt;
  const std::string_view version = header.substr(0, 2), flags = header.substr(53, 2);
  const TraceParent parts{.trace_id = header.substr(3, 32),
                          .parent_id = header.substr(36, 16),
                          .sampled = (flags[1] >= 'a' ? flags[1] - 'a' + 10 : flags[1] - '0') % 2 == 1};
  if (!IsLowerHex(version) || !IsLowerHex(parts.trace_id) || !IsLowerHex(parts.parent_id) || !IsLowerHex(flags)) {
    return std::nullopt;
  }
  if (version == "ff" || IsZero(parts.trace_id) || IsZero(parts.parent_id)) return std::nullopt;
  if (version == "00" ? header.size() != 55 : header.size() > 55 && header[55] != '-') return std::nullopt;
  return parts;
}

std::string RequestLogLine(const OutputStream& stream, std::string_view trace_parent) {
  nlohmann::ordered_json line;
  line["request_id"] = stream.options().request_id;
  if (const auto trace = ParseTraceParent(trace_parent)) {
    line["trace_id"] = trace->trace_id;
    line["parent_id"] = trace->parent_id;
  }
  const RequestEnd& totals = stream.totals();
  line["prompt_tokens"] = totals.prompt_tokens;
  line["cached_prompt_tokens"] = totals.cached_prompt_tokens;
  int32_t output_tokens = 0;
  auto finish = nlohmann::ordered_json::array();
  std::string error;
  for (const OutputEnd& end : stream.ends()) {
    output_tokens += end.output_tokens;
    finish.push_back(end.reason == FinishReason::kNone ? "open" : FinishReasonName(end.reason));
    if (error.empty() && !end.error.ok()) error = std::string(end.error.message());
  }
  line["output_tokens"] = output_tokens;
  line["preemptions"] = totals.preemptions;
  line["finish"] = std::move(finish);
  const auto since_received = [&](const char* name, int64_t ns) {
    if (ns == 0) return;
    // Microseconds are enough, and short.
    line[name] = std::round(static_cast<double>(ns - stream.options().received_ns) * 1e-3) * 1e-3;
  };
  since_received("queue_ms", totals.times.first_scheduled_ns);
  since_received("ttft_ms", totals.times.first_token_ns);
  since_received("e2e_ms", totals.times.last_token_ns);
  if (!error.empty()) line["error"] = error;
  return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace soloist
