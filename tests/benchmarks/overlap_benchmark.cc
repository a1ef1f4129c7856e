// A large prefill step with one and with two micro-batches, in turn, on the same engine.
//
//   overlap_benchmark MODEL shm|tcp RANKS TOKENS PAIRS [TRACE]
//
// Each rank's home computes one prompt of TOKENS tokens from its start (dummy weights, MODEL/config.json), PAIRS times
// in each way after two of each that do not count. shm: ranks are threads of an in-process engine, tcp: of a cluster
// whose workers are threads of this process and exchange tokens over loopback. To see a slow network, run it in a
// network namespace whose loopback has a tc tbf. Every step's tokens are compared with the first one's. TRACE: where
// the ranks write what they do (tcp: TRACE.rankR).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "engine/cluster/comm_factory.h"
#include "engine/micro_batches.h"
#include "engine/worker/in_process_engine.h"
#include "tests/cluster/thread_cluster.h"

namespace soloist {
namespace {

constexpr int kWarmUp = 2;

double Quantile(std::vector<double> values, double q) {
  std::ranges::sort(values);
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

HomePlan Prompt(const PlanLimits& limits, int home, int32_t tokens, int64_t step) {
  HomePlanParts parts;
  parts.max_blocks = (tokens + limits.block_size - 1) / limits.block_size;
  for (int32_t i = 0; i < tokens; ++i) {
    parts.token_ids.push_back((home * 977 + i * 131) % limits.vocab_size);
    parts.positions.push_back(i);
    parts.slot_mapping.push_back(i);
  }
  for (int32_t b = 0; b < parts.max_blocks; ++b) parts.block_tables.push_back(b);
  parts.query_starts = {0, tokens};
  parts.seq_lens = {tokens};
  parts.logit_rows = {tokens - 1};
  SamplingRow row;
  row.position = tokens;
  parts.sampling = {row};
  return {parts, step, tokens, 0};
}

// Of the steps of one kind.
struct Times {
  std::vector<double> step_ms, comm_ms, wait_ms;

  void Add(const StepResult& result) {
    double comm = 0, wait = 0;
    for (const HomeResult& home : result.homes) {
      comm += static_cast<double>(home.comm_ns) * 1e-6;
      wait += static_cast<double>(home.comm_wait_ns) * 1e-6;
    }
    step_ms.push_back(static_cast<double>(result.device_ns) * 1e-6);
    comm_ms.push_back(comm / static_cast<double>(result.homes.size()));
    wait_ms.push_back(wait / static_cast<double>(result.homes.size()));
  }
  void Print(const char* name) const {
    double comm = 0, wait = 0;
    for (size_t i = 0; i < comm_ms.size(); ++i) {
      comm += comm_ms[i];
      wait += wait_ms[i];
    }
    std::printf(
        "%s: step min %.1f median %.1f p99 %.1f ms; communication %.1f ms a step and rank, %.1f waited for, %.1f%% "
        "hidden\n",
        name, Quantile(step_ms, 0), Quantile(step_ms, 0.5), Quantile(step_ms, 0.99),
        comm / static_cast<double>(comm_ms.size()), wait / static_cast<double>(comm_ms.size()),
        comm > 0 ? 100 * std::max(0.0, 1 - wait / comm) : 0.0);
  }
};

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const EngineOptions& options, bool tcp, ThreadWorkers& workers) {
  if (!tcp) return CreateInProcessEngine(options, Clock::Real(), nullptr);
  return CreateClusterEngine({.engine = options,
                              .version = kTestVersion,
                              .start_timeout = absl::Seconds(300),
                              .silence_timeout = absl::Seconds(60),
                              .step_timeout = absl::Seconds(60),
                              .on_listening =
                                  [&](const std::string& address) {
                                    for (int r = 0; r < options.num_ranks; ++r) {
                                      WorkerProcessOptions worker = workers.Options(address, r);
                                      worker.make_comm = MakeCommFactory("cpu", {.hostname_or_address = "127.0.0.1"});
                                      worker.trace_file = options.trace_file;
                                      workers.Start(worker);
                                    }
                                    return absl::OkStatus();
                                  }},
                             Clock::Real(), nullptr);
}

absl::Status Run(const EngineOptions& options, bool tcp, int32_t tokens, int pairs) {
  ThreadWorkers workers;
  ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, MakeEngine(options, tcp, workers));
  const EngineInfo& info = engine->Info();
  Times times[2];
  std::vector<double> ratios;
  std::vector<int32_t> expected;
  int64_t step = 0;
  for (int pair = 0; pair < pairs + kWarmUp; ++pair) {
    for (int i = 0; i < 2; ++i) {
      // Every second pair the other way round.
      const bool two = (i == 1) != (pair % 2 == 1);
      StepPlan plan;
      plan.step = ++step;
      for (int h = 0; h < info.num_homes; ++h) plan.homes.push_back(Prompt(info.limits, h, tokens, step));
      MicroBatchPolicy(two ? MicroBatches::kTwo : MicroBatches::kOne, info).Apply(plan);
      RETURN_IF_ERROR(engine->Submit(std::move(plan)));
      ASSIGN_OR_RETURN(const StepResult result, engine->Await());
      std::vector<int32_t> sampled;
      for (const HomeResult& home : result.homes) sampled.push_back(home.tokens.at(0));
      if (expected.empty()) expected = sampled;
      if (sampled != expected) return Internal("step {} has other tokens than the first", step);
      if (pair >= kWarmUp) times[two ? 1 : 0].Add(result);
    }
    if (pair >= kWarmUp) ratios.push_back(times[1].step_ms.back() / times[0].step_ms.back());
  }
  times[0].Print("one micro-batch  ");
  times[1].Print("two micro-batches");
  std::printf("two / one, of %d pairs: median %.3f, quartiles %.3f to %.3f, from %.3f to %.3f\n", pairs,
              Quantile(ratios, 0.5), Quantile(ratios, 0.25), Quantile(ratios, 0.75), Quantile(ratios, 0),
              Quantile(ratios, 1));
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "overlap_benchmark MODEL shm|tcp RANKS TOKENS PAIRS [TRACE]\n");
    return 2;
  }
  EngineOptions options{.model_dir = argv[1], .load_format = "dummy", .num_ranks = std::atoi(argv[3])};
  const int32_t tokens = std::atoi(argv[4]);
  options.max_tokens_per_step = std::max(tokens, 8);
  options.max_sequences = 8;
  options.max_model_len = options.max_tokens_per_step + 1;
  options.num_blocks = tokens / 16 + 2;
  if (argc > 6) options.trace_file = argv[6];
  const absl::Status status = Run(options, std::string(argv[2]) == "tcp", tokens, std::atoi(argv[5]));
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace soloist

int main(int argc, char** argv) { return soloist::Main(argc, argv); }
