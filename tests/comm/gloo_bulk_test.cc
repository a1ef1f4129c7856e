// The contract of Communicator where payloads go through Gloo: all of them, and those of at least 1,000 bytes.
#include "tests/comm/communicator_contract.h"
#include "tests/comm/gloo_group.h"

namespace soloist {
namespace {

CommBackend Gloo(int size) {
  return {.name = "Gloo", .size = size, .asynchronous = false, .make = [](int ranks, const CommOptions& options) {
            return GlooTestGroup(ranks, options, 1);
          }};
}
CommBackend Mixed(int size) {
  return {.name = "Mixed", .size = size, .asynchronous = false, .make = [](int ranks, const CommOptions& options) {
            return GlooTestGroup(ranks, options, 1000);
          }};
}

INSTANTIATE_TEST_SUITE_P(Gloo, CommunicatorContract, testing::Values(Gloo(1), Gloo(4), Mixed(3)), CommBackendName);

}  // namespace
}  // namespace soloist
