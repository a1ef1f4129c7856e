// Tokens and logits do not depend on the number of ranks, the placement, the batch, the dispatch layout, the prefix
// cache or preemption: bit for bit.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/parity/engine_harness.h"

namespace soloist {
namespace {

// 32 mixed requests: greedy and sampled, penalties, short and long prompts, shared prefixes.
std::vector<Request> MixedRequests(int32_t vocab_size) {
  std::mt19937 random(7);
  const auto token = [&] { return static_cast<int32_t>(random() % static_cast<uint32_t>(vocab_size)); };
  std::vector<int32_t> shared(100);
  for (int32_t& id : shared) id = token();
  std::vector<Request> requests;
  for (int i = 0; i < 32; ++i) {
    Request request;
    request.id = "r" + std::to_string(i);
    if (i % 4 == 1) request.prompt = shared;
    const int own = i % 8 == 3 ? 200 : 1 + static_cast<int>(random() % 40);
    for (int t = 0; t < own; ++t) request.prompt.push_back(token());
    SamplingParams& s = request.sampling;
    s.max_tokens = 6 + static_cast<int32_t>(random() % 12);
    s.ignore_eos = true;
    s.return_logits = true;
    s.temperature = i % 2 == 0 ? 0.0f : 0.9f;
    s.seed = 1000 + static_cast<uint64_t>(i);
    if (i % 3 == 0) s.repetition_penalty = 1.3f;
    if (i % 5 == 0) s.presence_penalty = 0.5f, s.frequency_penalty = 0.25f;
    if (i % 7 == 0) s.top_k = 40, s.top_p = 0.9f, s.min_p = 0.01f;
    s.num_top_logprobs = i % 6 == 0 ? 3 : -1;
    requests.push_back(std::move(request));
  }
  return requests;
}

struct Config {
  std::string name;
  EngineOptions engine;
  SchedulerOptions scheduler;
  bool one_by_one = false;
};

void ExpectSame(const std::vector<std::vector<Output>>& expected, const std::vector<std::vector<Output>>& actual,
                const std::string& name) {
  ASSERT_EQ(expected.size(), actual.size()) << name;
  for (size_t r = 0; r < expected.size(); ++r) {
    EXPECT_EQ(expected[r][0].tokens, actual[r][0].tokens) << name << " request " << r;
    EXPECT_EQ(expected[r][0].top, actual[r][0].top) << name << " request " << r;
    // Vector equality of floats: bit-identical but for zeros' signs, and NaN would fail.
    EXPECT_EQ(expected[r][0].logits, actual[r][0].logits) << name << " request " << r;
  }
}

EngineOptions Engine(const std::string& model, int ranks) {
  EngineOptions options{.model_dir = model, .num_ranks = ranks};
  options.max_tokens_per_step = 128;  // long prompts come in chunks
  options.max_sequences = 64;
  options.max_model_len = 512;
  return options;
}

void Compare(const std::string& model, const std::string& load_format, int32_t vocab_size) {
  std::vector<Config> configs;
  const auto add = [&](const std::string& name, int ranks) -> Config& {
    configs.push_back({.name = name, .engine = Engine(model, ranks), .scheduler = {}});
    configs.back().engine.load_format = load_format;
    return configs.back();
  };
  add("1 rank, one by one", 1).one_by_one = true;
  for (const int ranks : {1, 2, 4, 8, 16}) {
    add(std::to_string(ranks) + " ranks, batch", ranks);
    Config& cold = add(std::to_string(ranks) + " ranks, no prefix cache, forced preemption", ranks);
    cold.scheduler.prefix_cache = false;
    cold.scheduler.force_preempt_every = 3;
  }
  add("16 ranks, one by one", 16).one_by_one = true;
  add("4 ranks, forced preemption, prefix cache", 4).scheduler.force_preempt_every = 4;
  add("4 ranks, contiguous dispatch only", 4).engine.masked_max_tokens = 0;
  add("4 ranks, masked dispatch only", 4).engine.masked_max_tokens = 128;
  Config& placed = add("4 ranks, permuted and uneven placement", 4);
  placed.engine.expert_rank = {3, 0, 0, 2, 1, 3, 3, 0, 1, 1, 0, 3, 3, 2, 0, 1};
  add("2 ranks, one thread", 2).engine.device.cpu_threads = 1;
  add("1 rank, blocks of 5", 1).engine.block_size = 5;
  add("2 ranks, few blocks", 2).engine.num_blocks = 40;

  const std::vector<Request> requests = MixedRequests(vocab_size);
  std::vector<std::vector<Output>> reference;
  for (const Config& config : configs) {
    Harness harness(config.engine, config.scheduler);
    ASSERT_TRUE(harness.ok()) << config.name;
    std::vector<std::vector<Output>> outputs;
    if (config.one_by_one) {
      for (const Request& request : requests) outputs.push_back(harness.Run({request}).at(0));
    } else {
      outputs = harness.Run(requests);
    }
    if (reference.empty()) {
      reference = outputs;
      for (size_t r = 0; r < requests.size(); ++r) {
        ASSERT_EQ(static_cast<int>(outputs[r][0].logits.size()), requests[r].sampling.max_tokens);
      }
    }
    ExpectSame(reference, outputs, config.name);
    const LoadSnapshot load = harness.loop().Load();
    if (config.scheduler.force_preempt_every > 0 || config.engine.num_blocks > 0) {
      EXPECT_GT(load.preemptions, 0) << config.name;
    }
    std::printf("%s: 32 requests equal; %lld steps, %lld preemptions, %lld prompt tokens from the prefix cache\n",
                config.name.c_str(), static_cast<long long>(load.steps), static_cast<long long>(load.preemptions),
                static_cast<long long>(load.prefix_cache_hits));
  }
}

TEST(LayoutTest, Mixtral) { Compare("models/tiny", "auto", 4096); }

TEST(LayoutTest, TwoMatrixGelu) { Compare("models/paper16-small", "dummy", 512); }

// The same request with n outputs, twice.
TEST(LayoutTest, SeededOutputsRepeat) {
  Harness harness(Engine("models/tiny", 4), {});
  ASSERT_TRUE(harness.ok());
  Request request;
  request.id = "n";
  request.prompt = {0, 597, 690, 262, 429};
  request.num_outputs = 4;
  request.sampling = {.temperature = 1.0f, .seed = 42, .max_tokens = 24, .ignore_eos = true};
  const auto first = harness.Run({request}), second = harness.Run({request});
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(first[0][i].tokens, second[0][i].tokens);
    EXPECT_EQ(first[0][i].tokens.size(), 24u);
    if (i > 0) {
      EXPECT_NE(first[0][i].tokens, first[0][0].tokens);
    }
  }
}

}  // namespace
}  // namespace soloist
