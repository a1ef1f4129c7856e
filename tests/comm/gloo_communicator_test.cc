// The contract of Communicator over TCP, every byte moved by our own connections.
#include "tests/comm/communicator_contract.h"
#include "tests/comm/gloo_group.h"

namespace soloist {
namespace {

CommBackend Tcp(int size) {
  return {.name = "Tcp", .size = size, .asynchronous = false, .make = [](int ranks, const CommOptions& options) {
            return GlooTestGroup(ranks, options, GlooOptions::kNever);
          }};
}

INSTANTIATE_TEST_SUITE_P(Tcp, CommunicatorContract, testing::Values(Tcp(1), Tcp(2), Tcp(3), Tcp(16)), CommBackendName);

}  // namespace
}  // namespace soloist
