// Ranks that are missing, disagree, leave or abort: everybody gets a clear status, soon, and no buffer is touched after
// its owner has it back.
#include <atomic>
#include <latch>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/comm/communicator_contract.h"

namespace soloist {
namespace {

constexpr absl::Duration kDeadline = absl::Milliseconds(200);
constexpr absl::Duration kSoon = absl::Seconds(15);  // far below kLong, far above a loaded machine's pauses

// Each operation once, on small buffers of its own; the peer of Send and Recv is rank 0 or, there, the last rank.
struct NamedCall {
  const char* name;
  std::function<absl::Status(TestRank& rank, int peer)> call;
};

// Keeps a call's buffers until the rank is done with them.
struct Buffers {
  explicit Buffers(TestRank& rank)
      : send(rank.Filled(64 * rank.size(), 1)),
        recv(rank.Filled(64 * rank.size(), 2)),
        bytes(rank.size(), 64),
        offsets(rank.size()) {
    for (int r = 0; r < rank.size(); ++r) offsets[r] = 64 * r;
  }
  Buffer send, recv;
  std::vector<int64_t> bytes, offsets;
};

const std::vector<NamedCall>& Collectives() {
  static const auto& calls = *new std::vector<NamedCall>{
      {"AllToAll",
       [](TestRank& r, int) {
         const Buffers b(r);
         return r.Finish(r.comm->AllToAll(b.send.data(), b.recv.data(), 64, *r.stream));
       }},
      {"AllToAllV",
       [](TestRank& r, int) {
         const Buffers b(r);
         return r.Finish(
             r.comm->AllToAllV(b.send.data(), b.bytes, b.offsets, b.recv.data(), b.bytes, b.offsets, *r.stream));
       }},
      {"AllReduceSum",
       [](TestRank& r, int) {
         const Buffers b(r);
         return r.Finish(r.comm->AllReduceSum(static_cast<float*>(b.recv.data()), 16, *r.stream));
       }},
      {"AllGather",
       [](TestRank& r, int) {
         const Buffers b(r);
         return r.Finish(r.comm->AllGather(b.send.data(), b.recv.data(), 64, *r.stream));
       }},
      {"Broadcast",
       [](TestRank& r, int peer) {
         const Buffers b(r);
         return r.Finish(r.comm->Broadcast(b.recv.data(), 64, peer, *r.stream));
       }},
      {"Barrier", [](TestRank& r, int) { return r.Finish(r.comm->Barrier(*r.stream)); }},
  };
  return calls;
}

const std::vector<NamedCall>& PairCalls() {
  static const auto& calls = *new std::vector<NamedCall>{
      {"Send",
       [](TestRank& r, int peer) {
         const Buffers b(r);
         return r.Finish(r.comm->Send(b.send.data(), 64, peer, *r.stream));
       }},
      {"Recv",
       [](TestRank& r, int peer) {
         const Buffers b(r);
         return r.Finish(r.comm->Recv(b.recv.data(), 64, peer, *r.stream));
       }},
  };
  return calls;
}

// The ranks that `message` speaks of as "rank N".
std::set<int> RanksNamed(const absl::Status& status) {
  const std::string message(status.message());
  std::set<int> ranks;
  for (size_t at = message.find("rank "); at != std::string::npos; at = message.find("rank ", at + 1)) {
    if (at + 5 < message.size() && std::isdigit(static_cast<unsigned char>(message[at + 5]))) {
      ranks.insert(std::stoi(message.substr(at + 5)));
    }
  }
  return ranks;
}

void ExpectFailsWith(const absl::Status& reason, TestRank& rank) {
  EXPECT_EQ(rank.comm->error(), reason);
  for (const NamedCall& named : Collectives()) EXPECT_EQ(named.call(rank, 0), reason) << named.name;
  if (rank.size() == 1) return;
  for (const NamedCall& named : PairCalls()) {
    EXPECT_EQ(named.call(rank, (rank.id() + 1) % rank.size()), reason) << named.name;
  }
}

TEST_P(CommunicatorContract, AbortIsFinalAndIdempotent) {
  TestGroup group = Make();
  group.Run([](TestRank& rank) { ASSERT_EQ(rank.Finish(rank.comm->Barrier(*rank.stream)), absl::OkStatus()); });
  const absl::Status reason = absl::CancelledError("the test says so");
  group.ranks.back().comm->Abort(reason);
  group.ranks.front().comm->Abort(absl::InternalError("a later reason, which is not the first"));
  group.Run([&](TestRank& rank) { ExpectFailsWith(reason, rank); });
}

TEST_P(CommunicatorContract, AbortEndsWaitingRanks) {
  if (size() == 1) GTEST_SKIP() << "nobody waits";
  std::vector<NamedCall> calls = Collectives();
  calls.insert(calls.end(), PairCalls().begin(), PairCalls().end());
  for (const NamedCall& named : calls) {
    TestGroup group = Make();
    const absl::Status reason = absl::UnavailableError(absl::StrCat("aborted in ", named.name));
    const absl::Time start = absl::Now();
    const int absent = size() - 1;
    group.Run([&](TestRank& rank) {
      if (rank.id() == absent) {
        absl::SleepFor(absl::Milliseconds(30));
        rank.comm->Abort(reason);
      } else {
        EXPECT_EQ(named.call(rank, absent), reason) << named.name << ", rank " << rank.id();
      }
      EXPECT_EQ(rank.comm->error(), reason);
      EXPECT_EQ(rank.Finish(rank.comm->Barrier(*rank.stream)), reason);
    });
    EXPECT_LT(absl::Now() - start, kSoon) << named.name;
  }
}

// From a thread that is no rank's.
TEST_P(CommunicatorContract, AbortFromAnotherThread) {
  if (size() == 1) GTEST_SKIP() << "nobody waits";
  TestGroup group = Make();
  const absl::Status reason = absl::DataLossError("from outside");
  std::thread outsider([&] {
    absl::SleepFor(absl::Milliseconds(30));
    group.ranks[size() - 1].comm->Abort(reason);
  });
  group.Run([&](TestRank& rank) {
    if (rank.id() == 0) return;
    EXPECT_EQ(Collectives()[0].call(rank, 0), size() > 1 ? reason : absl::OkStatus());
  });
  outsider.join();
  EXPECT_EQ(group.ranks[0].comm->error(), reason);
}

TEST_P(CommunicatorContract, DeadlineNamesOperationAndMissingRanks) {
  if (size() == 1) GTEST_SKIP() << "nobody can be missing";
  for (const NamedCall& named : Collectives()) {
    TestGroup group = Make(kDeadline);
    std::set<int> missing = {size() - 1};
    if (size() > 3) missing.insert(1);
    std::latch all_run(size() - std::ssize(missing));  // so that a thread that starts late is not missing too
    const absl::Time start = absl::Now();
    group.Run([&](TestRank& rank) {
      if (missing.contains(rank.id())) return;
      all_run.arrive_and_wait();
      const absl::Status status = named.call(rank, 0);
      EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
      EXPECT_NE(status.message().find(named.name), std::string::npos) << status;
      std::set<int> named_ranks = RanksNamed(status);
      for (const int r : missing) EXPECT_EQ(named_ranks.erase(r), 1u) << "rank " << r << " is missing: " << status;
      named_ranks.erase(0);  // the root
      named_ranks.erase(0);  // the root
      EXPECT_LE(named_ranks.size(), 1u) << "besides the root only the reporting rank may be named: " << status;
      EXPECT_EQ(rank.comm->error(), status) << "all ranks have the first error";
    });
    EXPECT_GE(absl::Now() - start, kDeadline) << named.name;
    EXPECT_LT(absl::Now() - start, kSoon) << named.name;
    const absl::Status first = group.ranks[0].comm->error();
    for (TestRank& rank : group.ranks) EXPECT_EQ(rank.Finish(rank.comm->Barrier(*rank.stream)), first);
  }
}

TEST_P(CommunicatorContract, DeadlineOfSendAndRecvNamesThePeer) {
  if (size() == 1) GTEST_SKIP() << "no peer";
  for (const NamedCall& named : PairCalls()) {
    TestGroup group = Make(absl::Milliseconds(200));
    const int absent = size() - 1;
    const absl::Status status = named.call(group.ranks[0], absent);
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    EXPECT_NE(status.message().find(named.name), std::string::npos) << status;
    EXPECT_TRUE(RanksNamed(status).contains(absent)) << status;
    EXPECT_EQ(group.ranks[absent].comm->error(), status);
  }
}

// A rank that is later than the deadline must not find the buffers of those that gave up: it gets their error.
TEST_P(CommunicatorContract, TooLateGetsTheError) {
  if (size() == 1) GTEST_SKIP() << "nobody can be late";
  TestGroup group = Make(absl::Milliseconds(100));
  group.Run([&](TestRank& rank) {
    if (rank.id() == 0) absl::SleepFor(absl::Milliseconds(400));
    EXPECT_EQ(Collectives()[0].call(rank, 0).code(), absl::StatusCode::kDeadlineExceeded);
  });
}

TEST_P(CommunicatorContract, NoDeadlineMeansNone) {
  TestGroup group = Make(absl::InfiniteDuration());
  group.Run([&](TestRank& rank) {
    if (rank.id() == 0) absl::SleepFor(absl::Milliseconds(100));
    for (const NamedCall& named : Collectives()) EXPECT_EQ(named.call(rank, 0), absl::OkStatus()) << named.name;
  });
}

TEST_P(CommunicatorContract, AllToAllVSizesThatDifferAreInternal) {
  TestGroup group = Make();
  group.Run([&](TestRank& rank) {
    Buffers b(rank);
    if (rank.id() == 0) b.bytes[size() - 1] = 60;  // sends 60 to the last rank, which expects 64
    const std::vector<int64_t> expects(rank.size(), 64);
    const absl::Status status = rank.Finish(
        rank.comm->AllToAllV(b.send.data(), b.bytes, b.offsets, b.recv.data(), expects, b.offsets, *rank.stream));
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
    EXPECT_NE(status.message().find("AllToAllV"), std::string::npos) << status;
    EXPECT_EQ(rank.comm->error(), status);
  });
}

// "Anything else deadlocks, and ends by the deadline", or is noticed before.
TEST_P(CommunicatorContract, RanksThatDisagreeAllFail) {
  if (size() == 1) GTEST_SKIP() << "nobody to disagree with";
  const std::vector<std::function<absl::Status(TestRank&, bool)>> disagreements = {
      [](TestRank& r, bool odd) { return Collectives()[odd ? 3 : 5].call(r, 0); },  // AllGather, Barrier
      [](TestRank& r, bool odd) { return Collectives()[4].call(r, odd ? 1 : 0); },  // roots of Broadcast
      [](TestRank& r, bool odd) {                                                   // sizes
        const Buffers b(r);
        return r.Finish(r.comm->AllToAll(b.send.data(), b.recv.data(), odd ? 32 : 64, *r.stream));
      },
      [](TestRank& r, bool odd) {  // sizes of a pair
        const Buffers b(r);
        if (r.id() > 1) return r.Finish(r.comm->Barrier(*r.stream));
        return r.Finish(odd ? r.comm->Send(b.send.data(), 32, 0, *r.stream)
                            : r.comm->Recv(b.recv.data(), 64, 1, *r.stream));
      },
  };
  for (size_t i = 0; i < disagreements.size(); ++i) {
    TestGroup group = Make(absl::Seconds(1));
    std::atomic<int> failed{0};
    group.Run([&](TestRank& rank) {
      const absl::Status status = disagreements[i](rank, rank.id() == 1);
      failed += status.ok() ? 0 : 1;
      EXPECT_EQ(rank.comm->error().ok(), false) << "disagreement " << i;
    });
    EXPECT_EQ(failed.load(), size()) << "disagreement " << i;
  }
}

// The last collective has succeeded for all, even where a peer has left at once after it.
TEST_P(CommunicatorContract, ARankMayLeaveAfterItsLastCollective) {
  const int rounds = Rounds(30, 10);
  for (int round = 0; round < rounds && !HasFailure(); ++round) {
    Make().Run([&](TestRank& rank) {
      const int n = rank.size();
      const Buffer send = rank.Upload(PatternBytes(round, rank.id(), 0, 512)), recv = rank.Filled(512 * n, 0);
      const absl::Status status = rank.Finish(rank.comm->AllGather(send.data(), recv.data(), 512, *rank.stream));
      rank.comm.reset();
      ASSERT_EQ(status, absl::OkStatus());
      for (int r = 0; r < n; ++r) {
        EXPECT_TRUE(rank.Download(static_cast<char*>(recv.data()) + 512 * r, 512) == PatternBytes(round, r, 0, 512));
      }
    });
  }
}

TEST_P(CommunicatorContract, WaitingForARankThatHasLeftEnds) {
  if (size() == 1) GTEST_SKIP() << "nobody can leave";
  TestGroup group = Make(absl::Seconds(2));
  group.Run([&](TestRank& rank) {
    if (rank.id() == 0) {
      rank.comm.reset();
    } else {
      EXPECT_FALSE(Collectives()[0].call(rank, 0).ok());
    }
  });
}

// Collectives with an abort or a deadline at a random moment. A rank that gets its buffer back, by success or failure,
// overwrites and frees it at once; whoever got OK must have whole data. (Address and thread sanitizer see more.)
TEST_P(CommunicatorContract, BuffersAreFreeAfterAnError) {
  if (size() == 1) GTEST_SKIP() << "nobody else touches a buffer";
  const int rounds = Rounds(28, 14);
  for (int round = 0; round < rounds && !HasFailure(); ++round) {
    const bool by_deadline = round % 2 == 1;
    TestGroup group = Make(by_deadline ? absl::Milliseconds(3) : kLong);
    group.Run([&](TestRank& rank) {
      std::mt19937 random(static_cast<uint32_t>(round * 64 + rank.id()));
      const int n = rank.size(), me = rank.id();
      constexpr int64_t kBytes = 4096;
      for (int call = 0;; ++call) {
        // In the deadline rounds one rank comes at about the time when the others give up, and later with each call.
        if (by_deadline && call >= 3 && me == round % n) {
          absl::SleepFor(absl::Microseconds(2000 + random() % 1500 + 200 * (call - 3)));
        }
        if (!by_deadline && me == round % n && call == 3 + round % 7) {
          std::thread([&] { rank.comm->Abort(absl::AbortedError("now")); }).join();
        }
        std::vector<uint8_t> mine;
        for (int r = 0; r < n; ++r) Append(mine, PatternBytes(call, me, r, kBytes));
        Buffer send = rank.Upload(mine), recv = rank.Filled(kBytes * n, 0);
        const absl::Status status = rank.Finish(rank.comm->AllToAll(send.data(), recv.data(), kBytes, *rank.stream));
        const Buffer poison = rank.Filled(kBytes * n, 0xEE);
        rank.device->Copy(send.data(), poison.data(), kBytes * n, *rank.stream);
        send = Buffer();
        if (!status.ok()) break;
        for (int r = 0; r < n; ++r) {
          ASSERT_TRUE(rank.Download(static_cast<char*>(recv.data()) + kBytes * r, kBytes) ==
                      PatternBytes(call, r, me, kBytes))
              << "round " << round << ", call " << call << ", from rank " << r;
        }
      }
    });
    const absl::StatusCode code = group.ranks[0].comm->error().code();
    EXPECT_EQ(code, by_deadline ? absl::StatusCode::kDeadlineExceeded : absl::StatusCode::kAborted);
  }
}

}  // namespace
}  // namespace soloist
