// Time of Schedule + Commit per step, with everything running and nothing but the scheduler's own work.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "base/check.h"
#include "engine/simulated_engine.h"
#include "scheduler/scheduler.h"

namespace soloist {
namespace {

class CountingSink final : public TokenSink {
 public:
  bool OnToken(TokenEvent) override { return ++tokens > 0; }
  void OnFinish(const FinishEvent&) override {}
  int64_t tokens = 0;
};

int64_t NowNs() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

struct Row {
  int sequences, homes, prompt;
  bool penalties;
};

void Run(const Row& row) {
  constexpr int kWarmUp = 50, kSteps = 400;
  SimulatedOptions simulated;
  simulated.num_homes = row.homes;
  simulated.num_layers = 16;
  simulated.check_kv = false;
  simulated.limits = {.vocab_size = 32000,
                      .max_model_len = 16384,
                      .num_blocks = 400000 / row.homes,
                      .block_size = 16,
                      .max_tokens = 8192,
                      .max_sequences = 256};
  SimulatedEngine engine(simulated);
  SchedulerOptions options;
  options.max_tokens_per_step = 8192;
  Scheduler scheduler(options, engine.Info());
  auto sink = std::make_shared<CountingSink>();
  for (int i = 0; i < row.sequences; ++i) {
    Request request;
    request.id = std::to_string(i);
    request.prompt.assign(row.prompt, 1 + i);
    request.sampling.max_tokens = 2000;
    request.sampling.ignore_eos = true;
    if (row.penalties) request.sampling.presence_penalty = 0.5f;
    request.sink = sink;
    scheduler.Add(std::move(request), 0);
  }
  std::vector<int64_t> schedule, commit;
  int64_t rows = 0;
  for (int step = -1; static_cast<int>(commit.size()) < kWarmUp + kSteps;) {
    int64_t start = NowNs();
    std::optional<StepPlan> plan = scheduler.Schedule(0);
    const int64_t schedule_ns = NowNs() - start;
    CHECK(plan.has_value());
    rows = 0;
    for (const HomePlan& home : plan->homes) rows += home.num_tokens();
    CHECK_OK(engine.Submit(*std::move(plan)));
    if (scheduler.plans_in_flight() < Engine::kMaxInFlight) continue;
    const auto result = engine.Await();
    CHECK_OK(result.status());
    start = NowNs();
    CHECK_OK(scheduler.Commit(*result, 0));
    const int64_t commit_ns = NowNs() - start;
    for (OutputEvent& event : scheduler.TakeEvents()) {
      event.request->sink->OnToken(std::move(std::get<TokenEvent>(event.what)));
    }
    if (rows != row.sequences || ++step < 2) continue;  // prefill is over
    schedule.push_back(schedule_ns);
    commit.push_back(commit_ns);
  }
  CHECK_EQ(scheduler.Load().generated_tokens, sink->tokens);
  CHECK_OK(scheduler.CheckIntegrity(false));
  std::vector<int64_t> both;
  for (size_t i = kWarmUp; i < commit.size(); ++i) both.push_back(schedule[i] + commit[i]);
  schedule.erase(schedule.begin(), schedule.begin() + kWarmUp);
  std::ranges::sort(both);
  std::ranges::sort(schedule);
  std::printf("%9d %6d %7d %10s %12.1f %12.1f %12.1f %14.1f\n", row.sequences, row.homes, row.prompt,
              row.penalties ? "yes" : "no", both.front() / 1e3, both[both.size() / 2] / 1e3,
              both[both.size() * 99 / 100] / 1e3, schedule[schedule.size() / 2] / 1e3);
}

}  // namespace
}  // namespace soloist

int main() {
  std::printf("Schedule + Commit per decode step, %u cores; block tables of `prompt` tokens in blocks of 16\n",
              std::thread::hardware_concurrency());
  std::printf("sequences  homes  prompt  penalties       min us    median us       p99 us   Schedule med\n");
  for (const soloist::Row& row :
       {soloist::Row{256, 16, 1000, false}, soloist::Row{256, 16, 10000, false}, soloist::Row{256, 16, 1000, true},
        soloist::Row{256, 1, 1000, false}, soloist::Row{16, 16, 1000, false}, soloist::Row{1, 1, 1000, false}}) {
    soloist::Run(row);
  }
}
