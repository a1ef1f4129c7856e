// Groups of ranks over TCP: threads of this process, each with its own communicator, connected over loopback.
#ifndef SOLOIST_TESTS_COMM_GLOO_GROUP_H_
#define SOLOIST_TESTS_COMM_GLOO_GROUP_H_

#include <thread>
#include <utility>
#include <vector>

#include "engine/comm/gloo_communicator.h"
#include "tests/comm/comm_group.h"
#include "tests/comm/memory_store.h"

namespace soloist {

// Payloads of at least `gloo_min_bytes` go through Gloo.
inline TestGroup GlooTestGroup(int size, const CommOptions& options, int64_t gloo_min_bytes) {
  TestGroup group = CpuGroup(size);
  MemoryStore store;
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) {
    threads.emplace_back([&, r] {
      TestRank& rank = group.ranks[r];
      absl::StatusOr<std::unique_ptr<Communicator>> comm = CreateGlooCommunicator(
          r, size, store, *rank.device,
          {.comm = options, .hostname_or_address = "127.0.0.1", .gloo_min_bytes = gloo_min_bytes});
      CHECK_OK(comm.status());
      rank.comm = *std::move(comm);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return group;
}

}  // namespace soloist

#endif  // SOLOIST_TESTS_COMM_GLOO_GROUP_H_
