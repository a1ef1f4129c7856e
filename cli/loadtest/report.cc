#include "cli/loadtest/report.h"

#include <sys/utsname.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <optional>
#include <thread>

#include "fmt/format.h"

namespace soloist::cli {
namespace {

using Json = nlohmann::ordered_json;

Json OrNull(const std::optional<double>& value) { return value ? Json(*value) : Json(nullptr); }

double Ms(int64_t ns) { return static_cast<double>(ns) * 1e-6; }

std::string CsvField(const Json& value) {
  if (value.is_null()) return "";
  if (!value.is_string()) return value.dump();
  const auto text = value.get<std::string>();
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + '"';
}

}  // namespace

std::string SummaryToText(const Summary& s, const Goodput& goodput) {
  std::string out = fmt::format("{:.2f} s, requests:", s.wall_s);
  for (const auto& [outcome, count] : s.outcomes) out += fmt::format(" {} {}", count, outcome);
  out += fmt::format("\n{:.2f} ok requests/s   output {:.1f} tokens/s   total (prompt + output) {:.1f} tokens/s\n",
                     s.requests_per_s, s.output_tokens_per_s, s.total_tokens_per_s);
  if (goodput.stated()) {
    out += fmt::format("goodput {:.2f} requests/s ({:.1f}% of requests)\n", s.goodput_per_s, 100 * s.goodput_share);
  }
  if (!s.token_sources.empty()) {
    out += "output tokens counted by:";
    for (const auto& [source, count] : s.token_sources) out += fmt::format(" {} ({} requests)", source, count);
    out += '\n';
  }
  out += fmt::format("{:<16} {:>8} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}\n", "", "count", "mean", "median", "p90",
                     "p99", "p99.9", "max");
  for (const auto& [name, value] : kDistributions) {
    const Distribution& d = s.*value;
    if (d.count == 0) continue;
    out += fmt::format("{:<16} {:>8} {:>10.3f} {:>10.3f} {:>10.3f} {:>10.3f} {:>10.3f} {:>10.3f}\n", name, d.count,
                       d.mean, d.median, d.p90, d.p99, d.p999, d.max);
  }
  return out;
}

Json SummaryToJson(const Summary& s, const Goodput& goodput) {
  Json out = {{"wall_s", s.wall_s},
              {"outcomes", s.outcomes},
              {"token_sources", s.token_sources},
              {"prompt_tokens", s.prompt_tokens},
              {"output_tokens", s.output_tokens},
              {"received_tokens", s.received_tokens},
              {"requests_per_s", s.requests_per_s},
              {"output_tokens_per_s", s.output_tokens_per_s},
              {"total_tokens_per_s", s.total_tokens_per_s}};
  if (goodput.stated()) {
    out["goodput_requests_per_s"] = s.goodput_per_s;
    out["goodput_share"] = s.goodput_share;
  }
  for (const auto& [name, value] : kDistributions) {
    const Distribution& d = s.*value;
    out[name] = {{"count", d.count}, {"mean", d.mean}, {"median", d.median}, {"p90", d.p90},
                 {"p99", d.p99},     {"p999", d.p999}, {"max", d.max}};
  }
  return out;
}

Json RequestToJson(const RequestRecord& r, int64_t origin_ns) {
  return {{"outcome", r.outcome},
          {"intended_ms", Ms(r.intended_ns - origin_ns)},
          {"lag_ms", Ms(r.sent_ns - r.intended_ns)},
          {"prompt_tokens", r.prompt_tokens},
          {"output_tokens", r.output_tokens},
          {"ttft_ms", OrNull(TtftMs(r))},
          {"tpot_ms", OrNull(TpotMs(r))},
          {"latency_ms", LatencyMs(r)}};
}

std::string RequestsToCsv(std::span<const RequestRecord> records, int64_t origin_ns) {
  std::string out;
  const Json header = RequestToJson({}, 0);
  for (const auto& [name, value] : header.items()) out += (out.empty() ? "" : ",") + name;
  out += '\n';
  for (const RequestRecord& record : records) {
    const Json request = RequestToJson(record, origin_ns);
    std::string separator;
    for (const Json& value : request) {
      out += separator + CsvField(value);
      separator = ",";
    }
    out += '\n';
  }
  return out;
}

Json MachineToJson() {
  utsname name{};
  uname(&name);
  std::string processor;
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; processor.empty() && std::getline(cpuinfo, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) processor = line.substr(colon + 2);
  }
  double load[3] = {};
  if (getloadavg(load, 3) < 1) load[0] = -1;
  return {{"host", name.nodename},
          {"kernel", std::string(name.sysname) + " " + name.release},
          {"processor", processor},
          {"threads", std::thread::hardware_concurrency()},
          {"load_average_1min", load[0]}};
}

}  // namespace soloist::cli
