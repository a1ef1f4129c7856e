// What a communicator over NCCL refuses before it touches NCCL: a binary without it, a device that is no GPU.
#include <string>

#include "engine/comm/nccl_communicator.h"
#include "gtest/gtest.h"
#include "tests/comm/comm_group.h"
#include "tests/comm/memory_store.h"

namespace soloist {
namespace {

TEST(NcclRefusalTest, ACpuHasNoNccl) {
  const TestGroup group = CpuGroup(1);
  MemoryStore store;
  const auto comm = CreateNcclCommunicator(0, 1, store, *group.ranks[0].device, {});
  // The one in a binary with CUDA, the other without.
  EXPECT_TRUE(absl::IsInvalidArgument(comm.status()) || absl::IsUnimplemented(comm.status())) << comm.status();
  EXPECT_NE(comm.status().message().find("NCCL"), std::string::npos) << comm.status();
  EXPECT_NE(comm.status().message().find(group.ranks[0].device->Name()), std::string::npos) << comm.status();
  EXPECT_FALSE(store.Get("nccl/here/0", absl::ZeroDuration()).ok()) << "it has not begun to join";
}

}  // namespace
}  // namespace soloist
