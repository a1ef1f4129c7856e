// Ranks that are missing, abort or die: the others get a clear status, soon, and their communicators can be destroyed.
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/gpu/nccl_group.h"

namespace soloist {
namespace {

constexpr int64_t kBytes = 4096;

class NcclFailure : public testing::Test {
 protected:
  static int me() { return NcclFlags().rank; }
  static int size() { return NcclFlags().size; }
  static int last() { return size() - 1; }
  static void Say(const char* what, const absl::Status& status, absl::Duration after) {
    if (me() != 0) return;
    std::printf("  %s: after %s: %s\n", what, absl::FormatDuration(absl::Trunc(after, absl::Milliseconds(1))).c_str(),
                status.ToString().c_str());
  }
  // Buffers for one all-to-all.
  struct Buffers {
    explicit Buffers(TestRank& rank)
        : send(rank.Filled(kBytes * rank.size(), 1)), recv(rank.Filled(kBytes * rank.size(), 2)) {}
    Buffer send, recv;
  };
  static absl::Status AllToAll(TestRank& rank, const Buffers& b) {
    return rank.comm->AllToAll(b.send.data(), b.recv.data(), kBytes, *rank.stream);
  }
  static void ExpectLeavesSoon(TestRank& rank) {
    const absl::Time begin = absl::Now();
    rank.comm.reset();
    EXPECT_LT(absl::Now() - begin, absl::Seconds(8));
  }
};

TEST_F(NcclFailure, AMissingRankIsNamedWhenTheGroupIsMade) {
  FileStore store("missing");
  TestRank rank = MakeBareRank();
  const auto comm =
      CreateNcclCommunicator(me(), size() + 1, store, *rank.device, {.comm = {.timeout = absl::Seconds(3)}});
  ASSERT_EQ(comm.status().code(), absl::StatusCode::kDeadlineExceeded) << comm.status();
  EXPECT_NE(comm.status().message().find(absl::StrCat("waits for rank ", size())), std::string::npos) << comm.status();
}

TEST_F(NcclFailure, TwoRanksAlikeAreRefused) {
  FileStore store("alike");
  TestRank rank = MakeBareRank();
  const auto comm = CreateNcclCommunicator(0, size() + 1, store, *rank.device, {.comm = {.timeout = absl::Seconds(3)}});
  // The first to come waits for the others, who never come as themselves.
  if (comm.status().code() != absl::StatusCode::kDeadlineExceeded) {
    EXPECT_EQ(comm.status().code(), absl::StatusCode::kAlreadyExists) << comm.status();
    EXPECT_NE(comm.status().message().find("rank 0"), std::string::npos) << comm.status();
  }
}

TEST_F(NcclFailure, SizesThatDifferWithinARank) {
  FileStore store("sizes");
  TestRank rank = MakeNcclRank(store, absl::Seconds(30));
  const Buffers b(rank);
  std::vector<int64_t> sends(size(), 64), expects(size(), 64), offsets(size(), 0);
  sends[me()] = 60;
  const absl::Status status =
      rank.comm->AllToAllV(b.send.data(), sends, offsets, b.recv.data(), expects, offsets, *rank.stream);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_EQ(rank.comm->error(), status);
  EXPECT_EQ(rank.comm->Barrier(*rank.stream), status) << "the first error stays";
  ExpectLeavesSoon(rank);
}

TEST_F(NcclFailure, TheDeadlineNamesTheMissingRank) {
  if (size() == 1) GTEST_SKIP() << "nobody can be missing";
  FileStore store("deadline");
  TestRank rank = MakeNcclRank(store, absl::Seconds(4));
  const Buffers b(rank);
  ASSERT_EQ(store.Meet("made", size()), absl::OkStatus());
  if (me() != last()) {
    const absl::Time begin = absl::Now();
    const absl::Status status = Outcome(rank, AllToAll(rank, b));
    const absl::Duration took = absl::Now() - begin;
    Say("a rank does not come", status, took);
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    EXPECT_NE(status.message().find("AllToAll"), std::string::npos) << status;
    EXPECT_NE(status.message().find(absl::StrCat("waits for rank ", last())), std::string::npos) << status;
    EXPECT_EQ(status.message().find(", rank"), std::string::npos) << "only that one: " << status;
    EXPECT_GE(took, absl::Seconds(4));
    EXPECT_LT(took, absl::Seconds(12));
    EXPECT_EQ(rank.comm->error(), status);
    EXPECT_EQ(AllToAll(rank, b), status);
    ExpectLeavesSoon(rank);
  }
  // Whoever did not come leaves when the others have gone.
  ASSERT_EQ(store.Meet("gone", me() == last() ? size() : 0), absl::OkStatus());
  if (rank.comm != nullptr) ExpectLeavesSoon(rank);
}

// Of its own, so that each process ends within its limit where many ranks share a GPU.
class NcclAbort : public NcclFailure {};

// From another thread, while the device waits for peers. Rank 0 alone calls: a peer that aborted first would be
// noticed.
TEST_F(NcclAbort, EndsACollective) {
  if (size() == 1) GTEST_SKIP() << "nobody waits";
  FileStore store("abort");
  TestRank rank = MakeNcclRank(store, absl::Seconds(40));
  const Buffers b(rank);
  ASSERT_EQ(store.Meet("made", size()), absl::OkStatus());
  if (me() == 0) {
    const absl::Status reason = absl::CancelledError("the test says so");
    const absl::Time begin = absl::Now();
    std::thread aborts([&] {
      absl::SleepFor(absl::Milliseconds(300));
      rank.comm->Abort(reason);
      rank.comm->Abort(absl::InternalError("a later reason, which is not the first"));
    });
    const absl::Status status = Outcome(rank, AllToAll(rank, b));
    aborts.join();
    Say("aborted", status, absl::Now() - begin);
    EXPECT_EQ(status, reason);
    EXPECT_LT(absl::Now() - begin, absl::Seconds(6));
    EXPECT_EQ(AllToAll(rank, b), reason);
    EXPECT_EQ(rank.comm->Barrier(*rank.stream), reason);
    ExpectLeavesSoon(rank);
  }
  ASSERT_EQ(store.Meet("gone", me() == 0 ? 0 : 1), absl::OkStatus());
  if (rank.comm != nullptr) ExpectLeavesSoon(rank);
}

// As a worker has it: a step's graph hangs, the leader says abort, the graph is destroyed, then the communicator.
TEST_F(NcclAbort, EndsAGraph) {
  if (size() == 1) GTEST_SKIP() << "nobody waits";
  FileStore store("graph");
  TestRank rank = MakeNcclRank(store, absl::Seconds(40));
  if (!rank.device->can_capture()) GTEST_SKIP() << "no graphs on this device";
  const Buffers b(rank);
  auto graph = rank.device->Capture(*rank.stream, [&] {
    absl::Status status = AllToAll(rank, b);
    if (status.ok()) status = AllToAll(rank, b);
    return status;
  });
  ASSERT_TRUE(graph.ok()) << graph.status();
  ASSERT_EQ(Outcome(rank, rank.device->Launch(**graph, *rank.stream)), absl::OkStatus());
  ASSERT_EQ(store.Meet("made", size()), absl::OkStatus());
  if (me() == 0) {
    const absl::Status reason = absl::CancelledError("the leader says so");
    const absl::Time begin = absl::Now();
    std::thread aborts([&] {
      absl::SleepFor(absl::Milliseconds(300));
      rank.comm->Abort(reason);
    });
    const absl::Status status = Outcome(rank, rank.device->Launch(**graph, *rank.stream));
    aborts.join();
    Say("aborted in a graph", status, absl::Now() - begin);
    EXPECT_EQ(status, reason);
    EXPECT_LT(absl::Now() - begin, absl::Seconds(6));
  }
  graph->reset();
  if (me() == 0) ExpectLeavesSoon(rank);
  ASSERT_EQ(store.Meet("gone", me() == 0 ? 0 : 1), absl::OkStatus());
  if (rank.comm != nullptr) ExpectLeavesSoon(rank);
}

// After an abort the same processes make a new communicator, as a group does that has lost a rank.
TEST_F(NcclAbort, ANewGroupFollows) {
  {
    FileStore store("old");
    TestRank rank = MakeNcclRank(store, absl::Seconds(30));
    ASSERT_EQ(store.Meet("made", size()), absl::OkStatus());
    rank.comm->Abort(absl::UnavailableError("rank 5 is lost"));
    EXPECT_EQ(rank.comm->Barrier(*rank.stream).code(), absl::StatusCode::kUnavailable);
  }
  FileStore store("new");
  TestRank rank = MakeNcclRank(store, absl::Seconds(30));
  const Buffer send = rank.Upload(Pattern(1, me(), 0, kBytes)), recv = rank.Filled(kBytes * size(), 0);
  ASSERT_EQ(Outcome(rank, rank.comm->AllGather(send.data(), recv.data(), kBytes, *rank.stream)), absl::OkStatus());
  std::vector<uint8_t> expected;
  for (int r = 0; r < size(); ++r) Append(expected, Pattern(1, r, 0, kBytes));
  EXPECT_TRUE(rank.Download(recv.data(), kBytes * size()) == expected);
}

// A process of its own each time: it ends in the middle of a run of collectives, without a word.
class NcclLoss : public NcclFailure {};

TEST_F(NcclLoss, ARankThatDies) {
  if (size() == 1) GTEST_SKIP() << "nobody is left";
  FileStore store("loss");
  TestRank rank = MakeNcclRank(store, absl::Seconds(15));
  const Buffers b(rank);
  for (int i = 0; i < 3; ++i) ASSERT_EQ(Outcome(rank, AllToAll(rank, b)), absl::OkStatus());
  ASSERT_EQ(store.Meet("ready", size()), absl::OkStatus());
  if (me() == last()) {
    std::printf("rank %d: 1 passed, 0 failed\n", me());
    std::fflush(stdout);
    _exit(0);
  }
  const absl::Time begin = absl::Now();
  absl::Status status;
  while (status.ok() && absl::Now() - begin < absl::Seconds(40)) status = Outcome(rank, AllToAll(rank, b));
  Say("a rank has died", status, absl::Now() - begin);
  EXPECT_TRUE(absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) << status;
  EXPECT_LT(absl::Now() - begin, absl::Seconds(25));
  EXPECT_EQ(AllToAll(rank, b), status);
  ExpectLeavesSoon(rank);
}

}  // namespace
}  // namespace soloist
