// Workers behind the wire obey the plan's dispatch room, and say what overflowed: a cluster whose steps are run again
// gives the bits of one rank.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/replay.h"
#include "gtest/gtest.h"
#include "tests/cluster/thread_cluster.h"
#include "tests/parity/engine_harness.h"

namespace soloist {
namespace {

EngineOptions Options(int ranks) {
  EngineOptions options{.model_dir = "models/tiny", .num_ranks = ranks};
  options.masked_max_tokens = 64;
  options.max_tokens_per_step = 64;
  options.max_sequences = 32;
  options.max_model_len = 256;
  options.num_blocks = 128;
  return options;
}

absl::StatusOr<std::unique_ptr<Engine>> CreateCluster(ThreadWorkers& workers, int ranks) {
  ASSIGN_OR_RETURN(auto engine, CreateClusterEngine({.engine = Options(ranks),
                                                     .version = kTestVersion,
                                                     .start_timeout = absl::Seconds(60),
                                                     .on_listening =
                                                         [&workers, ranks](const std::string& address) {
                                                           workers.StartAll(address, ranks);
                                                           return absl::OkStatus();
                                                         }},
                                                    Clock::Real(), nullptr));
  return std::make_unique<ReplayEngine>(std::move(engine),
                                        DispatchRoomOptions{.kind = DispatchRoomOptions::Kind::kFixed, .rows = 1});
}

std::vector<Request> Requests() {
  std::vector<Request> requests;
  for (int i = 0; i < 12; ++i) {
    Request request;
    request.id = "r" + std::to_string(i);
    for (int t = 0; t < 3 + 11 * i; ++t) request.prompt.push_back((i * 131 + t * 17) % 4000);
    request.sampling = {.temperature = i % 3 == 0 ? 0.9f : 0.0f, .seed = 5, .max_tokens = 12, .ignore_eos = true};
    request.sampling.return_logits = true;
    request.sampling.presence_penalty = i % 4 == 1 ? 0.5f : 0.0f;
    requests.push_back(std::move(request));
  }
  return requests;
}

TEST(ReplayClusterTest, SameBitsAsOneRank) {
  Harness one(Options(1), {});
  ASSERT_TRUE(one.ok());
  const auto expected = one.Run(Requests());
  for (const int ranks : {4, 16}) {
    ThreadWorkers workers;
    {
      Harness cluster(CreateCluster(workers, ranks), {});
      ASSERT_TRUE(cluster.ok());
      const auto outputs = cluster.Run(Requests());
      ASSERT_EQ(outputs.size(), expected.size());
      for (size_t r = 0; r < outputs.size(); ++r) {
        EXPECT_EQ(outputs[r][0].tokens, expected[r][0].tokens) << ranks << " ranks, request " << r;
        EXPECT_EQ(outputs[r][0].logits, expected[r][0].logits) << ranks << " ranks, request " << r;
      }
      EXPECT_GT(cluster.loop().Load().replays, 0);
    }
    for (const absl::Status& status : workers.Join()) EXPECT_EQ(status, absl::OkStatus());
  }
}

}  // namespace
}  // namespace soloist
