// The contract of Communicator, for the implementations that need no other process.
#include "tests/comm/communicator_contract.h"

namespace soloist {
namespace {

CommBackend SharedMemory(int size) {
  return {.name = "SharedMemory", .size = size, .asynchronous = false, .make = SharedMemoryTestGroup};
}

INSTANTIATE_TEST_SUITE_P(One, CommunicatorContract,
                         testing::Values(CommBackend{.name = "Self", .size = 1, .make = SelfTestGroup}),
                         CommBackendName);
INSTANTIATE_TEST_SUITE_P(Threads, CommunicatorContract,
                         testing::Values(SharedMemory(1), SharedMemory(2), SharedMemory(3), SharedMemory(16)),
                         CommBackendName);

}  // namespace
}  // namespace soloist
