// Random sequences of collectives, each fed by the ones before it, against a model of the whole group on the host.
//
// Every rank has two buffers, a and b. A step reads a, writes b, and swaps them, or works on a in place. The model does
// the same on vectors, rank after rank, straight from the definitions in communicator.h.
#include <cstring>
#include <random>
#include <utility>

#include "tests/comm/communicator_contract.h"

namespace soloist {
namespace {

constexpr int kSteps = 8;
constexpr int64_t kBytes = 32 * 1024;  // of each buffer

using Bytes = std::vector<uint8_t>;
enum class Op { kAllToAll, kAllToAllV, kAllReduceSum, kAllGather, kBroadcast, kSendRecv, kBarrier };

struct Step {
  Op op = Op::kBarrier;
  int64_t bytes = 0;
  int64_t at = 0;  // in place: where in the buffer
  int root = 0;    // or the sender
  int to = 0;
  std::vector<std::vector<int64_t>> pair_bytes;    // [from][to]
  std::vector<std::vector<int64_t>> send_offsets;  // [from][to]
  std::vector<std::vector<int64_t>> recv_offsets;  // [to][from]
  std::vector<std::vector<float>> terms;           // [rank]: AllReduceSum, finite values
};

// Offsets of blocks of the given sizes, in random order with random gaps.
std::vector<int64_t> Place(const std::vector<int64_t>& bytes, std::mt19937& random) {
  std::vector<size_t> order(bytes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  std::vector<int64_t> offsets(bytes.size());
  int64_t at = random() % 9;
  for (const size_t i : order) {
    offsets[i] = at;
    at += bytes[i] + random() % 5;
  }
  CHECK_LE(at, kBytes);
  return offsets;
}

Step RandomStep(int n, std::mt19937& random) {
  constexpr int64_t kSizes[] = {0, 1, 2, 3, 8, 63, 255, 1024, 2039};
  Step step;
  step.op = static_cast<Op>(random() % 7);
  if (n == 1 && step.op == Op::kSendRecv) step.op = Op::kBarrier;
  step.bytes = kSizes[random() % std::size(kSizes)];
  step.root = static_cast<int>(random() % n);
  step.to = static_cast<int>((step.root + 1 + random() % std::max(1, n - 1)) % n);
  step.at = static_cast<int64_t>(random() % 1000) * 4;
  const auto square = std::vector<std::vector<int64_t>>(n, std::vector<int64_t>(n));
  if (step.op == Op::kAllToAllV) {
    step.pair_bytes = step.send_offsets = step.recv_offsets = square;
    std::vector<std::vector<int64_t>> in = square;
    for (int from = 0; from < n; ++from) {
      for (int to = 0; to < n; ++to) {
        in[to][from] = step.pair_bytes[from][to] = random() % 3 == 0 ? 0 : static_cast<int64_t>(random() % 1900);
      }
    }
    for (int r = 0; r < n; ++r) {
      step.send_offsets[r] = Place(step.pair_bytes[r], random);
      step.recv_offsets[r] = Place(in[r], random);
    }
  }
  if (step.op == Op::kAllReduceSum) {
    step.terms.resize(n);
    std::normal_distribution<float> normal(0, 1000);
    for (std::vector<float>& terms : step.terms) {
      terms.resize(static_cast<size_t>(step.bytes));  // a count here
      for (float& term : terms) term = normal(random);
    }
  }
  return step;
}

struct State {
  Bytes a, b;
};

void Model(const Step& step, std::vector<State>& ranks) {
  const int n = static_cast<int>(ranks.size());
  const auto copy = [&](int from, int64_t from_at, int to, int64_t to_at, int64_t bytes) {
    std::copy_n(ranks[from].a.begin() + from_at, bytes, ranks[to].b.begin() + to_at);
  };
  for (int r = 0; r < n; ++r) {
    for (int s = 0; s < n; ++s) {
      if (step.op == Op::kAllToAll) copy(s, r * step.bytes, r, s * step.bytes, step.bytes);
      if (step.op == Op::kAllGather) copy(s, 0, r, s * step.bytes, step.bytes);
      if (step.op == Op::kAllToAllV) {
        copy(s, step.send_offsets[s][r], r, step.recv_offsets[r][s], step.pair_bytes[s][r]);
      }
    }
    if (step.op == Op::kBroadcast) {
      std::copy_n(ranks[step.root].a.begin() + step.at, step.bytes, ranks[r].a.begin() + step.at);
    }
    if (step.op == Op::kAllReduceSum) {
      std::vector<float> sum = step.terms[0];
      for (int s = 1; s < n; ++s) {
        for (size_t i = 0; i < sum.size(); ++i) sum[i] += step.terms[s][i];
      }
      if (!sum.empty()) std::memcpy(ranks[r].a.data() + step.at, sum.data(), sum.size() * sizeof(float));
    }
  }
  if (step.op == Op::kSendRecv) copy(step.root, step.at, step.to, step.at, step.bytes);
  for (State& rank : ranks) std::swap(rank.a, rank.b);
}

absl::Status Enqueue(const Step& step, TestRank& rank, const Buffer& a, const Buffer& b) {
  Communicator& comm = *rank.comm;
  Stream& stream = *rank.stream;
  char* in_place = static_cast<char*>(a.data()) + step.at;
  const int me = rank.id();
  switch (step.op) {
    case Op::kAllToAll:
      return comm.AllToAll(a.data(), b.data(), step.bytes, stream);
    case Op::kAllGather:
      return comm.AllGather(a.data(), b.data(), step.bytes, stream);
    case Op::kAllToAllV: {
      std::vector<int64_t> recv_bytes(rank.size());
      for (int s = 0; s < rank.size(); ++s) recv_bytes[s] = step.pair_bytes[s][me];
      return comm.AllToAllV(a.data(), step.pair_bytes[me], step.send_offsets[me], b.data(), recv_bytes,
                            step.recv_offsets[me], stream);
    }
    case Op::kAllReduceSum: {
      const auto count = static_cast<int64_t>(step.terms[me].size());
      rank.device->Copy(in_place, step.terms[me].data(), count * static_cast<int64_t>(sizeof(float)), stream);
      return comm.AllReduceSum(reinterpret_cast<float*>(in_place), count, stream);
    }
    case Op::kBroadcast:
      return comm.Broadcast(in_place, step.bytes, step.root, stream);
    case Op::kSendRecv:
      if (me == step.root) return comm.Send(in_place, step.bytes, step.to, stream);
      if (me == step.to) return comm.Recv(static_cast<char*>(b.data()) + step.at, step.bytes, step.root, stream);
      return absl::OkStatus();
    case Op::kBarrier:
      return comm.Barrier(stream);
  }
  return absl::InternalError("no such op");
}

TEST_P(CommunicatorContract, RandomSequences) {
  TestGroup group = Make();
  const int sequences = Rounds(100, 24);
  for (int seed = 0; seed < sequences && !HasFailure(); ++seed) {
    std::mt19937 random(static_cast<uint32_t>(seed) * 1009 + static_cast<uint32_t>(size()));
    std::vector<Step> steps;
    for (int i = 0; i < kSteps; ++i) steps.push_back(RandomStep(size(), random));
    std::vector<State> start(size());
    for (int r = 0; r < size(); ++r) {
      start[r] = {PatternBytes(seed, r, 0, kBytes), PatternBytes(seed, r, 1, kBytes)};
    }
    std::vector<State> expected = start;
    for (const Step& step : steps) Model(step, expected);

    group.Run([&](TestRank& rank) {
      Buffer a = rank.Upload(start[rank.id()].a), b = rank.Upload(start[rank.id()].b);
      for (const Step& step : steps) {
        ASSERT_EQ(Enqueue(step, rank, a, b), absl::OkStatus()) << "seed " << seed;
        std::swap(a, b);
      }
      ASSERT_EQ(rank.stream->Synchronize(), absl::OkStatus()) << "seed " << seed;
      EXPECT_TRUE(rank.Download(a.data(), kBytes) == expected[rank.id()].a)
          << "seed " << seed << ", rank " << rank.id();
      EXPECT_TRUE(rank.Download(b.data(), kBytes) == expected[rank.id()].b)
          << "seed " << seed << ", rank " << rank.id();
    });
  }
}

}  // namespace
}  // namespace soloist
