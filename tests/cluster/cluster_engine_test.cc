// The cluster engine with workers that are threads: the same bits as one rank of this process.
#include "engine/cluster/cluster_engine.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/cluster/thread_cluster.h"
#include "tests/parity/engine_harness.h"

namespace soloist {
namespace {

constexpr char kModelDir[] = "models/tiny";

EngineOptions Options(int ranks) {
  EngineOptions options{.model_dir = kModelDir, .num_ranks = ranks};
  options.max_tokens_per_step = 64;
  options.max_sequences = 32;
  options.max_model_len = 256;
  options.num_blocks = 128;
  return options;
}

ClusterOptions Cluster(ThreadWorkers& workers, int ranks) {
  return {.engine = Options(ranks),
          .version = kTestVersion,
          .start_timeout = absl::Seconds(60),
          .on_listening = [&workers, ranks](const std::string& address) {
            workers.StartAll(address, ranks);
            return absl::OkStatus();
          }};
}

std::vector<Request> Requests() {
  std::vector<Request> requests;
  for (int i = 0; i < 12; ++i) {
    Request request;
    request.id = "r" + std::to_string(i);
    for (int t = 0; t < 3 + 11 * i; ++t) request.prompt.push_back((i * 131 + t * 17) % 4000);
    request.sampling = {.temperature = i % 3 == 0 ? 0.9f : 0.0f, .seed = 5, .max_tokens = 12, .ignore_eos = true};
    request.sampling.return_logits = i % 2 == 0;
    request.sampling.num_top_logprobs = i % 4 == 0 ? 3 : -1;
    requests.push_back(std::move(request));
  }
  return requests;
}

TEST(ClusterEngineTest, SameBitsAsOneRank) {
  Harness one(Options(1), {});
  ASSERT_TRUE(one.ok());
  const auto expected = one.Run(Requests());
  for (const auto& [ranks, micro_batches] : {std::pair(1, MicroBatches::kOne), std::pair(4, MicroBatches::kOne),
                                             std::pair(4, MicroBatches::kTwo), std::pair(16, MicroBatches::kTwo)}) {
    ThreadWorkers workers;
    {
      Harness cluster(CreateClusterEngine(Cluster(workers, ranks), Clock::Real(), nullptr),
                      {.micro_batches = micro_batches});
      ASSERT_TRUE(cluster.ok());
      const auto outputs = cluster.Run(Requests());
      ASSERT_EQ(outputs.size(), expected.size());
      for (size_t r = 0; r < outputs.size(); ++r) {
        EXPECT_EQ(outputs[r][0].tokens, expected[r][0].tokens) << ranks << " ranks, request " << r;
        EXPECT_EQ(outputs[r][0].logits, expected[r][0].logits) << ranks << " ranks, request " << r;
        EXPECT_EQ(outputs[r][0].top, expected[r][0].top) << ranks << " ranks, request " << r;
      }
    }
    for (const absl::Status& status : workers.Join()) EXPECT_EQ(status, absl::OkStatus());
  }
}

}  // namespace
}  // namespace soloist
