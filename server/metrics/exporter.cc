#include "server/metrics/exporter.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "prometheus/metric_family.h"
#include "prometheus/text_serializer.h"
#include "server/load_report.h"
#include "server/metrics/process_stats.h"
#include "server/version.h"

namespace soloist {
namespace {

using Labels = std::vector<std::pair<const char*, std::string>>;
using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

double Seconds(int64_t ns) { return static_cast<double>(ns) * 1e-9; }

// Collects families; every series carries the model's name, as vLLM's do.
class Families {
 public:
  explicit Families(std::string model_name) : model_name_(std::move(model_name)) {}

  void Begin(const char* name, const char* help, MetricType type) {
    families_.push_back({.name = fmt::format("soloist:{}", name), .help = help, .type = type, .metric = {}});
  }
  void Gauge(double value, const Labels& labels = {}) { Add(labels).gauge.value = value; }
  void Counter(double value, const Labels& labels = {}) { Add(labels).counter.value = value; }
  void Count(const Histogram& from) {
    const Histogram::Snapshot snapshot = from.Take();
    ClientMetric::Histogram& to = Add({}).histogram;
    for (size_t i = 0; i < snapshot.counts.size(); ++i) {
      to.sample_count += static_cast<uint64_t>(snapshot.counts[i]);
      to.bucket.push_back(
          {to.sample_count, i < snapshot.bounds.size() ? snapshot.bounds[i] : std::numeric_limits<double>::infinity()});
    }
    to.sample_sum = snapshot.sum;
  }

  // Families of one series each.
  void Gauge(const char* name, const char* help, double value) {
    Begin(name, help, MetricType::Gauge);
    Gauge(value);
  }
  void Counter(const char* name, const char* help, double value) {
    Begin(name, help, MetricType::Counter);
    Counter(value);
  }
  void Count(const char* name, const char* help, const Histogram& from) {
    Begin(name, help, MetricType::Histogram);
    Count(from);
  }

  const std::vector<MetricFamily>& families() const { return families_; }

 private:
  ClientMetric& Add(const Labels& labels) {
    ClientMetric& metric = families_.back().metric.emplace_back();
    metric.label.push_back({"model_name", model_name_});
    for (const auto& [name, value] : labels) metric.label.push_back({name, value});
    return metric;
  }

  const std::string model_name_;
  std::vector<MetricFamily> families_;
};

void AddRequests(const RequestMetrics& m, Families& out) {
  out.Count("time_to_first_token_seconds", "From receiving a request to its first token.", m.time_to_first_token);
  out.Count("inter_token_latency_seconds", "Between two tokens of an output.", m.inter_token_latency);
  out.Count("request_time_per_output_token_seconds", "Of a finished output: (last - first token) / (tokens - 1).",
            m.time_per_output_token);
  out.Count("e2e_request_latency_seconds", "Of a finished output: from receiving the request to the last token.",
            m.e2e_latency);
  out.Count("request_queue_time_seconds", "Of a finished output: until it was first scheduled.", m.queue_time);
  out.Count("request_prefill_time_seconds", "Of a finished output: from being scheduled to its first token.",
            m.prefill_time);
  out.Count("request_decode_time_seconds", "Of a finished output: from its first to its last token.", m.decode_time);
  out.Count("request_prompt_tokens", "Prompt tokens of finished outputs.", m.prompt_tokens);
  out.Count("request_generation_tokens", "Tokens of finished outputs.", m.generation_tokens);
  // vLLM's words: a client that went away is an abort.
  out.Begin("request_success_total", "Outputs that have ended, by reason.", MetricType::Counter);
  for (const auto& [reason, name] :
       {std::pair(FinishReason::kStop, "stop"), std::pair(FinishReason::kLength, "length"),
        std::pair(FinishReason::kCancelled, "abort"), std::pair(FinishReason::kError, "error")}) {
    out.Counter(static_cast<double>(m.ended[static_cast<size_t>(reason)]), {{"finished_reason", name}});
  }
  out.Begin("requests_refused_total", "Requests that were not accepted, by status code.", MetricType::Counter);
  for (size_t code = 1; code < m.refused.size(); ++code) {
    out.Counter(static_cast<double>(m.refused[code]),
                {{"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(code))}});
  }
}

double Used(const LoadSnapshot::Home& home) {
  return home.total_blocks == 0 ? 0 : static_cast<double>(home.used_blocks) / home.total_blocks;
}

void AddLoad(const LoadSnapshot& load, Families& out) {
  out.Gauge("num_requests_running", "Requests that hold KV blocks.", load.running_requests);
  out.Gauge("num_requests_waiting", "Requests in the queue.", load.waiting_requests);
  double total = 0, used = 0;
  for (const LoadSnapshot::Home& home : load.homes) total += home.total_blocks, used += home.used_blocks;
  out.Gauge("kv_cache_usage_perc", "Share of all KV blocks that sequences hold, 0 to 1.",
            total == 0 ? 0 : used / total);
  const auto counter = [&out](const char* name, const char* help, int64_t value) {
    out.Counter(name, help, static_cast<double>(value));
  };
  counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", load.prefix_cache_queries);
  counter("prefix_cache_hits_total", "Prompt tokens found there.", load.prefix_cache_hits);
  counter("num_preemptions_total", "Sequences that gave their KV blocks back and started again.", load.preemptions);
  counter("prompt_tokens_total", "Prompt tokens, computed or cached.", load.prompt_tokens);
  counter("generation_tokens_total", "Tokens generated.", load.generated_tokens);
  counter("steps_total", "Steps of the engine.", load.steps);
  counter("replays_total", "Steps run in vain, for want of dispatch room.", load.replays);
  counter("recoveries_total", "Recoveries from lost ranks.", load.recoveries);
  counter("requeued_sequences_total", "Running sequences whose KV cache was lost with their home.",
          load.requeued_sequences);
  out.Counter("scheduler_seconds_total", "Time spent planning and committing steps.", Seconds(load.schedule_ns));
  out.Begin("home_running_sequences", "Sequences that run on a home rank.", MetricType::Gauge);
  for (size_t h = 0; h < load.homes.size(); ++h) {
    out.Gauge(load.homes[h].running_sequences, {{"rank", std::to_string(h)}});
  }
  out.Begin("home_waiting_sequences", "Sequences that wait for their home rank.", MetricType::Gauge);
  for (size_t h = 0; h < load.homes.size(); ++h) {
    out.Gauge(load.homes[h].waiting_sequences, {{"rank", std::to_string(h)}});
  }
  out.Begin("home_kv_cache_usage_perc", "Share of a home rank's KV blocks that sequences hold, 0 to 1.",
            MetricType::Gauge);
  for (size_t h = 0; h < load.homes.size(); ++h) out.Gauge(Used(load.homes[h]), {{"rank", std::to_string(h)}});
}

void AddRanks(const LoadSnapshot& load, const std::vector<RankStatus>& ranks, int64_t now_ns, Families& out) {
  out.Begin("rank_up", "1: the rank is ready.", MetricType::Gauge);
  for (const RankStatus& rank : ranks) {
    out.Gauge(rank.state == RankState::kReady ? 1 : 0, {{"rank", std::to_string(rank.rank)}});
  }
  out.Begin("rank_busy_seconds", "How long the rank's step in work has been running; 0: idle.", MetricType::Gauge);
  for (const RankStatus& rank : ranks) {
    out.Gauge(rank.busy_since_ns == 0 ? 0 : Seconds(std::max<int64_t>(0, now_ns - rank.busy_since_ns)),
              {{"rank", std::to_string(rank.rank)}});
  }
  const auto times = [&](const char* name, const char* help, auto get) {
    out.Begin(name, help, MetricType::Counter);
    for (size_t r = 0; r < load.times.size(); ++r) {
      out.Counter(Seconds(get(load.times[r])), {{"rank", std::to_string(r)}});
    }
  };
  times("rank_step_seconds_total", "Device time of the rank's steps.", [](const auto& t) { return t.device_ns; });
  times("rank_idle_seconds_total", "Time between two steps in which the rank's device had nothing to do.",
        [](const auto& t) { return t.idle_ns; });
  times("rank_enqueue_seconds_total", "Time of the rank's thread to enqueue its steps.",
        [](const auto& t) { return t.enqueue_ns; });
  times("rank_comm_seconds_total", "Time in the rank's collectives; on GPUs in steps of two micro-batches only.",
        [](const auto& t) { return t.comm_ns; });
  times("rank_comm_wait_seconds_total", "Of it, the time in which the rank's computation waited.",
        [](const auto& t) { return t.comm_wait_ns; });
  out.Begin("rank_profiled_steps_total", "Steps whose op groups were timed (--profile-every).", MetricType::Counter);
  for (size_t r = 0; r < load.times.size(); ++r) {
    const auto& profile = load.times[r].profile;
    out.Counter(profile == nullptr ? 0 : static_cast<double>(profile->steps), {{"rank", std::to_string(r)}});
  }
  out.Begin("rank_group_seconds_total",
            "Device time of an op group over the profiled steps; dispatch and combine: the wait for other ranks too.",
            MetricType::Counter);
  for (size_t r = 0; r < load.times.size(); ++r) {
    if (load.times[r].profile == nullptr) continue;
    for (const GroupTime& time : load.times[r].profile->groups) {
      out.Counter(Seconds(time.ns), {{"rank", std::to_string(r)}, {"group", time.group}});
    }
  }
}

// Most tokens of an expert over the mean; 1: even, 0: none yet.
double Imbalance(const std::vector<int64_t>& tokens) {
  int64_t sum = 0, most = 0;
  for (const int64_t t : tokens) sum += t, most = std::max(most, t);
  return sum == 0 ? 0 : static_cast<double>(most) * static_cast<double>(tokens.size()) / static_cast<double>(sum);
}

void AddExperts(const LoadSnapshot& load, const EngineInfo& info, bool per_layer, Families& out) {
  const auto of_layer = [&](int layer) {
    const auto from = load.expert_tokens.begin() + static_cast<ptrdiff_t>(layer) * info.num_experts;
    return std::vector<int64_t>(from, from + info.num_experts);
  };
  out.Begin("expert_tokens_total", "Tokens routed to an expert.", MetricType::Counter);
  std::vector<int64_t> sum(info.num_experts);
  for (int l = 0; l < info.num_layers; ++l) {
    const std::vector<int64_t> tokens = of_layer(l);
    for (int e = 0; e < info.num_experts; ++e) {
      sum[e] += tokens[e];
      if (!per_layer) continue;
      out.Counter(static_cast<double>(tokens[e]), {{"layer", std::to_string(l)}, {"expert", std::to_string(e)}});
    }
  }
  for (int e = 0; e < info.num_experts && !per_layer; ++e) {
    out.Counter(static_cast<double>(sum[e]), {{"expert", std::to_string(e)}});
  }
  // Not a label of the tokens: an expert changes its rank when ranks are lost, and its count goes on.
  out.Begin("expert_rank", "Rank that has the expert.", MetricType::Gauge);
  for (int e = 0; e < info.num_experts; ++e) out.Gauge(info.expert_rank[e], {{"expert", std::to_string(e)}});
  out.Begin(
      "expert_imbalance_ratio",
      "Most tokens of an expert over the experts' mean, since start; without --metrics-per-layer, of the worst layer.",
      MetricType::Gauge);
  double worst = 0;
  for (int l = 0; l < info.num_layers; ++l) {
    const double imbalance = Imbalance(of_layer(l));
    worst = std::max(worst, imbalance);
    if (per_layer) out.Gauge(imbalance, {{"layer", std::to_string(l)}});
  }
  if (!per_layer) out.Gauge(worst);
}

void AddProcess(const Frontend& frontend, Families& out) {
  const ProcessStats stats = ReadProcessStats();
  out.Begin("build_info", "Constant 1; the version is a label.", MetricType::Gauge);
  out.Gauge(1, {{"version", kVersion}});
  out.Gauge("process_start_time_seconds", "Since the Unix epoch.", Seconds(frontend.start_unix_ns()));
  out.Counter("process_cpu_seconds_total", "User and system time of this process.", stats.cpu_s);
  out.Gauge("process_resident_memory_bytes", "Resident memory of this process.",
            static_cast<double>(stats.resident_bytes));
  out.Gauge("process_open_fds", "Open file descriptors of this process.", static_cast<double>(stats.open_files));
}

}  // namespace

std::string PrometheusText(const Frontend& frontend, const ExporterOptions& options) {
  Families out(frontend.model().name);
  AddRequests(frontend.request_metrics(), out);
  out.Gauge("open_streams", "Requests whose answers are not yet sent and read.", frontend.open_streams());
  AddProcess(frontend, out);
  const HealthReport health = frontend.Health();
  out.Begin("state", "1 for the state that the server is in.", MetricType::Gauge);
  for (const ServerState state : {ServerState::kStarting, ServerState::kReady, ServerState::kDegraded,
                                  ServerState::kDraining, ServerState::kNotReady}) {
    out.Gauge(health.state == state ? 1 : 0, {{"state", ServerStateName(state)}});
  }
  if (const StepLoop* loop = frontend.loop()) {
    const LoadSnapshot load = loop->Load();
    AddLoad(load, out);
    AddRanks(load, frontend.engine()->Ranks(), frontend.clock().NowNs(), out);
    AddExperts(load, frontend.engine()->Info(), options.per_layer, out);
  }
  return prometheus::TextSerializer().Serialize(out.families());
}

}  // namespace soloist
