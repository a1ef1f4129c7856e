#include "server/load_report.h"

#include "nlohmann/json.hpp"
#include "server/version.h"

namespace soloist {
namespace {

using Json = nlohmann::ordered_json;

Json ToJson(const Histogram& histogram) {
  const Histogram::Snapshot snapshot = histogram.Take();
  return {{"bounds", std::vector<double>(snapshot.bounds.begin(), snapshot.bounds.end())}, {"counts", snapshot.counts}};
}

void AddLoad(const LoadSnapshot& load, const EngineInfo& info, Json& report) {
  report["device"] = info.device;
  report["num_ranks"] = info.num_ranks;
  report["running_requests"] = load.running_requests;
  report["waiting_requests"] = load.waiting_requests;
  report["steps"] = load.steps;
  report["prompt_tokens"] = load.prompt_tokens;
  report["generated_tokens"] = load.generated_tokens;
  report["preemptions"] = load.preemptions;
  report["recoveries"] = load.recoveries;
  report["replays"] = load.replays;
  Json& homes = report["homes"] = Json::array();
  for (const LoadSnapshot::Home& home : load.homes) {
    homes.push_back({{"running", home.running_sequences},
                     {"waiting", home.waiting_sequences},
                     {"total_blocks", home.total_blocks},
                     {"used_blocks", home.used_blocks}});
  }
  report["num_layers"] = info.num_layers;
  report["num_experts"] = info.num_experts;
  report["expert_rank"] = info.expert_rank;
  report["expert_tokens"] = load.expert_tokens;
}

}  // namespace

const char* ServerStateName(ServerState state) {
  switch (state) {
    case ServerState::kStarting:
      return "starting";
    case ServerState::kReady:
      return "ready";
    case ServerState::kDegraded:
      return "degraded";
    case ServerState::kDraining:
      return "draining";
    case ServerState::kNotReady:
      break;
  }
  return "not_ready";
}

std::string LoadReport(const Frontend& frontend) {
  const HealthReport health = frontend.Health();
  Json report{{"model", frontend.model().name}, {"version", kVersion}, {"state", ServerStateName(health.state)}};
  Json& checks = report["checks"] = Json::array();
  for (const HealthReport::Check& check : health.checks) {
    checks.push_back({{"name", check.name}, {"ok", check.ok}, {"message", check.message}});
  }
  report["unix_ms"] = frontend.UnixNs(frontend.clock().NowNs()) / 1'000'000;
  report["open_streams"] = frontend.open_streams();
  const RequestMetrics& metrics = frontend.request_metrics();
  report["latency"] = {{"ttft", ToJson(metrics.time_to_first_token)}, {"itl", ToJson(metrics.inter_token_latency)}};
  if (const StepLoop* loop = frontend.loop()) AddLoad(loop->Load(), frontend.engine()->Info(), report);
  return report.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace soloist
