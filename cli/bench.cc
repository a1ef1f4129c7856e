// soloist bench engine: the engine without a network. Prefill and decode rates, TPOT, bytes and FLOPs per step, and the
// share of what this machine's memory and multipliers reach in the same run.
#include <sys/resource.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "cli/bench_serve.h"
#include "cli/flags.h"
#include "cli/step_recorder.h"
#include "engine/model/config.h"
#include "kernels/device.h"
#include "nlohmann/json.hpp"

namespace soloist::cli {
namespace {

using Json = nlohmann::ordered_json;

struct BenchFlags {
  EngineFlags runtime;
  std::vector<int> prompt_lengths = {128};
  std::vector<int> batches = {1};
  int output_length = 64;
  int repeat = 3;
  std::string slice;
  bool json = false;
};

// Times of one request's tokens.
class TimingSink final : public TokenSink {
 public:
  bool OnToken(TokenEvent) override {
    times_ns_.push_back(Clock::Real().NowNs());
    return true;
  }
  void OnFinish(const FinishEvent& event) override {
    std::lock_guard lock(mutex_);
    error_ = event.error;
    finished_ = true;
    done_.notify_all();
  }
  absl::Status Wait() {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return finished_; });
    return error_;
  }
  const std::vector<int64_t>& times_ns() const { return times_ns_; }

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  bool finished_ = false;
  absl::Status error_;
  std::vector<int64_t> times_ns_;
};

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::lround(q * static_cast<double>(values.size() - 1))];
}

// Steps of one kind.
class Phase {
 public:
  void Add(const StepRecord& step, const Work& work) {
    for (const GroupTime& group : step.groups) {
      const auto it = std::ranges::find(groups_, group.group, &GroupTime::group);
      if (it == groups_.end()) {
        groups_.push_back(group);
      } else {
        it->ns += group.ns;
      }
    }
    // A profiled step runs without overlap: its groups count, not its time.
    if (!step.groups.empty()) {
      ++profiled_steps_;
      return;
    }
    step_ms_.push_back(static_cast<double>(step.device_ns) * 1e-6);
    enqueue_us_.push_back(static_cast<double>(step.enqueue_ns) * 1e-3);
    work_.attention_bytes += work.attention_bytes;
    work_.expert_bytes += work.expert_bytes;
    work_.kv_bytes += work.kv_bytes;
    work_.head_bytes += work.head_bytes;
    work_.flops += work.flops;
    idle_ms_ += static_cast<double>(step.idle_ns) * 1e-6;
    split_steps_ += step.split ? 1 : 0;
    comm_ms_ += static_cast<double>(step.comm_ns) * 1e-6;
    comm_wait_ms_ += static_cast<double>(step.comm_wait_ns) * 1e-6;
    tokens_ += static_cast<double>(step.tokens);
  }
  Json ToJson(const MachineRates& rates) const {
    const double n = std::max<double>(1, static_cast<double>(step_ms_.size()));
    const double total_ms = std::accumulate(step_ms_.begin(), step_ms_.end(), 0.0), s = std::max(total_ms * 1e-3, 1e-9);
    const double floor_ms = std::max(work_.bytes() / rates.read_bytes_per_s, work_.flops / rates.flops_per_s) / n * 1e3;
    Json groups = Json::object();
    for (const GroupTime& group : groups_) {
      groups[group.group] = static_cast<double>(group.ns) * 1e-3 / static_cast<double>(profiled_steps_);
    }
    return {{"steps", step_ms_.size()},
            {"step_ms", total_ms / n},
            {"step_ms_median", Quantile(step_ms_, 0.5)},
            {"step_ms_p99", Quantile(step_ms_, 0.99)},
            {"floor_ms", floor_ms},
            {"ratio", total_ms / n / std::max(floor_ms, 1e-12)},
            {"tokens_per_s", tokens_ / s},
            {"mb_per_step",
             {{"attention_weights", work_.attention_bytes / n * 1e-6},
              {"expert_weights", work_.expert_bytes / n * 1e-6},
              {"kv", work_.kv_bytes / n * 1e-6},
              {"head", work_.head_bytes / n * 1e-6},
              {"all", work_.bytes() / n * 1e-6}}},
            {"gflop_per_step", work_.flops / n * 1e-9},
            {"gb_per_s", work_.bytes() / s * 1e-9},
            {"gflop_per_s", work_.flops / s * 1e-9},
            {"share_of_read_bandwidth", work_.bytes() / s / rates.read_bytes_per_s},
            {"share_of_fma_rate", work_.flops / s / rates.flops_per_s},
            {"idle_share", idle_ms_ / std::max(idle_ms_ + total_ms, 1e-12)},
            {"enqueue_us_median", Quantile(enqueue_us_, 0.5)},
            {"split_steps", split_steps_},
            {"comm_ms", comm_ms_ / n},
            {"comm_hidden_share", comm_ms_ > 0 ? std::max(0.0, 1 - comm_wait_ms_ / comm_ms_) : 0.0},
            {"group_us", groups}};
  }

 private:
  std::vector<double> step_ms_, enqueue_us_;
  Work work_;
  double idle_ms_ = 0, tokens_ = 0, comm_ms_ = 0, comm_wait_ms_ = 0;
  int64_t split_steps_ = 0;
  std::vector<GroupTime> groups_;  // sums over the profiled steps
  int64_t profiled_steps_ = 0;
};

// What steps cost the process of a cluster's leader: the scheduler, the messages, gRPC.
class LeaderMeter {
 public:
  // `cluster` may be null: then there is no leader.
  explicit LeaderMeter(const ClusterEngine* cluster) : cluster_(cluster) { Start(); }
  void Start() {
    cpu_ns_ = CpuNs();
    if (cluster_ != nullptr) costs_ = cluster_->Costs();
  }
  // Microseconds per step since Start; null without a leader.
  Json PerStep() const {
    if (cluster_ == nullptr) return nullptr;
    const int64_t cpu_ns = CpuNs() - cpu_ns_;
    const ClusterCosts now = cluster_->Costs();
    const double steps = std::max<double>(1, static_cast<double>(now.steps - costs_.steps));
    const auto us = [steps](int64_t ns) { return static_cast<double>(ns) * 1e-3 / steps; };
    return {{"cpu_us", us(cpu_ns)},
            {"cpu_us_per_rank", us(cpu_ns) / cluster_->Info().num_ranks},
            {"submit_us", us(now.submit_ns - costs_.submit_ns)},
            {"results_us", us(now.result_ns - costs_.result_ns)}};
  }

 private:
  static int64_t CpuNs() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto ns = [](const timeval& time) { return (int64_t{time.tv_sec} * 1'000'000 + time.tv_usec) * 1000; };
    return ns(usage.ru_utime) + ns(usage.ru_stime);
  }

  const ClusterEngine* const cluster_;
  int64_t cpu_ns_ = 0;
  ClusterCosts costs_;
};

// One batch of equal prompts through scheduler and engine, `repeat` times after a warm-up.
absl::StatusOr<Json> RunCase(const BenchFlags& flags, int batch, int prompt_length, const ModelConfig& config,
                             StepRecorder& recorder, StepLoop& loop, const MachineRates& rates, LeaderMeter& leader) {
  std::mt19937 random(1);
  std::vector<double> tpot_ms, ttft_ms;
  Phase prefill, decode;
  for (int round = -1; round < flags.repeat; ++round) {  // round -1 warms up
    if (round == 0) leader.Start();
    std::vector<std::shared_ptr<TimingSink>> sinks;
    const int64_t start_ns = Clock::Real().NowNs();
    for (int i = 0; i < batch; ++i) {
      sinks.push_back(std::make_shared<TimingSink>());
      Request request;
      request.id = fmt::format("bench-{}-{}", round, i);
      request.prompt.resize(prompt_length);
      for (int32_t& id : request.prompt) id = static_cast<int32_t>(random() % static_cast<uint32_t>(config.vocab_size));
      request.sampling.temperature = 0;
      request.sampling.ignore_eos = true;
      request.sampling.max_tokens = flags.output_length;
      request.sink = sinks.back();
      RETURN_IF_ERROR(loop.Add(std::move(request)));
    }
    for (auto& sink : sinks) RETURN_IF_ERROR(sink->Wait());
    RETURN_IF_ERROR(loop.AwaitIdle(absl::Seconds(60)));
    const std::vector<StepRecord> records = recorder.TakeRecords();
    if (round < 0) continue;
    for (const StepRecord& step : records) {
      // Steps in which some sequences have ended already, or still wait for their first token, are of neither kind.
      if (step.max_rows > 1) {
        prefill.Add(step, WorkOf(step, config, recorder.Info()));
      } else if (step.sequences == batch) {
        decode.Add(step, WorkOf(step, config, recorder.Info()));
      }
    }
    for (const auto& sink : sinks) {
      const auto& t = sink->times_ns();
      ttft_ms.push_back(static_cast<double>(t.front() - start_ns) * 1e-6);
      if (t.size() > 1) {
        tpot_ms.push_back(static_cast<double>(t.back() - t.front()) * 1e-6 / static_cast<double>(t.size() - 1));
      }
    }
  }
  return Json{{"batch", batch},
              {"prompt_length", prompt_length},
              {"output_length", flags.output_length},
              {"rounds", flags.repeat},
              {"prefill", prefill.ToJson(rates)},
              {"decode", decode.ToJson(rates)},
              {"leader", leader.PerStep()},
              {"ttft_ms", {{"median", Quantile(ttft_ms, 0.5)}, {"p99", Quantile(ttft_ms, 0.99)}}},
              {"tpot_ms", {{"median", Quantile(tpot_ms, 0.5)}, {"p99", Quantile(tpot_ms, 0.99)}}}};
}

void PrintCase(const Json& c) {
  fmt::print("batch {} x ({} prompt + {} output tokens), {} rounds after a warm-up\n", c["batch"].get<int>(),
             c["prompt_length"].get<int>(), c["output_length"].get<int>(), c["rounds"].get<int>());
  fmt::print("{:<9} {:>6} {:>9} {:>9} {:>6} {:>11} {:>10} {:>11} {:>9} {:>8} {:>10} {:>7}\n", "", "steps", "ms/step",
             "floor ms", "ratio", "tokens/s", "MB/step", "GFLOP/step", "GB/s", "of read", "GFLOP/s", "of FMA");
  for (const char* name : {"prefill", "decode"}) {
    const Json& p = c[name];
    fmt::print(
        "{:<9} {:>6} {:>9.3f} {:>9.3f} {:>6.2f} {:>11.1f} {:>10.2f} {:>11.3f} {:>9.2f} {:>7.0f}% {:>10.1f} {:>6.0f}%\n",
        name, p["steps"].get<int64_t>(), p["step_ms"].get<double>(), p["floor_ms"].get<double>(),
        p["ratio"].get<double>(), p["tokens_per_s"].get<double>(), p["mb_per_step"]["all"].get<double>(),
        p["gflop_per_step"].get<double>(), p["gb_per_s"].get<double>(),
        100 * p["share_of_read_bandwidth"].get<double>(), p["gflop_per_s"].get<double>(),
        100 * p["share_of_fma_rate"].get<double>());
  }
  for (const char* name : {"prefill", "decode"}) {
    const Json& p = c[name];
    fmt::print("{} MB/step:", name);
    for (const auto& [stream, mb] : p["mb_per_step"].items()) fmt::print(" {} {:.2f}", stream, mb.get<double>());
    fmt::print("; device idle {:.1f}%, enqueue {:.0f} us\n", 100 * p["idle_share"].get<double>(),
               p["enqueue_us_median"].get<double>());
    fmt::print(
        "{} communication: {:.3f} ms/step and rank, {:.1f}% of it hidden under computation; {} of {} steps in two "
        "micro-batches\n",
        name, p["comm_ms"].get<double>(), 100 * p["comm_hidden_share"].get<double>(), p["split_steps"].get<int64_t>(),
        p["steps"].get<int64_t>());
    if (p["group_us"].empty()) continue;
    fmt::print("{} us by group, without overlap:", name);
    for (const auto& [group, us] : p["group_us"].items()) fmt::print(" {} {:.1f}", group, us.get<double>());
    fmt::print("\n");
  }
  if (const Json& leader = c["leader"]; !leader.is_null()) {
    fmt::print(
        "leader: {:.0f} us of CPU per step, {:.0f} per rank; sending plans {:.0f} us, storing results {:.0f} us\n",
        leader["cpu_us"].get<double>(), leader["cpu_us_per_rank"].get<double>(), leader["submit_us"].get<double>(),
        leader["results_us"].get<double>());
  }
  fmt::print("TTFT median {:.2f} p99 {:.2f} ms   TPOT median {:.3f} p99 {:.3f} ms\n",
             c["ttft_ms"]["median"].get<double>(), c["ttft_ms"]["p99"].get<double>(),
             c["tpot_ms"]["median"].get<double>(), c["tpot_ms"]["p99"].get<double>());
}

// "solo:16" -> 16.
absl::Status ParseSlice(const std::string& slice, int& ranks) {
  if (slice.empty()) return absl::OkStatus();
  const std::string_view text = slice;
  const bool solo = text.starts_with("solo:");
  const char* end = text.data() + text.size();
  if (!solo || std::from_chars(text.data() + 5, end, ranks).ptr != end || ranks < 2) {
    return InvalidArgument("--slice is '{}', allowed: solo:RANKS with at least 2 ranks", slice);
  }
  return absl::OkStatus();
}

absl::Status BenchEngine(const BenchFlags& flags) {
  EngineFlags runtime_flags = flags.runtime;
  RETURN_IF_ERROR(ParseSlice(flags.slice, runtime_flags.engine.slice_ranks));
  runtime_flags.engine = WithDefaults(runtime_flags.engine);
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(runtime_flags.engine.model_dir));
  ASSIGN_OR_RETURN(auto factory, CreateDeviceFactory(runtime_flags.engine.device));
  const MachineRates before = factory->MeasureRates();
  const int64_t start_ns = Clock::Real().NowNs();
  ASSIGN_OR_RETURN(const StartedEngine started, StartEngine(runtime_flags.engine, runtime_flags.cluster));
  Engine* const engine = started.engine.get();
  const double ready_s = static_cast<double>(Clock::Real().NowNs() - start_ns) * 1e-9;
  const EngineInfo& info = engine->Info();
  StepRecorder recorder(*engine, runtime_flags.engine.slice_ranks);
  SchedulerOptions scheduler = runtime_flags.scheduler;
  scheduler.max_tokens_per_step = info.limits.max_tokens;
  scheduler.max_sequences = info.limits.max_sequences;
  scheduler.prefix_cache = false;
  ASSIGN_OR_RETURN(scheduler.micro_batches, ParseMicroBatches(runtime_flags.micro_batches));
  scheduler.max_queue = std::max(scheduler.max_queue, std::ranges::max(flags.batches));
  ASSIGN_OR_RETURN(auto loop, StepLoop::Create(scheduler, recorder, Clock::Real()));
  const MachineRates after = factory->MeasureRates();
  const MachineRates rates{.read_bytes_per_s = std::max(before.read_bytes_per_s, after.read_bytes_per_s),
                           .flops_per_s = std::max(before.flops_per_s, after.flops_per_s)};
  Json out = {
      {"model", info.model_name},
      {"device", info.device},
      {"ranks", info.num_ranks},
      {"slice", flags.slice},
      {"ready_s", ready_s},
      {"machine", {{"read_gb_per_s", rates.read_bytes_per_s * 1e-9}, {"fma_gflop_per_s", rates.flops_per_s * 1e-9}}},
      {"cases", Json::array()}};
  if (!flags.json) {
    fmt::print("{} on {}, {}; engine ready in {:.1f} s\n", info.model_name, info.device,
               flags.slice.empty() ? fmt::format("{} ranks", info.num_ranks) : "slice " + flags.slice, ready_s);
    fmt::print("machine   plain read {:.1f} GB/s   FMA {:.1f} GFLOP/s (the better of before and after)\n",
               rates.read_bytes_per_s * 1e-9, rates.flops_per_s * 1e-9);
  }
  LeaderMeter leader(started.cluster);
  for (const int prompt_length : flags.prompt_lengths) {
    for (const int batch : flags.batches) {
      ASSIGN_OR_RETURN(Json result, RunCase(flags, batch, prompt_length, config, recorder, *loop, rates, leader));
      if (!flags.json) PrintCase(result);
      out["cases"].push_back(std::move(result));
    }
  }
  if (flags.json) fmt::print("{}\n", out.dump());
  return absl::OkStatus();
}

}  // namespace

void AddBench(CLI::App& app, int& exit_code) {
  CLI::App* bench = app.add_subcommand("bench", "measurements");
  bench->require_subcommand(1);
  AddBenchServe(*bench, exit_code);
  AddBenchCompare(*bench, exit_code);
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* sub =
      bench->add_subcommand("engine", "the engine without a network: prefill and decode against the machine");
  flags->runtime.AddTo(*sub);
  sub->add_option("--prompt-length", flags->prompt_lengths, "tokens; several, with commas: a case each")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--output-length", flags->output_length, "tokens")->check(CLI::PositiveNumber)->capture_default_str();
  sub->add_option("--batch", flags->batches, "requests at once; several, with commas: a case each")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--slice", flags->slice,
                  "solo:R: what one rank of R does, exchanging tokens with itself by a copy of the same bytes");
  sub->add_flag("--slice-uniform", flags->runtime.engine.slice_uniform,
                "in a slice, tokens go to the experts in turn instead of as the router says");
  sub->add_option("--repeat", flags->repeat, "rounds after the warm-up")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_flag("--json", flags->json, "one JSON object on stdout");
  sub->callback([flags, &exit_code] { exit_code = Report(BenchEngine(*flags)); });
}

}  // namespace soloist::cli
