// main of nccl_contract_test: one rank, a process. nccl.sh starts them all.
//   nccl_contract_test --rank=R --size=N --store=DIR [--seed=N] [--limit_s=60] [--device=cuda] [gtest's flags]
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "gtest/gtest.h"
#include "tests/gpu/nccl_group.h"

namespace {

// A rank that hangs must not outlive the test, nor take the others' report with it.
void OutOfTime(int /*signal*/) {
  constexpr char kMessage[] = "out of time: 0 passed, 1 failed\n";
  const ssize_t written = write(STDOUT_FILENO, kMessage, sizeof(kMessage) - 1);
  _exit(written < 0 ? 125 : 124);
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  auto& flags = soloist::NcclFlags();
  flags.location = "cuda";
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    const auto value = [&](std::string_view name) -> const char* {
      return arg.starts_with(name) ? argv[i] + name.size() : nullptr;
    };
    if (const char* rank = value("--rank=")) {
      flags.rank = std::atoi(rank);
    } else if (const char* size = value("--size=")) {
      flags.size = std::atoi(size);
    } else if (const char* store = value("--store=")) {
      flags.store = store;
    } else if (const char* seed = value("--seed=")) {
      flags.seed = std::atoi(seed);
    } else if (const char* limit = value("--limit_s=")) {
      flags.limit_s = std::atoi(limit);
    } else if (const char* device = value("--device=")) {
      flags.location = device;
    } else {
      std::fprintf(stderr, "unknown flag %s\n", argv[i]);
      return 2;
    }
  }
  if (flags.store.empty() || flags.rank < 0 || flags.rank >= flags.size) {
    std::fprintf(stderr, "rank %d of %d, store '%s'\n", flags.rank, flags.size, flags.store.c_str());
    return 2;
  }
  signal(SIGALRM, OutOfTime);
  alarm(static_cast<unsigned>(flags.limit_s));
  const int status = RUN_ALL_TESTS();
  const testing::UnitTest& tests = *testing::UnitTest::GetInstance();
  std::printf("rank %d: %d passed, %d failed\n", flags.rank, tests.successful_test_count(), tests.failed_test_count());
  return status;
}
