// All-to-all between ranks that are threads of this process: through shared memory, over TCP by our own connections,
// and over TCP with every payload through Gloo. Prints one line per number of ranks and bytes per pair.
//
//   bazel run -c opt //tests/benchmarks:comm_bench [-- RANKS...]
//
// A sample is the time from the first rank's entry to the last rank's exit, after a barrier. Every rank checks what it
// got, in every sample.
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "base/check.h"
#include "base/clock.h"
#include "fmt/format.h"
#include "tests/comm/comm_group.h"
#include "tests/comm/gloo_group.h"

namespace soloist {
namespace {

constexpr int64_t kSizes[] = {1 << 10, 16 << 10, 256 << 10, 4 << 20};
constexpr int kWarmUps = 3;

// Fewer of the long ones.
int Samples(int ranks, int64_t bytes) {
  const int64_t moved = bytes * ranks * ranks;
  return static_cast<int>(std::clamp<int64_t>((int64_t{2} << 30) / moved, 20, 400));
}

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

// The first word of what `from` sends to `to` in sample `k`; the rest of the block does not change.
uint64_t Word(int from, int to, int k) {
  return (static_cast<uint64_t>(from) << 40) + (static_cast<uint64_t>(to) << 32) + static_cast<uint64_t>(k);
}

// Microseconds, sorted.
std::vector<double> Measure(TestGroup& group, int64_t bytes) {
  const int n = group.size(), samples = Samples(n, bytes);
  std::vector<std::atomic<int64_t>> first(samples + kWarmUps), last(samples + kWarmUps);
  for (auto& time : first) time = INT64_MAX;
  std::barrier start(n);
  group.Run([&](TestRank& rank) {
    const Buffer send = rank.Filled(bytes * n, static_cast<uint8_t>(rank.id() + 1)), recv = rank.Filled(bytes * n, 0);
    char *out = static_cast<char*>(send.data()), *in = static_cast<char*>(recv.data());
    for (int k = 0; k < samples + kWarmUps; ++k) {
      for (int to = 0; to < n; ++to) {
        const uint64_t word = Word(rank.id(), to, k);
        std::memcpy(out + bytes * to, &word, sizeof(word));
      }
      start.arrive_and_wait();
      const int64_t begin = Clock::Real().NowNs();
      CHECK_OK(rank.comm->AllToAll(send.data(), recv.data(), bytes, *rank.stream));
      const int64_t end = Clock::Real().NowNs();
      for (int64_t seen = first[k]; begin < seen && !first[k].compare_exchange_weak(seen, begin);) continue;
      for (int64_t seen = last[k]; end > seen && !last[k].compare_exchange_weak(seen, end);) continue;
      for (int from = 0; from < n; ++from) {
        uint64_t word = 0;
        std::memcpy(&word, in + bytes * from, sizeof(word));
        CHECK_EQ(word, Word(from, rank.id(), k));
        CHECK_EQ(static_cast<int>(in[bytes * (from + 1) - 1]), from + 1);
      }
    }
  });
  std::vector<double> us;
  for (int k = kWarmUps; k < samples + kWarmUps; ++k) us.push_back(static_cast<double>(last[k] - first[k]) / 1e3);
  std::sort(us.begin(), us.end());
  return us;
}

struct Way {
  const char* name;
  TestGroup (*make)(int ranks);
};

constexpr Way kWays[] = {
    {"shared memory", [](int ranks) { return SharedMemoryTestGroup(ranks); }},
    {"tcp", [](int ranks) { return GlooTestGroup(ranks, {}, GlooOptions::kNever); }},
    {"gloo", [](int ranks) { return GlooTestGroup(ranks, {}, 1); }},
};

void Run(const std::vector<int>& ranks) {
  char host[256] = "";
  gethostname(host, sizeof(host) - 1);
  fmt::print("all-to-all on {}, {} cores, ranks are threads, TCP over loopback; us: min / median / p99\n", host,
             UsableCores());
  fmt::print("{:>5} {:>9} {:>7}", "ranks", "bytes", "samples");
  for (const Way& way : kWays) fmt::print(" | {:>27}", way.name);
  fmt::print(" | median GB/s into a rank\n");
  for (const int n : ranks) {
    for (const int64_t bytes : kSizes) {
      fmt::print("{:>5} {:>9} {:>7}", n, bytes, Samples(n, bytes));
      std::string rates;
      for (const Way& way : kWays) {
        TestGroup group = way.make(n);
        const std::vector<double> us = Measure(group, bytes);
        const double median = us[us.size() / 2];
        fmt::print(" | {:>8.0f} {:>9.0f} {:>8.0f}", us.front(), median, us[us.size() * 99 / 100]);
        rates += fmt::format(" {:.2f}", static_cast<double>(bytes * (n - 1)) / median / 1e3);
      }
      fmt::print(" |{}\n", rates);
      std::fflush(stdout);
    }
  }
}

}  // namespace
}  // namespace soloist

int main(int argc, char** argv) {
  std::vector<int> ranks;
  for (int i = 1; i < argc; ++i) {
    ranks.emplace_back();
    CHECK_MSG(absl::SimpleAtoi(argv[i], &ranks.back()) && ranks.back() >= 2 && ranks.back() <= 64, argv[i]);
  }
  soloist::Run(ranks.empty() ? std::vector<int>{2, 4, 8, 16} : ranks);
  return 0;
}
