// The same requests alone, in a batch, preempted, with and without prefix cache, with and without decode graphs. In
// deterministic mode everything is the same bit for bit; else greedy requests part at near ties only.
#include <cstdio>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/gpu/parity_flags.h"
#include "tests/gpu/parity_requests.h"

namespace soloist {
namespace {

struct Config {
  std::string name;
  EngineOptions engine;
  SchedulerOptions scheduler;
  bool one_by_one = false;
};

EngineOptions Engine(bool deterministic) {
  return {.model_dir = Flags().model_dir,
          .device = {.kind = Flags().device, .deterministic = deterministic},
          .max_tokens_per_step = 512,
          .max_sequences = 64,
          .num_blocks = 1200};
}

std::vector<std::vector<Output>> RunConfig(const Config& config, const std::vector<Request>& requests) {
  Harness harness(config.engine, config.scheduler);
  if (!harness.ok()) return {};
  std::vector<std::vector<Output>> outputs;
  if (config.one_by_one) {
    for (const Request& request : requests) {
      auto one = harness.Run({request});
      if (one.empty()) return {};
      outputs.push_back(std::move(one[0]));
    }
  } else {
    outputs = harness.Run(requests);
  }
  const LoadSnapshot load = harness.loop().Load();
  if (config.scheduler.force_preempt_every > 0) {
    EXPECT_GT(load.preemptions, 0) << config.name;
  }
  std::printf("  %s: %lld steps, %lld preemptions, %lld prompt tokens from the prefix cache\n", config.name.c_str(),
              static_cast<long long>(load.steps), static_cast<long long>(load.preemptions),
              static_cast<long long>(load.prefix_cache_hits));
  return outputs;
}

void TestBatching(bool deterministic) {
  const std::vector<Request> requests = MixedRequests(64, 4096);
  std::vector<Config> configs(6, {.engine = Engine(deterministic)});
  configs[0].name = "alone, no prefix cache";
  configs[0].one_by_one = true;
  configs[0].scheduler.prefix_cache = false;
  configs[1].name = "batch of 64";
  configs[2].name = "batch, no prefix cache, forced preemption";
  configs[2].scheduler.prefix_cache = false;
  configs[2].scheduler.force_preempt_every = 3;
  configs[3].name = "batch, prefix cache, forced preemption";
  configs[3].scheduler.force_preempt_every = 4;
  configs[4].name = "batch, every step without a graph";
  configs[4].engine.profile_every = 1;
  configs[5].name = "batch, small chunks, blocks of 16";
  configs[5].engine.max_tokens_per_step = 96;
  configs[5].engine.block_size = 16;
  configs[5].engine.num_blocks = 4800;
  const auto reference = RunConfig(configs[0], requests);
  ASSERT_EQ(reference.size(), requests.size());
  for (size_t i = 1; i < configs.size(); ++i) {
    const auto outputs = RunConfig(configs[i], requests);
    const std::string name = (deterministic ? "deterministic: " : "normal: ") + configs[i].name;
    const Comparison c = Compare(requests, reference, outputs, name);
    if (deterministic) {
      EXPECT_EQ(c.greedy_parted + c.sampled_parted + c.other_logprobs, 0) << name;
    } else {
      EXPECT_LE(c.greedy_far, 2) << name << ": gaps wider than " << NearTie();
      EXPECT_LE(c.greedy_parted, 12) << name;
    }
  }
}

TEST(BatchingParityTest, Normal) { TestBatching(false); }
TEST(BatchingParityTest, Deterministic) { TestBatching(true); }

// With seeds: again the same on the same device; mostly the same as on the CPU in float32.
TEST(SamplingParityTest, SeedsRepeat) {
  std::vector<Request> requests;
  const auto goldens = LoadGoldens();
  for (int i = 0; i < 16; ++i) {
    Request request = GreedyRequest("s" + std::to_string(i), goldens[i]["ids"].get<std::vector<int32_t>>(), 48);
    request.sampling.temperature = i % 2 == 0 ? 1.0f : 0.7f;
    request.sampling.seed = 90 + static_cast<uint64_t>(i);
    if (i % 4 == 3) request.sampling.top_p = 0.95f;
    requests.push_back(std::move(request));
  }
  Config config{.name = "seeds", .engine = Engine(false), .one_by_one = true};
  config.scheduler.prefix_cache = false;
  const auto first = RunConfig(config, requests), second = RunConfig(config, requests);
  Config cpu = config;
  cpu.name = "seeds on the CPU";
  cpu.engine.device = {};
  cpu.engine.num_blocks = 0;
  const auto reference = RunConfig(cpu, requests);
  const Comparison again = Compare(requests, first, second, "again on the same device");
  EXPECT_EQ(again.greedy_parted + again.sampled_parted + again.other_logprobs, 0);
  const Comparison other = Compare(requests, reference, first, "against the CPU in float32");
  const double share = static_cast<double>(other.tokens) / (16.0 * 48);
  std::printf("  seeds: %.1f%% of the tokens come before the first that differs from the CPU's\n", 100 * share);
  EXPECT_GE(share, 0.6);
}

}  // namespace
}  // namespace soloist
