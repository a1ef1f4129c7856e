// soloist bench engine: the engine without a network. Prefill and decode rates, TPOT, bytes and FLOPs per step, and the
// share of what this machine's memory and multipliers reach in the same run.
#include <algorithm>
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
#include "cli/flags.h"
#include "engine/model/config.h"
#include "kernels/device.h"
#include "nlohmann/json.hpp"

namespace soloist::cli {
namespace {

struct BenchFlags {
  EngineFlags runtime;
  int prompt_length = 128;
  int output_length = 64;
  int batch = 1;
  int repeat = 3;
  bool json = false;
};

// What one step did, from its plan and its result.
struct StepRecord {
  int64_t tokens = 0;
  int64_t sequences = 0;
  int64_t max_rows = 0;        // 1: a pure decode step
  int64_t kv_tokens = 0;       // keys read
  int64_t attended_pairs = 0;  // query-key pairs
  int64_t experts_read = 0;    // (layer, expert) with at least one row
  int64_t logit_rows = 0;
  int64_t device_ns = 0;
};

// Passes everything on and keeps a record of each step.
class RecordingEngine final : public Engine {
 public:
  explicit RecordingEngine(Engine& engine) : engine_(engine) {}
  const EngineInfo& Info() const override { return engine_.Info(); }
  std::vector<RankStatus> Ranks() const override { return engine_.Ranks(); }

  absl::Status Submit(StepPlan plan) override {
    StepRecord record;
    for (const HomePlan& home : plan.homes) {
      record.tokens += home.num_tokens();
      record.sequences += home.num_sequences();
      record.logit_rows += home.num_logit_rows();
      for (int s = 0; s < home.num_sequences(); ++s) {
        const int64_t rows = home.query_starts()[s + 1] - home.query_starts()[s], keys = home.seq_lens()[s];
        record.max_rows = std::max(record.max_rows, rows);
        record.kv_tokens += keys;
        record.attended_pairs += rows * (keys - rows) + rows * (rows + 1) / 2;
      }
    }
    in_flight_.push_back(record);
    return engine_.Submit(std::move(plan));
  }
  absl::StatusOr<StepResult> Await() override {
    auto result = engine_.Await();
    if (!result.ok()) return result;
    StepRecord record = in_flight_.front();
    in_flight_.erase(in_flight_.begin());
    record.device_ns = result->device_ns;
    std::vector<int64_t> rows(result->homes.front().expert_rows.size(), 0);
    for (const HomeResult& home : result->homes) {
      for (size_t i = 0; i < rows.size(); ++i) rows[i] += home.expert_rows[i];
    }
    record.experts_read = std::count_if(rows.begin(), rows.end(), [](int64_t n) { return n > 0; });
    std::lock_guard lock(mutex_);
    records_.push_back(record);
    return result;
  }
  std::vector<StepRecord> TakeRecords() {
    std::lock_guard lock(mutex_);
    return std::exchange(records_, {});
  }

 private:
  Engine& engine_;
  std::vector<StepRecord> in_flight_;
  std::mutex mutex_;
  std::vector<StepRecord> records_;
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

struct Work {
  double bytes = 0;
  double flops = 0;
};

// Weights once per step (of experts those with rows), keys and values, and two FLOPs per weight and row. Activations
// are left out.
Work WorkOf(const StepRecord& step, const ModelConfig& c, const EngineInfo& info) {
  const double q = static_cast<double>(c.num_heads * c.head_dim), kv = static_cast<double>(c.num_kv_heads * c.head_dim);
  const double hidden = static_cast<double>(c.hidden_size), layers = static_cast<double>(c.num_layers);
  const double attention = layers * hidden * (2 * q + 2 * kv);
  const double router = layers * hidden * static_cast<double>(c.num_experts);
  const double expert =
      hidden * static_cast<double>(c.expert_hidden_size) * (c.activation == Activation::kSiluGated ? 3 : 2);
  const double head = hidden * static_cast<double>(c.vocab_size);
  const double tokens = static_cast<double>(step.tokens);
  Work work;
  work.bytes = 2 * (attention * info.num_ranks + router * info.num_ranks +
                    expert * static_cast<double>(step.experts_read) + (step.logit_rows > 0 ? head : 0)) +
               static_cast<double>(step.kv_tokens * info.kv_bytes_per_token);
  work.flops = 2 * (tokens * (attention + router + layers * static_cast<double>(c.experts_per_token) * expert) +
                    static_cast<double>(step.logit_rows) * head) +
               4 * layers * q * static_cast<double>(step.attended_pairs);
  return work;
}

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::lround(q * static_cast<double>(values.size() - 1))];
}

struct Phase {
  double bytes = 0, flops = 0, seconds = 0, tokens = 0;
  int64_t steps = 0;

  void Add(const StepRecord& step, const Work& work) {
    bytes += work.bytes;
    flops += work.flops;
    seconds += static_cast<double>(step.device_ns) * 1e-9;
    tokens += static_cast<double>(step.tokens);
    ++steps;
  }
  nlohmann::json ToJson(const MachineRates& rates) const {
    const double n = std::max<double>(1, static_cast<double>(steps)), s = std::max(seconds, 1e-9);
    return {{"steps", steps},
            {"step_ms", seconds / n * 1e3},
            {"tokens_per_s", tokens / s},
            {"mb_per_step", bytes / n * 1e-6},
            {"gflop_per_step", flops / n * 1e-9},
            {"gb_per_s", bytes / s * 1e-9},
            {"gflop_per_s", flops / s * 1e-9},
            {"share_of_read_bandwidth", bytes / s / rates.read_bytes_per_s},
            {"share_of_fma_rate", flops / s / rates.flops_per_s}};
  }
};

absl::Status BenchEngine(const BenchFlags& flags) {
  EngineFlags runtime_flags = flags.runtime;
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(runtime_flags.engine.model_dir));
  runtime_flags.no_prefix_cache = true;
  ASSIGN_OR_RETURN(auto factory, CreateDeviceFactory(runtime_flags.engine.device));
  const MachineRates before = factory->MeasureRates();
  ASSIGN_OR_RETURN(auto engine, CreateInProcessEngine(runtime_flags.engine, Clock::Real(), nullptr));
  RecordingEngine recorder(*engine);
  SchedulerOptions scheduler = runtime_flags.scheduler;
  scheduler.max_tokens_per_step = runtime_flags.engine.max_tokens_per_step;
  scheduler.max_sequences = runtime_flags.engine.max_sequences;
  scheduler.prefix_cache = false;
  scheduler.max_queue = std::max(scheduler.max_queue, flags.batch);
  ASSIGN_OR_RETURN(auto loop, StepLoop::Create(scheduler, recorder, Clock::Real()));

  std::mt19937 random(1);
  std::vector<double> tpot_ms, ttft_ms;
  Phase prefill, decode;
  for (int round = -1; round < flags.repeat; ++round) {  // round -1 warms up
    std::vector<std::shared_ptr<TimingSink>> sinks;
    const int64_t start_ns = Clock::Real().NowNs();
    for (int i = 0; i < flags.batch; ++i) {
      sinks.push_back(std::make_shared<TimingSink>());
      Request request;
      request.id = fmt::format("bench-{}-{}", round, i);
      request.prompt.resize(flags.prompt_length);
      for (int32_t& id : request.prompt) id = static_cast<int32_t>(random() % static_cast<uint32_t>(config.vocab_size));
      request.sampling.temperature = 0;
      request.sampling.ignore_eos = true;
      request.sampling.max_tokens = flags.output_length;
      request.sink = sinks.back();
      RETURN_IF_ERROR(loop->Add(std::move(request)));
    }
    for (auto& sink : sinks) RETURN_IF_ERROR(sink->Wait());
    RETURN_IF_ERROR(loop->AwaitIdle(absl::Seconds(60)));
    const std::vector<StepRecord> records = recorder.TakeRecords();
    if (round < 0) continue;
    for (const StepRecord& step : records) {
      (step.max_rows > 1 ? prefill : decode).Add(step, WorkOf(step, config, engine->Info()));
    }
    for (const auto& sink : sinks) {
      const auto& t = sink->times_ns();
      ttft_ms.push_back(static_cast<double>(t.front() - start_ns) * 1e-6);
      if (t.size() > 1) {
        tpot_ms.push_back(static_cast<double>(t.back() - t.front()) * 1e-6 / static_cast<double>(t.size() - 1));
      }
    }
  }
  const MachineRates after = factory->MeasureRates();
  const MachineRates rates{.read_bytes_per_s = std::max(before.read_bytes_per_s, after.read_bytes_per_s),
                           .flops_per_s = std::max(before.flops_per_s, after.flops_per_s)};
  const nlohmann::json out = {
      {"model", engine->Info().model_name},
      {"device", engine->Info().device},
      {"ranks", engine->Info().num_ranks},
      {"batch", flags.batch},
      {"prompt_length", flags.prompt_length},
      {"output_length", flags.output_length},
      {"rounds", flags.repeat},
      {"machine", {{"read_gb_per_s", rates.read_bytes_per_s * 1e-9}, {"fma_gflop_per_s", rates.flops_per_s * 1e-9}}},
      {"prefill", prefill.ToJson(rates)},
      {"decode", decode.ToJson(rates)},
      {"ttft_ms", {{"median", Quantile(ttft_ms, 0.5)}, {"p99", Quantile(ttft_ms, 0.99)}}},
      {"tpot_ms", {{"median", Quantile(tpot_ms, 0.5)}, {"p99", Quantile(tpot_ms, 0.99)}}}};
  if (flags.json) {
    fmt::print("{}\n", out.dump());
    return absl::OkStatus();
  }
  const EngineInfo& info = engine->Info();
  fmt::print("{} on {}, {} ranks; batch {} x ({} prompt + {} output tokens), {} rounds after a warm-up\n",
             info.model_name, info.device, info.num_ranks, flags.batch, flags.prompt_length, flags.output_length,
             flags.repeat);
  fmt::print("machine   plain parallel read {:.1f} GB/s   FMA {:.1f} GFLOP/s (the better of before and after)\n",
             rates.read_bytes_per_s * 1e-9, rates.flops_per_s * 1e-9);
  fmt::print("{:<9} {:>7} {:>10} {:>12} {:>11} {:>12} {:>8} {:>8} {:>9} {:>7}\n", "", "steps", "ms/step", "tokens/s",
             "MB/step", "GFLOP/step", "GB/s", "of read", "GFLOP/s", "of FMA");
  const auto row = [](const char* name, const nlohmann::json& p) {
    fmt::print("{:<9} {:>7} {:>10.3f} {:>12.1f} {:>11.2f} {:>12.3f} {:>8.2f} {:>7.0f}% {:>9.1f} {:>6.0f}%\n", name,
               p["steps"].get<int64_t>(), p["step_ms"].get<double>(), p["tokens_per_s"].get<double>(),
               p["mb_per_step"].get<double>(), p["gflop_per_step"].get<double>(), p["gb_per_s"].get<double>(),
               100 * p["share_of_read_bandwidth"].get<double>(), p["gflop_per_s"].get<double>(),
               100 * p["share_of_fma_rate"].get<double>());
  };
  row("prefill", out["prefill"]);
  row("decode", out["decode"]);
  fmt::print("TTFT median {:.2f} p99 {:.2f} ms   TPOT median {:.3f} p99 {:.3f} ms\n", Quantile(ttft_ms, 0.5),
             Quantile(ttft_ms, 0.99), Quantile(tpot_ms, 0.5), Quantile(tpot_ms, 0.99));
  return absl::OkStatus();
}

}  // namespace

void AddBench(CLI::App& app, int& exit_code) {
  CLI::App* bench = app.add_subcommand("bench", "measurements");
  bench->require_subcommand(1);
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* sub =
      bench->add_subcommand("engine", "the engine without a network: prefill and decode against the machine");
  flags->runtime.AddTo(*sub);
  sub->add_option("--prompt-length", flags->prompt_length, "tokens")->check(CLI::PositiveNumber)->capture_default_str();
  sub->add_option("--output-length", flags->output_length, "tokens")->check(CLI::PositiveNumber)->capture_default_str();
  sub->add_option("--batch", flags->batch, "requests at once")->check(CLI::PositiveNumber)->capture_default_str();
  sub->add_option("--repeat", flags->repeat, "rounds after the warm-up")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_flag("--json", flags->json, "one JSON object on stdout");
  sub->callback([flags, &exit_code] { exit_code = Report(BenchEngine(*flags)); });
}

}  // namespace soloist::cli
