// What carrying rows to their experts and back costs, by layout and rows: where masked and contiguous cross.
//
//   dispatch_benchmark [shm|tcp] [RANKS] [HIDDEN] [SAMPLES]
//
// 16 experts, two per token, chosen uniformly; RANKS threads of this process, rows of HIDDEN floats. Time of rank 0 in
// Dispatch and in Combine, together; the experts between them (here the identity) are left out. Every sample is
// checked: the weights of a token add up to 1, so it must come back as it went.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "engine/comm/dispatcher.h"
#include "engine/dispatch_room.h"
#include "tests/comm/comm_group.h"
#include "tests/comm/gloo_group.h"

namespace soloist {
namespace {

constexpr int kExperts = 16, kTopK = 2, kMostRows = 512, kWarmUp = 5;

struct Times {
  double min_us = 0, median_us = 0, p99_us = 0;
};

Times Summarise(std::vector<int64_t> ns) {
  std::ranges::sort(ns);
  const auto at = [&](double q) {
    return static_cast<double>(ns[static_cast<size_t>(q * static_cast<double>(ns.size() - 1))]) * 1e-3;
  };
  return {at(0), at(0.5), at(0.99)};
}

// What one rank sends.
struct Inputs {
  Inputs(int rank, int64_t rows, int64_t hidden) {
    std::mt19937 random(static_cast<uint32_t>(rank * 1000 + rows));
    x.resize(rows * hidden);
    for (float& v : x) v = static_cast<float>(random() % 1000);
    for (int64_t i = 0; i < rows; ++i) {
      const auto first = static_cast<int32_t>(random() % kExperts);
      experts.push_back(first);
      experts.push_back(static_cast<int32_t>((first + 1 + random() % (kExperts - 1)) % kExperts));
      weights.insert(weights.end(), {0.25f, 0.75f});
    }
  }
  std::vector<float> x, weights;
  std::vector<int32_t> experts;
};

Times Measure(TestGroup& group, int64_t hidden, int64_t rows, bool masked, int64_t room, int samples) {
  std::vector<int64_t> ns;
  group.Run([&](TestRank& rank) {
    std::vector<int> expert_rank(kExperts);
    for (int e = 0; e < kExperts; ++e) expert_rank[e] = e * rank.size() / kExperts;
    auto dispatcher = CreateTokenDispatcher({.hidden_size = static_cast<int>(hidden),
                                             .num_experts = kExperts,
                                             .top_k = kTopK,
                                             .max_tokens_per_rank = kMostRows,
                                             .expert_rank = expert_rank,
                                             .masked_max_tokens = masked ? kMostRows : 0},
                                            *rank.device, *rank.comm)
                          .value();
    Inputs in(rank.id(), rows, hidden);
    std::vector<float> out(in.x.size());
    std::vector<int32_t> counts(kExperts);
    for (int i = 0; i < samples + kWarmUp; ++i) {
      std::ranges::fill(out, -1.0f);
      CHECK_OK(rank.comm->Barrier(*rank.stream));
      const int64_t start = Clock::Real().NowNs();
      const auto handle = dispatcher->Dispatch(
          MakeTensor(in.x.data(), rows, hidden), MakeTensor(in.experts.data(), rows, kTopK),
          MakeTensor(in.weights.data(), rows, kTopK), {rows, masked ? room : 0}, counts.data(), *rank.stream);
      CHECK_OK(handle.status());
      const int64_t dispatched = Clock::Real().NowNs();
      for (const ExpertRows& of : handle->groups) {
        std::memcpy(handle->expert_output.row<float>(of.row_begin), handle->expert_input.row<float>(of.row_begin),
                    *of.row_count * hidden * sizeof(float));
      }
      const int64_t computed = Clock::Real().NowNs();
      CHECK_OK(dispatcher->Combine(*handle, {.delta = MakeTensor(out.data(), rows, hidden)}, *rank.stream));
      const int64_t end = Clock::Real().NowNs();
      CHECK(std::ranges::max(counts) <= room || !masked);
      for (size_t v = 0; v < out.size(); ++v) CHECK(out[v] == in.x[v]);
      if (rank.id() == 0 && i >= kWarmUp) ns.push_back(dispatched - start + end - computed);
    }
  });
  return Summarise(std::move(ns));
}

// Most rows of an expert that a rank will send.
int64_t Wanted(int ranks, int64_t rows) {
  int64_t most = 0;
  for (int r = 0; r < ranks; ++r) {
    std::vector<int64_t> counts(kExperts);
    for (const int32_t e : Inputs(r, rows, 0).experts) most = std::max(most, ++counts[e]);
  }
  return most;
}

int Run(const std::string& transport, int ranks, int64_t hidden, int samples) {
  if ((transport != "shm" && transport != "tcp") || ranks < 2 || ranks > kExperts || hidden < 1 || samples < 20) {
    std::fprintf(stderr, "dispatch_benchmark [shm|tcp] [RANKS 2..16] [HIDDEN] [SAMPLES >= 20]\n");
    return 1;
  }
  TestGroup group = transport == "shm" ? SharedMemoryTestGroup(ranks, {.timeout = absl::Seconds(60)})
                                       : GlooTestGroup(ranks, {.timeout = absl::Seconds(60)}, 1 << 20);
  EngineInfo info;
  info.num_ranks = ranks;
  info.num_experts = kExperts;
  info.experts_per_token = kTopK;
  info.limits.max_tokens = kMostRows;
  const DispatchRoom room({.masked_max_tokens = kMostRows}, info);
  std::printf("%s, %d ranks, hidden %ld, %d samples; us of rank 0, dispatch + combine: min / median / p99\n",
              group.ranks[0].comm->transport().c_str(), ranks, hidden, samples);
  std::printf("%6s %6s %27s %27s %27s\n", "rows", "room", "masked, worst case", "masked, room", "contiguous");
  for (const int64_t rows : {1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512}) {
    const int64_t chosen = room.Choose(static_cast<int32_t>(rows));
    const int64_t used = chosen > 0 ? std::max(chosen, Wanted(ranks, rows)) : rows;
    const Times times[] = {Measure(group, hidden, rows, true, rows, samples),
                           Measure(group, hidden, rows, true, used, samples),
                           Measure(group, hidden, rows, false, 0, samples)};
    std::printf("%6ld %6ld", rows, used);
    for (const Times& t : times) std::printf("  %7.1f /%7.1f /%7.1f", t.min_us, t.median_us, t.p99_us);
    std::printf("\n");
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace soloist

int main(int argc, char** argv) {
  return soloist::Run(argc > 1 ? argv[1] : "shm", argc > 2 ? std::atoi(argv[2]) : 4,
                      argc > 3 ? std::atoll(argv[3]) : 1024, argc > 4 ? std::atoi(argv[4]) : 50);
}
