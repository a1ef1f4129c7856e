// What a decode step costs the leader of a cluster: its scheduler, and the messages to and from the ranks.
//
//   cluster_benchmark [RANKS...]      default 1 4 16 64
//
// The ranks are fake workers (tests/cluster/fake_worker.h) in a process of their own, over real gRPC streams: they
// answer at once, so that the leader's own work is all there is. CPU time is that of this process, all its threads.
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "engine/cluster/cluster_engine.h"
#include "nlohmann/json.hpp"
#include "scheduler/scheduler.h"
#include "tests/cluster/fake_worker.h"

namespace soloist {
namespace {

constexpr int kExperts = 64;
constexpr int kPrompt = 1000;
constexpr int kWarmUp = 20, kSteps = 200;

class CountingSink final : public TokenSink {
 public:
  bool OnToken(TokenEvent) override { return ++tokens > 0; }
  void OnFinish(const FinishEvent&) override {}
  int64_t tokens = 0;
};

int64_t NowNs() { return Clock::Real().NowNs(); }

int64_t CpuNs() {
  rusage usage{};
  CHECK_EQ(getrusage(RUSAGE_SELF, &usage), 0);
  const auto ns = [](const timeval& t) { return (int64_t{t.tv_sec} * 1'000'000 + t.tv_usec) * 1000; };
  return ns(usage.ru_utime) + ns(usage.ru_stime);
}

// The bundled model's shape with more experts; there are no weights.
class WideModel {
 public:
  WideModel() : path_(std::filesystem::temp_directory_path() / ("cluster_benchmark" + std::to_string(getpid()))) {
    std::filesystem::create_directory(path_);
    nlohmann::json config = nlohmann::json::parse(std::ifstream("models/tiny/config.json"));
    config["num_local_experts"] = kExperts;
    std::ofstream(path_ / "config.json") << config;
  }
  ~WideModel() { std::filesystem::remove_all(path_); }
  WideModel(const WideModel&) = delete;
  WideModel& operator=(const WideModel&) = delete;
  std::string path() const { return path_.string(); }

 private:
  const std::filesystem::path path_;
};

// This program as all the workers, in another process.
class Workers {
 public:
  void Start(const std::string& leader, const std::string& model_dir, int count) {
    std::vector<std::string> arguments = {"cluster_benchmark", "--workers", leader, model_dir, std::to_string(count)};
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    CHECK_EQ(posix_spawn(&pid_, "/proc/self/exe", nullptr, nullptr, argv.data(), environ), 0);
  }
  ~Workers() {
    int status = 0;
    CHECK_EQ(waitpid(pid_, &status, 0), pid_);
  }

 private:
  pid_t pid_ = 0;
};

int RunWorkers(const std::string& leader, const std::string& model_dir, int count) {
  std::vector<std::unique_ptr<FakeWorker>> workers;
  for (int r = 0; r < count; ++r) workers.push_back(std::make_unique<FakeWorker>(leader, model_dir, r, 0));
  for (const auto& worker : workers) worker->Wait();
  return 0;
}

double Median(std::vector<int64_t> ns) {
  std::ranges::sort(ns);
  return static_cast<double>(ns[ns.size() / 2]) / 1e3;
}

void Run(const std::string& model_dir, int ranks, int sequences) {
  Workers workers;  // end after their leader
  ClusterOptions options;
  options.engine.model_dir = model_dir;
  options.engine.num_ranks = ranks;
  options.engine.load_format = "dummy";
  options.engine.max_tokens_per_step = 8192;
  options.engine.max_sequences = 1024;
  options.engine.num_blocks = (sequences / ranks + 1) * (kPrompt / 16 + 64);
  options.version = kTestVersion;
  options.silence_timeout = absl::Hours(1);  // fake workers do not beat
  options.step_timeout = absl::Hours(1);
  options.on_listening = [&](const std::string& leader) {
    workers.Start(leader, model_dir, ranks);
    return absl::OkStatus();
  };
  auto created = CreateClusterEngine(options, Clock::Real(), nullptr);
  CHECK_OK(created.status());
  ClusterEngine& engine = **created;
  SchedulerOptions scheduling;
  scheduling.max_tokens_per_step = 8192;
  scheduling.max_sequences = 1024;
  Scheduler scheduler(scheduling, engine.Info());
  auto sink = std::make_shared<CountingSink>();
  for (int i = 0; i < sequences; ++i) {
    Request request;
    request.id = std::to_string(i);
    request.prompt.assign(kPrompt, 1 + i);
    request.sampling.max_tokens = 1000;
    request.sampling.ignore_eos = true;
    request.sink = sink;
    scheduler.Add(std::move(request), 0);
  }
  std::vector<int64_t> schedule, wall;
  int64_t cpu_ns = 0, bytes = 0, last_ns = 0;
  ClusterCosts before;
  for (int step = -kWarmUp; step < kSteps;) {
    int64_t start = NowNs();
    std::optional<StepPlan> plan = scheduler.Schedule(0);
    int64_t scheduling_ns = NowNs() - start;
    CHECK(plan.has_value());
    int64_t rows = 0, plan_bytes = 0;
    for (const HomePlan& home : plan->homes) {
      rows += home.num_tokens();
      plan_bytes += static_cast<int64_t>(home.words().size_bytes());
    }
    CHECK_OK(engine.Submit(*std::move(plan)));
    if (scheduler.plans_in_flight() < Engine::kMaxInFlight) continue;
    const auto result = engine.Await();
    CHECK_OK(result.status());
    start = NowNs();
    CHECK_OK(scheduler.Commit(*result, 0));
    scheduling_ns += NowNs() - start;
    for (OutputEvent& event : scheduler.TakeEvents()) {
      event.request->sink->OnToken(std::move(std::get<TokenEvent>(event.what)));
    }
    if (rows != sequences) continue;  // prefill
    if (step++ == 0) {
      cpu_ns = CpuNs();
      before = engine.Costs();
    } else if (step > 1) {
      schedule.push_back(scheduling_ns);
      wall.push_back(NowNs() - last_ns);
      bytes = plan_bytes;
    }
    last_ns = NowNs();
  }
  const ClusterCosts after = engine.Costs();
  const auto steps = static_cast<double>(after.steps - before.steps);
  const double cpu_us = static_cast<double>(CpuNs() - cpu_ns) / 1e3 / steps;
  std::printf("%5d %9d %10.1f %10.1f %11.1f %11.1f %9.1f %9.1f %11.1f %9.1f\n", ranks, sequences, Median(wall),
              Median(schedule), static_cast<double>(after.submit_ns - before.submit_ns) / 1e3 / steps,
              static_cast<double>(after.result_ns - before.result_ns) / 1e3 / steps, cpu_us, cpu_us / ranks,
              (cpu_us - Median(schedule)) / ranks, static_cast<double>(bytes) / 1e3);
  std::fflush(stdout);
}

int Main(const std::vector<std::string>& arguments) {
  const auto number = [](const std::string& text) {
    int value = 0;
    CHECK(std::from_chars(text.data(), text.data() + text.size(), value).ec == std::errc());
    return value;
  };
  if (arguments.size() == 4 && arguments[0] == "--workers") {
    return RunWorkers(arguments[1], arguments[2], number(arguments[3]));
  }
  std::vector<int> ranks;
  for (const std::string& argument : arguments) ranks.push_back(number(argument));
  if (ranks.empty()) ranks = {1, 4, 16, 64};
  const WideModel model;
  std::printf(
      "A decode step of prompts of %d tokens, %u cores, us: median of wall and Schedule + Commit; mean of the rest\n",
      kPrompt, std::thread::hardware_concurrency());
  std::printf(
      "ranks sequences       wall  scheduler      submit     results       CPU  per rank  less sched.   plans KB\n");
  for (const int count : ranks) {
    for (const int sequences : {64, 256, 1024}) Run(model.path(), count, sequences);
  }
  return 0;
}

}  // namespace
}  // namespace soloist

int main(int argc, char** argv) { return soloist::Main({argv + 1, argv + argc}); }
