// Two micro-batches through the dispatcher at once: the rows of each reach their experts, and what goes wrong ends
// both.
#include <atomic>
#include <numeric>
#include <random>

#include "gtest/gtest.h"
#include "tests/comm/dispatcher_harness.h"

namespace soloist {
namespace {

constexpr int kMaxTokens = 12;

DispatcherOptions Options(int ranks, DispatchLayout layout) {
  DispatcherOptions options = {.hidden_size = 16,
                               .num_experts = 8,
                               .top_k = 2,
                               .max_tokens_per_rank = kMaxTokens,
                               .masked_max_tokens = layout == DispatchLayout::kMasked ? kMaxTokens : 0};
  for (int e = 0; e < options.num_experts; ++e) options.expert_rank.push_back(e * ranks / options.num_experts);
  return options;
}

TEST(DispatcherOverlapTest, EveryRowReachesItsExpertAndComesBack) {
  std::mt19937 random(11);
  for (const int ranks : {1, 2, 4, 8}) {
    for (const auto layout : {DispatchLayout::kMasked, DispatchLayout::kContiguous}) {
      const DispatcherOptions options = Options(ranks, layout);
      DispatcherGroup group(ranks, options);
      for (uint32_t step = 0; step < 12; ++step) {
        std::vector<std::vector<int>> homes(ranks);
        std::vector<int> seconds;
        int count = 0;
        for (std::vector<int>& home : homes) {
          // Full homes too, and all of them in the last steps.
          home.resize(step > 9 ? kMaxTokens : random() % (kMaxTokens + 1));
          std::iota(home.begin(), home.end(), count);
          count += static_cast<int>(home.size());
          // Empty halves too.
          seconds.push_back(step == 10 ? 0 : static_cast<int>(random() % (home.size() + 1)));
        }
        std::vector<RoutedToken> tokens = RandomTokens(count, options, true, step);
        // All rows to the same experts: as many as a rank can ever get.
        if (step > 9) {
          for (RoutedToken& token : tokens) token.experts = {3, 2};
        }
        const auto outputs = group.StepInTwo(tokens, homes, seconds, layout);
        for (int t = 0; t < count; ++t) {
          EXPECT_TRUE(SameBits(outputs[t], ReferenceOutput(tokens[t]))) << ranks << " ranks, step " << step;
        }
        // Steps of one micro-batch between them, through the same buffers.
        const auto alone = group.Step(tokens, homes, layout);
        for (int t = 0; t < count; ++t) EXPECT_TRUE(SameBits(outputs[t], alone[t]));
      }
    }
  }
}

class DispatcherOverlapFailureTest : public testing::TestWithParam<DispatchLayout> {
 protected:
  // Starts both dispatches of two tokens a rank.
  static void StartBoth(DispatcherGroup& group, TestRank& rank, const DispatcherGroup::Inputs (&in)[kMaxMicroBatches],
                        CommTimes& times) {
    TokenDispatcher& dispatcher = group.dispatcher(rank.id());
    dispatcher.queue().BeginStep(/*overlaps=*/true, &times);
    for (int i = 0; i < kMaxMicroBatches; ++i) {
      ASSERT_EQ(dispatcher.StartDispatch(i, {in[i].x, in[i].experts, in[i].weights, {2}, in[i].counts}, *rank.stream),
                absl::OkStatus());
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Layouts, DispatcherOverlapFailureTest,
                         testing::Values(DispatchLayout::kMasked, DispatchLayout::kContiguous), [](const auto& info) {
                           return info.param == DispatchLayout::kMasked ? "Masked" : "Contiguous";
                         });

// A rank that never comes: the first job ends by the deadline, the second does not start, the thread is free again.
TEST_P(DispatcherOverlapFailureTest, AMissingRankEndsBoth) {
  const DispatcherOptions options = Options(2, GetParam());
  DispatcherGroup group(2, options, absl::Milliseconds(300));
  const std::vector<RoutedToken> tokens = RandomTokens(2, options, true, 6);
  group.group().Run([&](TestRank& rank) {
    if (rank.id() == 1) return;
    const DispatcherGroup::Inputs in[] = {group.MakeInputs(rank, tokens, {0}), group.MakeInputs(rank, tokens, {1})};
    CommTimes times;
    StartBoth(group, rank, in, times);
    for (int i = 0; i < kMaxMicroBatches; ++i) {
      const absl::Status status = group.dispatcher(0).FinishDispatch(i, *rank.stream).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
      EXPECT_NE(status.message().find("rank 1"), std::string::npos) << status;
    }
  });
}

// Aborted from elsewhere while both are under way, one of them in a collective that cannot end.
TEST_P(DispatcherOverlapFailureTest, AnAbortEndsBoth) {
  const DispatcherOptions options = Options(2, GetParam());
  DispatcherGroup group(2, options);
  const std::vector<RoutedToken> tokens = RandomTokens(2, options, true, 6);
  std::atomic<bool> started = false;
  group.group().Run([&](TestRank& rank) {
    if (rank.id() == 1) {
      started.wait(false);
      rank.comm->Abort(absl::UnavailableError("a cable was pulled"));
      return;
    }
    const DispatcherGroup::Inputs in[] = {group.MakeInputs(rank, tokens, {0}), group.MakeInputs(rank, tokens, {1})};
    CommTimes times;
    StartBoth(group, rank, in, times);
    started = true;
    started.notify_all();
    const absl::Status status = group.dispatcher(0).FinishDispatch(0, *rank.stream).status();
    EXPECT_EQ(status.message(), "a cable was pulled");
    group.dispatcher(0).queue().Abandon(status);
  });
}

// The caller fails while its collectives wait for a rank that will not come: Abandon takes them back.
TEST_P(DispatcherOverlapFailureTest, AbandonTakesBackWhatWasStarted) {
  const DispatcherOptions options = Options(2, GetParam());
  DispatcherGroup group(2, options);
  const std::vector<RoutedToken> tokens = RandomTokens(2, options, true, 6);
  TestRank& rank = group.group().ranks[0];
  const DispatcherGroup::Inputs in[] = {group.MakeInputs(rank, tokens, {0}), group.MakeInputs(rank, tokens, {1})};
  CommTimes times;
  StartBoth(group, rank, in, times);
  group.dispatcher(0).queue().Abandon(absl::InternalError("the device has failed"));
  EXPECT_EQ(rank.comm->error().message(), "the device has failed");
  EXPECT_EQ(group.dispatcher(0).FinishDispatch(0, *rank.stream).status(), absl::OkStatus()) << "nothing is started";
  // And the next step's error is its own.
  StartBoth(group, rank, in, times);
  EXPECT_EQ(group.dispatcher(0).FinishDispatch(0, *rank.stream).status().message(), "the device has failed");
  EXPECT_FALSE(group.dispatcher(0).FinishDispatch(1, *rank.stream).ok());
}

// Jobs run in the order in which they were started, each once, and none behind one that failed.
TEST(CommQueueTest, OrderAndErrors) {
  TestGroup group = SharedMemoryTestGroup(1);
  TestRank& rank = group.ranks[0];
  CommQueue queue(*rank.device, *rank.comm);
  CommTimes times;
  std::vector<int> ran;
  const auto start = [&](int micro_batch, int number, const absl::Status& status) {
    return queue.Start(
        micro_batch, "job",
        [&ran, number, status](Stream&) {
          ran.push_back(number);
          return status;
        },
        *rank.stream);
  };
  for (const bool overlaps : {false, true}) {
    ran.clear();
    queue.BeginStep(overlaps, &times);
    for (int layer = 0; layer < 50; ++layer) {
      for (int i = 0; i < kMaxMicroBatches; ++i) {
        ASSERT_EQ(queue.Finish(i, *rank.stream), absl::OkStatus());
        ASSERT_EQ(start(i, kMaxMicroBatches * layer + i, absl::OkStatus()), absl::OkStatus());
      }
    }
    for (int i = 0; i < kMaxMicroBatches; ++i) ASSERT_EQ(queue.Finish(i, *rank.stream), absl::OkStatus());
    std::vector<int> expected(100);
    std::iota(expected.begin(), expected.end(), 0);
    EXPECT_EQ(ran, expected);
    EXPECT_EQ(times.size(), 100);
    if (!overlaps) {
      EXPECT_GE(times.wait_ns(), times.busy_ns()) << "in line, all of it is waited for";
    }
  }
  ran.clear();
  queue.BeginStep(true, &times);
  ASSERT_EQ(start(0, 0, absl::DataLossError("lost")), absl::OkStatus());
  ASSERT_EQ(start(1, 1, absl::OkStatus()), absl::OkStatus());
  EXPECT_EQ(queue.Finish(1, *rank.stream).message(), "lost");
  EXPECT_EQ(queue.Finish(0, *rank.stream).message(), "lost");
  EXPECT_EQ(ran, std::vector<int>{0});
  queue.BeginStep(false, nullptr);
  EXPECT_EQ(start(0, 2, absl::DataLossError("lost again")).message(), "lost again");
}

}  // namespace
}  // namespace soloist
