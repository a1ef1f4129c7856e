// What arrives: each collective against its definition in communicator.h, zero bytes and odd sizes included.
#include <atomic>
#include <cstring>

#include "absl/time/clock.h"
#include "tests/comm/communicator_contract.h"

namespace soloist {
namespace {

constexpr uint8_t kPoison = 0xA5;
constexpr int64_t kSizes[] = {0, 1, 3, 64, 1021, 70001};

using Bytes = std::vector<uint8_t>;

TEST_P(CommunicatorContract, RanksAndSize) {
  TestGroup group = Make();
  ASSERT_EQ(group.size(), size());
  for (int r = 0; r < size(); ++r) {
    EXPECT_EQ(group.ranks[r].comm->rank(), r);
    EXPECT_EQ(group.ranks[r].comm->size(), size());
    EXPECT_TRUE(group.ranks[r].comm->error().ok());
  }
}

TEST_P(CommunicatorContract, AllToAll) {
  Make().Run([](TestRank& rank) {
    for (const int64_t bytes : kSizes) {
      Bytes send, expected;
      for (int r = 0; r < rank.size(); ++r) {
        Append(send, PatternBytes(bytes, rank.id(), r, bytes));
        Append(expected, PatternBytes(bytes, r, rank.id(), bytes));
      }
      const int64_t total = bytes * rank.size();
      const Buffer from = rank.Upload(send);
      const Buffer to = rank.Filled(total + 16, kPoison);
      ASSERT_EQ(rank.Finish(rank.comm->AllToAll(from.data(), to.data(), bytes, *rank.stream)), absl::OkStatus());
      Append(expected, Bytes(16, kPoison));  // nothing is written past the end
      EXPECT_TRUE(rank.Download(to.data(), total + 16) == expected) << bytes << " bytes, rank " << rank.id();
      EXPECT_TRUE(rank.Download(from.data(), total) == send) << "send has changed";
    }
  });
}

TEST_P(CommunicatorContract, AllToAllInPlaceInAGroupOfOne) {
  if (size() != 1) GTEST_SKIP() << "allowed where size() == 1";
  Make().Run([](TestRank& rank) {
    const Bytes data = PatternBytes(1, 0, 0, 1021);
    const Buffer buffer = rank.Upload(data);
    ASSERT_EQ(rank.Finish(rank.comm->AllToAll(buffer.data(), buffer.data(), 1021, *rank.stream)), absl::OkStatus());
    EXPECT_TRUE(rank.Download(buffer.data(), 1021) == data);
  });
}

// Sizes that differ per pair, some zero; places in reverse order with gaps that must stay as they are.
TEST_P(CommunicatorContract, AllToAllV) {
  const auto bytes_of = [](int round, int from, int to) -> int64_t {
    return (from + 2 * to + round) % 3 == 0 ? 0 : (from * 37 + to * 101 + round * 13) % 999;
  };
  Make().Run([&](TestRank& rank) {
    const int n = rank.size(), me = rank.id();
    for (int round = 0; round < 4; ++round) {
      std::vector<int64_t> send_bytes(n), send_offsets(n), recv_bytes(n), recv_offsets(n);
      int64_t send_end = 5, recv_end = 3;
      for (int r = n - 1; r >= 0; --r) {
        send_bytes[r] = bytes_of(round, me, r);
        recv_bytes[r] = bytes_of(round, r, me);
        send_offsets[r] = send_end;
        recv_offsets[r] = recv_end;
        send_end += send_bytes[r] + r % 4;
        recv_end += recv_bytes[r] + 7;
      }
      Bytes send(static_cast<size_t>(send_end), kPoison), expected(static_cast<size_t>(recv_end), kPoison);
      for (int r = 0; r < n; ++r) {
        const Bytes out = PatternBytes(round, me, r, send_bytes[r]), in = PatternBytes(round, r, me, recv_bytes[r]);
        std::copy(out.begin(), out.end(), send.begin() + send_offsets[r]);
        std::copy(in.begin(), in.end(), expected.begin() + recv_offsets[r]);
      }
      const Buffer from = rank.Upload(send);
      const Buffer to = rank.Filled(recv_end, kPoison);
      ASSERT_EQ(rank.Finish(rank.comm->AllToAllV(from.data(), send_bytes, send_offsets, to.data(), recv_bytes,
                                                 recv_offsets, *rank.stream)),
                absl::OkStatus());
      EXPECT_TRUE(rank.Download(to.data(), recv_end) == expected) << "round " << round << ", rank " << me;
    }
  });
}

TEST_P(CommunicatorContract, AllToAllVOfNothing) {
  Make().Run([](TestRank& rank) {
    const std::vector<int64_t> zero(rank.size(), 0);
    ASSERT_EQ(rank.Finish(rank.comm->AllToAllV(nullptr, zero, zero, nullptr, zero, zero, *rank.stream)),
              absl::OkStatus());
  });
}

// The terms cancel, so that any other order of summation gives other bits.
TEST_P(CommunicatorContract, AllReduceSumAddsInRankOrder) {
  const auto term = [](int64_t count, int rank, int64_t i) {
    const float fraction = static_cast<float>(PatternByte(count, rank, 0, i)) / 256.0f;
    const float scale[] = {1e8f, 1.0f, -1e8f, 1e-4f};
    return scale[(rank + i) % 4] * (1.0f + fraction);
  };
  Make().Run([&](TestRank& rank) {
    for (const int64_t count : {0, 1, 2, 15, 17, 1021, 20011}) {
      std::vector<float> mine(count), expected(count);
      for (int64_t i = 0; i < count; ++i) {
        mine[i] = term(count, rank.id(), i);
        expected[i] = term(count, 0, i);
        for (int r = 1; r < rank.size(); ++r) expected[i] += term(count, r, i);
      }
      mine.push_back(-1.25f);  // must stay
      expected.push_back(-1.25f);
      const Buffer data = rank.Upload(mine);
      ASSERT_EQ(rank.Finish(rank.comm->AllReduceSum(static_cast<float*>(data.data()), count, *rank.stream)),
                absl::OkStatus());
      const std::vector<float> got = rank.Download<float>(data.data(), count + 1);
      EXPECT_EQ(std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)), 0)
          << count << " floats, rank " << rank.id();
    }
  });
}

TEST_P(CommunicatorContract, AllGather) {
  Make().Run([](TestRank& rank) {
    for (const int64_t bytes : kSizes) {
      Bytes expected;
      for (int r = 0; r < rank.size(); ++r) Append(expected, PatternBytes(bytes, r, 0, bytes));
      const int64_t total = bytes * rank.size();
      const Buffer from = rank.Upload(PatternBytes(bytes, rank.id(), 0, bytes));
      const Buffer to = rank.Filled(total + 16, kPoison);
      ASSERT_EQ(rank.Finish(rank.comm->AllGather(from.data(), to.data(), bytes, *rank.stream)), absl::OkStatus());
      Append(expected, Bytes(16, kPoison));
      EXPECT_TRUE(rank.Download(to.data(), total + 16) == expected) << bytes << " bytes, rank " << rank.id();
    }
  });
}

TEST_P(CommunicatorContract, BroadcastFromEachRoot) {
  Make().Run([](TestRank& rank) {
    for (const int64_t bytes : kSizes) {
      for (int root = 0; root < rank.size(); ++root) {
        Bytes expected = PatternBytes(bytes, root, root, bytes);
        Append(expected, Bytes(16, kPoison));
        const Buffer data = rank.id() == root ? rank.Upload(expected) : rank.Filled(bytes + 16, kPoison);
        ASSERT_EQ(rank.Finish(rank.comm->Broadcast(data.data(), bytes, root, *rank.stream)), absl::OkStatus());
        EXPECT_TRUE(rank.Download(data.data(), bytes + 16) == expected)
            << bytes << " bytes from rank " << root << ", rank " << rank.id();
      }
    }
  });
}

// Each ordered pair in turn, two messages each, so that order within a pair matters; the other ranks do nothing.
TEST_P(CommunicatorContract, SendRecvForEachPair) {
  Make().Run([](TestRank& rank) {
    for (int from = 0; from < rank.size(); ++from) {
      for (int to = 0; to < rank.size(); ++to) {
        if (from == to || (rank.id() != from && rank.id() != to)) continue;
        for (const int64_t bytes : {int64_t{1021}, int64_t{0}, int64_t{4099}}) {
          const Bytes expected = PatternBytes(bytes, from, to, bytes);
          if (rank.id() == from) {
            const Buffer data = rank.Upload(expected);
            ASSERT_EQ(rank.Finish(rank.comm->Send(data.data(), bytes, to, *rank.stream)), absl::OkStatus());
          } else {
            const Buffer data = rank.Filled(bytes, kPoison);
            ASSERT_EQ(rank.Finish(rank.comm->Recv(data.data(), bytes, from, *rank.stream)), absl::OkStatus());
            EXPECT_TRUE(rank.Download(data.data(), bytes) == expected) << from << " to " << to;
          }
        }
      }
    }
  });
}

// All pairs (2i, 2i + 1) at a time, both directions: pairs do not disturb each other.
TEST_P(CommunicatorContract, SendRecvOfPairsAtATime) {
  Make().Run([](TestRank& rank) {
    const int peer = rank.id() ^ 1;
    if (peer >= rank.size()) return;
    const Buffer in = rank.Filled(777, kPoison);
    for (int round = 0; round < 50; ++round) {
      const Buffer out = rank.Upload(PatternBytes(round, rank.id(), peer, 777));
      for (const bool sends : {rank.id() < peer, rank.id() > peer}) {
        ASSERT_EQ(rank.Finish(sends ? rank.comm->Send(out.data(), 777, peer, *rank.stream)
                                    : rank.comm->Recv(in.data(), 777, peer, *rank.stream)),
                  absl::OkStatus());
      }
      ASSERT_TRUE(rank.Download(in.data(), 777) == PatternBytes(round, peer, rank.id(), 777));
    }
  });
}

// Nobody is past barrier k before all have come to it.
TEST_P(CommunicatorContract, Barrier) {
  std::atomic<int> arrived{0};
  Make().Run([&](TestRank& rank) {
    for (int k = 1; k <= 100; ++k) {
      arrived.fetch_add(1);
      ASSERT_EQ(rank.Finish(rank.comm->Barrier(*rank.stream)), absl::OkStatus());
      ASSERT_GE(arrived.load(), k * rank.size());
    }
  });
}

// Copies in, collectives and copies out with one Synchronize at the end. `send` is overwritten and `recv` reused at
// once, which a rank that returns before its peers have read, or that enqueues out of order, gets wrong.
TEST_P(CommunicatorContract, RunsInStreamOrder) {
  constexpr int kRounds = 60;
  constexpr int64_t kBytes = 513;
  Make().Run([](TestRank& rank) {
    const int n = rank.size(), me = rank.id();
    const Buffer send = rank.Filled(kBytes * n, kPoison), recv = rank.Filled(kBytes * n, kPoison);
    std::vector<Bytes> in(kRounds), out(kRounds, Bytes(static_cast<size_t>(kBytes * n)));
    for (int k = 0; k < kRounds; ++k) {
      for (int r = 0; r < n; ++r) Append(in[k], PatternBytes(k, me, r, kBytes));
    }
    for (int k = 0; k < kRounds; ++k) {
      rank.device->Copy(send.data(), in[k].data(), kBytes * n, *rank.stream);
      ASSERT_EQ(rank.comm->AllToAll(send.data(), recv.data(), kBytes, *rank.stream), absl::OkStatus());
      rank.device->Copy(out[k].data(), recv.data(), kBytes * n, *rank.stream);
    }
    ASSERT_EQ(rank.stream->Synchronize(), absl::OkStatus());
    for (int k = 0; k < kRounds; ++k) {
      for (int r = 0; r < n; ++r) {
        const Bytes expected = PatternBytes(k, r, me, kBytes);
        ASSERT_TRUE(std::equal(expected.begin(), expected.end(), out[k].begin() + r * kBytes))
            << "round " << k << ", from rank " << r << " to " << me;
      }
    }
  });
}

// A collective does not end before its last rank has come; where calls are asynchronous, they return before.
TEST_P(CommunicatorContract, EndsWhenTheLateRankHasCome) {
  if (size() == 1) GTEST_SKIP() << "nobody can be late";
  std::atomic<bool> late_has_come{false};
  std::atomic<int> returned{0};
  TestGroup group = Make();
  const int late = size() / 2;
  group.Run([&](TestRank& rank) {
    const Buffer data = rank.Upload(PatternBytes(9, rank.id(), 0, 333));
    const Buffer all = rank.Filled(333 * rank.size(), kPoison);
    if (rank.id() == late) {
      absl::SleepFor(absl::Milliseconds(150));
      if (GetParam().asynchronous) {
        EXPECT_EQ(returned.load(), rank.size() - 1) << "calls wait for rank " << late;
      }
      late_has_come = true;
    }
    const absl::Status enqueued = rank.comm->AllGather(data.data(), all.data(), 333, *rank.stream);
    returned.fetch_add(1);
    ASSERT_EQ(rank.Finish(enqueued), absl::OkStatus());
    EXPECT_TRUE(late_has_come.load());
    for (int r = 0; r < rank.size(); ++r) {
      EXPECT_TRUE(rank.Download(static_cast<char*>(all.data()) + r * 333, 333) == PatternBytes(9, r, 0, 333));
    }
  });
}

}  // namespace
}  // namespace soloist
