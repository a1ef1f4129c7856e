// How long an all-to-all takes, from the host and in a graph. Rank 0 prints the table.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "gtest/gtest.h"
#include "tests/gpu/nccl_group.h"

namespace soloist {
namespace {

constexpr int kWarmUps = 3;
constexpr int kSamples = 21;
constexpr int kPerGraph = 4;
constexpr int64_t kRowBytes = 8192;  // hidden 4096 in BF16

struct Times {
  std::vector<double> us;
  void Add(absl::Duration d) { us.push_back(absl::ToDoubleMicroseconds(d)); }
  double At(double share) {
    std::sort(us.begin(), us.end());
    return us[static_cast<size_t>(share * static_cast<double>(us.size() - 1))];
  }
};

class NcclTiming : public testing::Test {
 protected:
  void Print(const char* what, int64_t bytes, Times enqueue, Times whole) {
    if (NcclFlags().rank != 0) return;
    std::printf(
        "  %-34s %8lld bytes a pair, %2d ranks: enqueue median %8.1f us; done min %9.1f median %9.1f p99 %9.1f us\n",
        what, static_cast<long long>(bytes), NcclFlags().size, enqueue.At(0.5), whole.At(0), whole.At(0.5),
        whole.At(0.99));
    std::fflush(stdout);
  }
};

TEST_F(NcclTiming, AllToAll) {
  FileStore store("timing");
  TestRank rank = MakeNcclRank(store, absl::Seconds(30));
  const int n = rank.size(), me = rank.id();
  for (const int64_t rows : {8, 32, 64}) {
    const int64_t bytes = rows * kRowBytes, total = bytes * n;
    std::vector<uint8_t> send, expected;
    for (int r = 0; r < n; ++r) {
      Append(send, Pattern(rows, me, r, bytes));
      Append(expected, Pattern(rows, r, me, bytes));
    }
    const Buffer from = rank.Upload(send), to = rank.Filled(total, 0);
    const auto all_to_all = [&] { return rank.comm->AllToAll(from.data(), to.data(), bytes, *rank.stream); };
    // Calls `enqueue` many times; each sample starts when all ranks have ended the one before.
    const auto sample = [&](const char* what, int per_call, const std::function<absl::Status()>& enqueue) {
      Times enqueued, done;
      for (int i = 0; i < kWarmUps + kSamples; ++i) {
        const absl::Time begin = absl::Now();
        const absl::Status status = enqueue();
        const absl::Time returned = absl::Now();
        ASSERT_EQ(Outcome(rank, status), absl::OkStatus());
        if (i < kWarmUps) continue;
        enqueued.Add((returned - begin) / per_call);
        done.Add((absl::Now() - begin) / per_call);
      }
      EXPECT_TRUE(rank.Download(to.data(), total) == expected) << what << ", " << bytes << " bytes";
      Print(what, bytes, std::move(enqueued), std::move(done));
    };
    sample("AllToAll", 1, all_to_all);
    if (!rank.device->can_capture()) continue;
    auto graph = rank.device->Capture(*rank.stream, [&] {
      absl::Status status;
      for (int i = 0; i < kPerGraph && status.ok(); ++i) status = all_to_all();
      return status;
    });
    ASSERT_TRUE(graph.ok()) << graph.status();
    const std::vector<uint8_t> zeros(static_cast<size_t>(total));
    rank.device->Copy(to.data(), zeros.data(), total, *rank.stream);
    ASSERT_EQ(rank.stream->Synchronize(), absl::OkStatus());
    sample("AllToAll in a graph of 4", kPerGraph, [&] { return rank.device->Launch(**graph, *rank.stream); });
  }
}

}  // namespace
}  // namespace soloist
