// A load test's results as text, JSON and CSV.
#ifndef SOLOIST_CLI_LOADTEST_REPORT_H_
#define SOLOIST_CLI_LOADTEST_REPORT_H_

#include <cstdint>
#include <span>
#include <string>

#include "cli/loadtest/metrics.h"
#include "nlohmann/json.hpp"

namespace soloist::cli {

struct NamedDistribution {
  const char* name;
  Distribution Summary::* value;
};
inline constexpr NamedDistribution kDistributions[] = {{"ttft_ms", &Summary::ttft_ms},
                                                       {"tpot_ms", &Summary::tpot_ms},
                                                       {"itl_ms", &Summary::itl_ms},
                                                       {"chunk_gap_ms", &Summary::chunk_gap_ms},
                                                       {"latency_ms", &Summary::latency_ms},
                                                       {"engine_queue_ms", &Summary::engine_queue_ms},
                                                       {"engine_ttft_ms", &Summary::engine_ttft_ms},
                                                       {"network_ttft_ms", &Summary::network_ttft_ms},
                                                       {"client_lag_ms", &Summary::lag_ms}};

std::string SummaryToText(const Summary& summary, const Goodput& goodput);
nlohmann::ordered_json SummaryToJson(const Summary& summary, const Goodput& goodput);
// `origin_ns`: what intended_ms counts from.
nlohmann::ordered_json RequestToJson(const RequestRecord& record, int64_t origin_ns);
// A header line, then one line per request with RequestToJson's fields.
std::string RequestsToCsv(std::span<const RequestRecord> records, int64_t origin_ns);
// This machine: host name, kernel, processor, hardware threads, load average.
nlohmann::ordered_json MachineToJson();

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_REPORT_H_
