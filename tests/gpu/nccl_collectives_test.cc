// What arrives, on device memory: each collective of communicator.h against its definition, with sizes drawn anew in
// each round, and the same in a captured graph.
#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "tests/gpu/nccl_group.h"

namespace soloist {
namespace {

constexpr uint8_t kPoison = 0xA5;
using Bytes = std::vector<uint8_t>;

// One communicator for all of these tests: each takes seconds to make where many ranks share a GPU.
class NcclCollectives : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    store_ = new FileStore("collectives");
    rank_ = new TestRank(MakeNcclRank(*store_, absl::Seconds(30)));
  }
  static void TearDownTestSuite() {
    delete rank_;
    delete store_;
  }

  TestRank& rank() { return *rank_; }
  FileStore& store() { return *store_; }
  int me() const { return NcclFlags().rank; }
  int size() const { return NcclFlags().size; }
  // Where many processes share one GPU they take turns on it, so a collective takes far longer.
  int rounds() const { return size() <= 4 ? 12 : 5; }
  // The same numbers on all ranks.
  int64_t Draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_); }
  // Small, odd and larger sizes alike.
  int64_t DrawBytes() {
    switch (Draw(0, 3)) {
      case 0:
        return Draw(0, 40);
      case 1:
        return 16 * Draw(1, 1000);
      default:
        return Draw(41, 300000);
    }
  }
  absl::Status Outcome(const absl::Status& enqueued) { return soloist::Outcome(rank(), enqueued); }

 private:
  static FileStore* store_;
  static TestRank* rank_;
  std::mt19937_64 random_{static_cast<uint64_t>(NcclFlags().seed)};
};
FileStore* NcclCollectives::store_ = nullptr;
TestRank* NcclCollectives::rank_ = nullptr;

TEST_F(NcclCollectives, RankSizeAndTransport) {
  EXPECT_EQ(rank().comm->rank(), me());
  EXPECT_EQ(rank().comm->size(), size());
  EXPECT_EQ(rank().comm->error(), absl::OkStatus());
  const std::string transport = rank().comm->transport();
  if (me() == 0) std::printf("  %d ranks, transport %s\n", size(), transport.c_str());
  EXPECT_EQ(transport == "local", size() == 1);
  EXPECT_NE(transport, "unknown");
  EXPECT_FALSE(transport.empty());
}

TEST_F(NcclCollectives, AllToAll) {
  for (int round = 0; round < rounds(); ++round) {
    const int64_t bytes = round == 0 ? 0 : DrawBytes(), total = bytes * size();
    Bytes send, expected;
    for (int r = 0; r < size(); ++r) {
      Append(send, Pattern(round, me(), r, bytes));
      Append(expected, Pattern(round, r, me(), bytes));
    }
    const Buffer from = rank().Upload(send), to = rank().Filled(total + 16, kPoison);
    ASSERT_EQ(Outcome(rank().comm->AllToAll(from.data(), to.data(), bytes, *rank().stream)), absl::OkStatus());
    Append(expected, Bytes(16, kPoison));  // nothing is written past the end
    EXPECT_TRUE(rank().Download(to.data(), total + 16) == expected) << bytes << " bytes";
    EXPECT_TRUE(rank().Download(from.data(), total) == send) << "send has changed";
  }
}

TEST_F(NcclCollectives, AllToAllV) {
  for (int round = 0; round < rounds(); ++round) {
    std::vector<std::vector<int64_t>> bytes(size(), std::vector<int64_t>(size()));  // [from][to]
    for (auto& row : bytes) {
      for (int64_t& b : row) b = Draw(0, 2) == 0 ? 0 : DrawBytes() / 4;
    }
    if (round == 0) {
      for (auto& row : bytes) std::fill(row.begin(), row.end(), 0);
    }
    std::vector<int64_t> send_bytes(size()), send_offsets(size()), recv_bytes(size()), recv_offsets(size());
    int64_t send_end = 5, recv_end = 3;
    for (int r = size() - 1; r >= 0; --r) {  // in reverse, with gaps that must stay as they are
      send_bytes[r] = bytes[me()][r];
      recv_bytes[r] = bytes[r][me()];
      send_offsets[r] = send_end;
      recv_offsets[r] = recv_end;
      send_end += send_bytes[r] + r % 4;
      recv_end += recv_bytes[r] + 7;
    }
    Bytes send(static_cast<size_t>(send_end), kPoison), expected(static_cast<size_t>(recv_end), kPoison);
    for (int r = 0; r < size(); ++r) {
      const Bytes out = Pattern(round, me(), r, send_bytes[r]), in = Pattern(round, r, me(), recv_bytes[r]);
      std::copy(out.begin(), out.end(), send.begin() + send_offsets[r]);
      std::copy(in.begin(), in.end(), expected.begin() + recv_offsets[r]);
    }
    const Buffer from = rank().Upload(send), to = rank().Filled(recv_end, kPoison);
    ASSERT_EQ(Outcome(rank().comm->AllToAllV(from.data(), send_bytes, send_offsets, to.data(), recv_bytes, recv_offsets,
                                             *rank().stream)),
              absl::OkStatus());
    EXPECT_TRUE(rank().Download(to.data(), recv_end) == expected) << "round " << round;
  }
}

// The terms cancel, so that any other order of summation gives other bits. The last size needs several gathers.
TEST_F(NcclCollectives, AllReduceSumAddsInRankOrder) {
  const auto term = [](int64_t count, int rank, int64_t i) {
    const float scale[] = {1e8f, 1.0f, -1e8f, 1e-4f};
    return scale[(rank + i) % 4] *
           (1.0f + static_cast<float>((i * 2654435761u + rank * 40503u + count) % 256) / 256.0f);
  };
  for (const int64_t count : {int64_t{0}, int64_t{1}, int64_t{17}, Draw(1000, 60000), int64_t{150001}}) {
    std::vector<float> mine(count), expected(count);
    for (int64_t i = 0; i < count; ++i) {
      mine[i] = term(count, me(), i);
      expected[i] = term(count, 0, i);
      for (int r = 1; r < size(); ++r) expected[i] += term(count, r, i);
    }
    mine.push_back(-1.25f);  // must stay
    expected.push_back(-1.25f);
    const Buffer data = rank().Upload(mine);
    ASSERT_EQ(Outcome(rank().comm->AllReduceSum(static_cast<float*>(data.data()), count, *rank().stream)),
              absl::OkStatus());
    const auto got = rank().Download<float>(data.data(), count + 1);
    EXPECT_EQ(std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)), 0) << count << " floats";
  }
}

TEST_F(NcclCollectives, AllGather) {
  for (int round = 0; round < rounds(); ++round) {
    const int64_t bytes = round == 0 ? 0 : DrawBytes(), total = bytes * size();
    Bytes expected;
    for (int r = 0; r < size(); ++r) Append(expected, Pattern(round, r, 0, bytes));
    const Buffer from = rank().Upload(Pattern(round, me(), 0, bytes)), to = rank().Filled(total + 16, kPoison);
    ASSERT_EQ(Outcome(rank().comm->AllGather(from.data(), to.data(), bytes, *rank().stream)), absl::OkStatus());
    Append(expected, Bytes(16, kPoison));
    EXPECT_TRUE(rank().Download(to.data(), total + 16) == expected) << bytes << " bytes";
  }
}

TEST_F(NcclCollectives, BroadcastFromEachRoot) {
  for (int root = 0; root < size(); ++root) {
    const int64_t bytes = root == 1 ? 0 : DrawBytes();
    Bytes expected = Pattern(bytes, root, root, bytes);
    Append(expected, Bytes(16, kPoison));
    const Buffer data = me() == root ? rank().Upload(expected) : rank().Filled(bytes + 16, kPoison);
    ASSERT_EQ(Outcome(rank().comm->Broadcast(data.data(), bytes, root, *rank().stream)), absl::OkStatus());
    EXPECT_TRUE(rank().Download(data.data(), bytes + 16) == expected) << bytes << " bytes from rank " << root;
  }
}

// Pairs drawn at random, two messages each, so that order within a pair matters; the other ranks do nothing.
TEST_F(NcclCollectives, SendRecv) {
  if (size() == 1) return;
  for (int round = 0; round < 2 * rounds(); ++round) {
    const int from = static_cast<int>(Draw(0, size() - 1));
    const int to = static_cast<int>((from + Draw(1, size() - 1)) % size());
    for (const int64_t bytes : {DrawBytes(), DrawBytes()}) {
      const Bytes expected = Pattern(bytes, from, to, bytes);
      if (me() == from) {
        const Buffer data = rank().Upload(expected);
        ASSERT_EQ(Outcome(rank().comm->Send(data.data(), bytes, to, *rank().stream)), absl::OkStatus());
      } else if (me() == to) {
        const Buffer data = rank().Filled(bytes + 16, kPoison);
        ASSERT_EQ(Outcome(rank().comm->Recv(data.data(), bytes, from, *rank().stream)), absl::OkStatus());
        Bytes whole = expected;
        Append(whole, Bytes(16, kPoison));
        EXPECT_TRUE(rank().Download(data.data(), bytes + 16) == whole) << from << " to " << to;
      }
    }
  }
}

// Nobody is past barrier k before all have come to it.
TEST_F(NcclCollectives, Barrier) {
  for (int k = 0; k < rounds(); ++k) {
    ASSERT_EQ(store().Set("barrier/" + std::to_string(k) + "/" + std::to_string(me()), "here"), absl::OkStatus());
    ASSERT_EQ(Outcome(rank().comm->Barrier(*rank().stream)), absl::OkStatus());
    for (int r = 0; r < size(); ++r) {
      EXPECT_TRUE(store().Get("barrier/" + std::to_string(k) + "/" + std::to_string(r), absl::ZeroDuration()).ok())
          << "rank " << r << " has not come to barrier " << k;
    }
  }
}

// A chain of collectives on one stream, each fed by the one before, with host copies at both ends.
class Chain {
 public:
  explicit Chain(TestRank& rank) : rank_(rank), n_(rank.size()) {
    in_ = rank.device->AllocatePinned(kBytes * n_).value();
    out_ = rank.device->AllocatePinned(kBytes * n_).value();
    for (Buffer* buffer : {&a_, &b_, &c_, &d_}) *buffer = rank.Filled(kBytes * n_, kPoison);
    for (int r = 0; r < n_; ++r) {
      offsets_.push_back(kBytes * r);
      send_bytes_.push_back(VBytes(rank.id(), r));
      recv_bytes_.push_back(VBytes(r, rank.id()));
    }
  }

  absl::Status Enqueue() {
    Communicator& comm = *rank_.comm;
    Stream& stream = *rank_.stream;
    rank_.device->Copy(a_.data(), in_.data(), kBytes * n_, stream);
    absl::Status status = comm.AllToAll(a_.data(), b_.data(), kBytes, stream);
    if (status.ok()) {
      status = comm.AllToAllV(b_.data(), send_bytes_, offsets_, c_.data(), recv_bytes_, offsets_, stream);
    }
    if (status.ok()) status = comm.AllGather(c_.data(), d_.data(), kBytes, stream);
    if (status.ok()) status = comm.Broadcast(d_.data(), kBytes, n_ - 1, stream);
    if (status.ok()) status = comm.Barrier(stream);
    rank_.device->Copy(out_.data(), d_.data(), kBytes * n_, stream);
    return status;
  }
  void Fill(int round) {
    Bytes all;
    for (int r = 0; r < n_; ++r) Append(all, Pattern(round, rank_.id(), r, kBytes));
    std::memcpy(in_.data(), all.data(), all.size());
  }
  Bytes Result() const {
    const auto* begin = static_cast<const uint8_t*>(out_.data());
    return {begin, begin + kBytes * n_};
  }
  // The same by the definitions, for all ranks at once. What AllToAllV does not write keeps what it had.
  Bytes Expected(int round) {
    std::vector<Bytes> a(n_), b(n_);
    for (int r = 0; r < n_; ++r) {
      for (int s = 0; s < n_; ++s) Append(a[r], Pattern(round, r, s, kBytes));
    }
    for (int r = 0; r < n_; ++r) {
      for (int s = 0; s < n_; ++s) Append(b[r], Bytes(a[s].begin() + kBytes * r, a[s].begin() + kBytes * (r + 1)));
    }
    if (c_model_.empty()) c_model_.assign(n_, Bytes(static_cast<size_t>(kBytes * n_), kPoison));
    for (int r = 0; r < n_; ++r) {
      for (int s = 0; s < n_; ++s) {
        std::copy_n(b[s].begin() + kBytes * r, VBytes(s, r), c_model_[r].begin() + kBytes * s);
      }
    }
    Bytes d;
    for (int r = 0; r < n_; ++r) Append(d, Bytes(c_model_[r].begin(), c_model_[r].begin() + kBytes));
    return d;  // the broadcast of the same bytes changes nothing
  }

 private:
  static constexpr int64_t kBytes = 4098;
  static int64_t VBytes(int from, int to) { return (from + 2 * to) % 3 == 0 ? 0 : kBytes - 16 * ((from + to) % 5); }

  TestRank& rank_;
  const int n_;
  Buffer in_, out_, a_, b_, c_, d_;
  std::vector<int64_t> offsets_, send_bytes_, recv_bytes_;
  std::vector<Bytes> c_model_;
};

TEST_F(NcclCollectives, RunsInStreamOrder) {
  Chain chain(rank());
  for (int round = 0; round < rounds(); ++round) {
    chain.Fill(round);
    ASSERT_EQ(Outcome(chain.Enqueue()), absl::OkStatus());
    ASSERT_TRUE(chain.Result() == chain.Expected(round)) << "round " << round;
  }
}

TEST_F(NcclCollectives, InACapturedGraph) {
  if (!rank().device->can_capture()) GTEST_SKIP() << "no graphs on this device";
  Chain chain(rank());
  const Buffer sum = rank().Filled(4 * 1000, 0);
  auto graph = rank().device->Capture(*rank().stream, [&]() -> absl::Status {
    const absl::Status status = chain.Enqueue();
    if (!status.ok()) return status;
    return rank().comm->AllReduceSum(static_cast<float*>(sum.data()), 1000, *rank().stream);
  });
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (int round = 0; round < 10; ++round) {
    chain.Fill(100 + round);
    const std::vector<float> ones(1000, static_cast<float>(me() + 1 + round));
    rank().device->Copy(sum.data(), ones.data(), 4 * 1000, *rank().stream);
    ASSERT_EQ(Outcome(rank().device->Launch(**graph, *rank().stream)), absl::OkStatus());
    ASSERT_TRUE(chain.Result() == chain.Expected(100 + round)) << "replay " << round;
    const int total = size() * (size() + 1) / 2 + size() * round;
    const std::vector<float> expected(1000, static_cast<float>(total));
    EXPECT_TRUE(rank().Download<float>(sum.data(), 1000) == expected) << "replay " << round;
    // Between replays the same communicator is used without a graph.
    if (round % 3 == 0) {
      ASSERT_EQ(Outcome(rank().comm->Barrier(*rank().stream)), absl::OkStatus());
    }
  }
}

// The last collective has succeeded for all, even where a peer has left at once after it.
TEST_F(NcclCollectives, LeavingAfterTheLastCollective) {
  const Buffer send = rank().Upload(Pattern(7, me(), 0, 512)), recv = rank().Filled(512 * size(), 0);
  ASSERT_EQ(Outcome(rank().comm->AllGather(send.data(), recv.data(), 512, *rank().stream)), absl::OkStatus());
  const absl::Time begin = absl::Now();
  rank().comm.reset();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5)) << "leaving without an error waits for nobody";
  Bytes expected;
  for (int r = 0; r < size(); ++r) Append(expected, Pattern(7, r, 0, 512));
  EXPECT_TRUE(rank().Download(recv.data(), 512 * size()) == expected);
}

}  // namespace
}  // namespace soloist
