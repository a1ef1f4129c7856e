// What a dispatcher refuses, and what happens where a promise to it is broken: no row is lost in silence.
#include <algorithm>

#include "gtest/gtest.h"
#include "tests/comm/dispatcher_harness.h"

namespace soloist {
namespace {

DispatcherOptions FourExperts(int ranks) {
  DispatcherOptions options = {.hidden_size = 8,
                               .num_experts = 4,
                               .top_k = 2,
                               .max_tokens_per_rank = 6,
                               .expert_rank = {0, 0, 0, 0},
                               .masked_max_tokens = 6};
  for (int e = 0; e < 4; ++e) options.expert_rank[e] = e * ranks / 4;
  return options;
}

TEST(DispatcherFailureTest, CreateRefusesBadOptions) {
  TestGroup group = SharedMemoryTestGroup(2);
  const auto code = [&](auto change) {
    DispatcherOptions options = FourExperts(2);
    change(options);
    return CreateTokenDispatcher(options, *group.ranks[0].device, *group.ranks[0].comm).status().code();
  };
  using Options = DispatcherOptions;
  EXPECT_EQ(code([](Options&) {}), absl::StatusCode::kOk);
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](Options& o) { o.expert_rank[3] = 2; }), kInvalid);
  EXPECT_EQ(code([](Options& o) { o.expert_rank[0] = -1; }), kInvalid);
  EXPECT_EQ(code([](Options& o) { o.expert_rank.pop_back(); }), kInvalid);
  EXPECT_EQ(code([](Options& o) { o.expert_rank.push_back(0); }), kInvalid);
  EXPECT_EQ(code([](Options& o) { o.hidden_size = 0; }), kInvalid);
  EXPECT_EQ(code([](Options& o) { o.top_k = 0; }), kInvalid);
  EXPECT_EQ(code([](Options& o) { o.top_k = 5; }), kInvalid);
  EXPECT_EQ(code([](Options& o) { o.max_tokens_per_rank = 0; }), kInvalid);
  EXPECT_EQ(code([](Options& o) { o.masked_max_tokens = -1; }), kInvalid);
  EXPECT_EQ(code([](Options& o) { o.max_tokens_per_rank = int64_t{1} << 40; }), kInvalid) << "slots are int32";
  EXPECT_EQ(code([](Options& o) {
              o.dtype = DType::kBF16;
              o.hidden_size = 7;
            }),
            kInvalid)
      << "counts behind such a row would not be aligned";
}

// A capacity below what a home has is a bug of the caller, never a reason to drop a token.
TEST(DispatcherFailureDeathTest, CapacityBelowTheTokensDies) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  DispatcherGroup group(1, FourExperts(1));
  const std::vector<RoutedToken> tokens = RandomTokens(7, FourExperts(1), true, 1);
  TestRank& rank = group.group().ranks[0];
  const auto dispatch = [&](const std::vector<int>& mine, int64_t max_tokens, int64_t masked_rows = 0) {
    const DispatcherGroup::Inputs in = group.MakeInputs(rank, tokens, mine);
    (void)group.dispatcher(0).Dispatch(in.x, in.experts, in.weights, {max_tokens, masked_rows}, in.counts,
                                       *rank.stream);
  };
  EXPECT_DEATH(dispatch({0, 1, 2}, 2), "max_tokens");
  EXPECT_DEATH(dispatch({0, 1, 2}, 7), "max_tokens_per_rank");
  EXPECT_DEATH(dispatch({0, 1, 2, 3, 4, 5, 6}, 7), "max_tokens_per_rank");
  EXPECT_DEATH(dispatch({0, 1, 2}, 3, 4), "masked_rows");
  dispatch({0, 1, 2}, 3);
}

// Masked, a token that chooses an expert twice overflows that expert's room. The counts travel along: the receiver sees
// the true count, above the capacity, so the step can be refused (Ops::ExpertMlp checks it).
TEST(DispatcherFailureTest, MaskedOverflowShowsInTheCounts) {
  for (const int ranks : {1, 2, 4}) {
    const DispatcherOptions options = FourExperts(ranks);
    DispatcherGroup group(ranks, options);
    std::vector<RoutedToken> tokens = RandomTokens(5 * ranks, options, true, 3);
    for (RoutedToken& token : tokens) token.experts = {0, 0};
    group.group().Run([&](TestRank& rank) {
      std::vector<int> mine;
      for (int i = 0; i < 5; ++i) mine.push_back(rank.id() * 5 + i);
      const DispatcherGroup::Inputs in = group.MakeInputs(rank, tokens, mine);
      // Capacity 6, so that the second choices do not leave the send buffer whatever the number of ranks.
      const auto handle =
          group.dispatcher(rank.id()).Dispatch(in.x, in.experts, in.weights, {6}, in.counts, *rank.stream);
      ASSERT_EQ(handle.status(), absl::OkStatus());
      int64_t received = 0;
      for (const ExpertRows& rows : handle->groups) {
        const int32_t count = rank.Download<int32_t>(rows.row_count, 1)[0];
        received += count;
        EXPECT_EQ(count > rows.row_capacity, rank.id() == 0 && rows.expert == 0) << count;
      }
      EXPECT_EQ(received, rank.id() == 0 ? 10 * ranks : 0);
    });
  }
}

// Contiguous, the rows are exact; what does not fit the receiver's buffer is an error there.
TEST(DispatcherFailureTest, ContiguousOverflowIsAnError) {
  DispatcherOptions options = FourExperts(4);
  options.masked_max_tokens = 0;
  DispatcherGroup group(4, options);
  std::vector<RoutedToken> tokens = RandomTokens(6 * 4, options, true, 4);
  for (RoutedToken& token : tokens) token.experts = {1, 1};
  group.group().Run([&](TestRank& rank) {
    std::vector<int> mine;
    for (int i = 0; i < 6; ++i) mine.push_back(rank.id() * 6 + i);
    const DispatcherGroup::Inputs in = group.MakeInputs(rank, tokens, mine);
    const auto handle =
        group.dispatcher(rank.id()).Dispatch(in.x, in.experts, in.weights, {6}, in.counts, *rank.stream);
    EXPECT_EQ(handle.status().code(), absl::StatusCode::kInternal) << handle.status();
    EXPECT_NE(handle.status().message().find("48 rows come to rank 1"), std::string::npos) << handle.status();
    // As a worker does with its first error; the others wait for this rank.
    if (!handle.ok() && rank.id() == 1) rank.comm->Abort(handle.status());
  });
}

// The step's numbers must be the same on all ranks. Where they are not, all ranks fail.
TEST(DispatcherFailureTest, RanksThatDisagreeOnTheStepFail) {
  for (const int64_t masked_max_tokens : {6, 2}) {  // both masked; rank 0 masked, rank 1 contiguous
    DispatcherOptions options = FourExperts(2);
    options.masked_max_tokens = masked_max_tokens;
    DispatcherGroup group(2, options);
    const std::vector<RoutedToken> tokens = RandomTokens(2, options, true, 5);
    group.group().Run([&](TestRank& rank) {
      const DispatcherGroup::Inputs in = group.MakeInputs(rank, tokens, {rank.id()});
      const auto handle = group.dispatcher(rank.id()).Dispatch(in.x, in.experts, in.weights, {2 + 2 * rank.id()},
                                                               in.counts, *rank.stream);
      EXPECT_EQ(handle.status().code(), absl::StatusCode::kInternal) << handle.status();
    });
  }
}

// The room is one of those numbers.
TEST(DispatcherFailureTest, RanksThatDisagreeOnTheRoomFail) {
  DispatcherGroup group(2, FourExperts(2));
  const std::vector<RoutedToken> tokens = RandomTokens(2, FourExperts(2), true, 5);
  group.group().Run([&](TestRank& rank) {
    const DispatcherGroup::Inputs in = group.MakeInputs(rank, tokens, {rank.id()});
    const auto handle =
        group.dispatcher(rank.id()).Dispatch(in.x, in.experts, in.weights, {4, 2 + rank.id()}, in.counts, *rank.stream);
    EXPECT_EQ(handle.status().code(), absl::StatusCode::kInternal) << handle.status();
  });
}

// A rank that is missing in Dispatch, then in Combine.
TEST(DispatcherFailureTest, MissingRankEndsByTheDeadline) {
  for (const int64_t masked_max_tokens : {6, 0}) {
    for (const bool dispatches : {false, true}) {
      DispatcherOptions options = FourExperts(2);
      options.masked_max_tokens = masked_max_tokens;
      DispatcherGroup group(2, options, absl::Milliseconds(300));
      const std::vector<RoutedToken> tokens = RandomTokens(2, options, true, 6);
      group.group().Run([&](TestRank& rank) {
        if (rank.id() == 1 && !dispatches) return;
        const DispatcherGroup::Inputs in = group.MakeInputs(rank, tokens, {rank.id()});
        const auto handle =
            group.dispatcher(rank.id()).Dispatch(in.x, in.experts, in.weights, {1}, in.counts, *rank.stream);
        absl::Status status = rank.Finish(handle.status());
        if (dispatches) {
          ASSERT_EQ(status, absl::OkStatus());
          if (rank.id() == 1) return;
          status = rank.Finish(group.dispatcher(0).Combine(*handle, {.delta = in.x}, *rank.stream));
        }
        EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
        EXPECT_NE(status.message().find("rank 1"), std::string::npos) << status;
      });
    }
  }
}

}  // namespace
}  // namespace soloist
