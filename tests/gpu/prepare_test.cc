// Device::Prepare on CUDA: what it refuses, it names.
#include <string>

#include "gtest/gtest.h"
#include "kernels/device.h"
#include "tests/gpu/gpu_fixture.h"

namespace soloist {
namespace {

absl::Status PrepareWith(const OpLimits& limits) {
  auto factory = CreateDeviceFactory({.kind = "cuda"});
  if (!factory.ok()) return factory.status();
  auto device = (*factory)->CreateDevice(0);
  if (!device.ok()) return device.status();
  return (*device)->Prepare(limits);
}

TEST(PrepareTest, RefusesWidths) {
  for (int64_t OpLimits::* width : {&OpLimits::hidden_size, &OpLimits::expert_hidden_size}) {
    OpLimits limits = LimitsOf(kTinySizes);
    limits.*width = 136;
    const absl::Status status = PrepareWith(limits);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status.ToString();
    EXPECT_NE(status.ToString().find("136"), std::string::npos) << status.ToString();
    EXPECT_NE(status.ToString().find("multiple of 64"), std::string::npos) << status.ToString();
  }
  OpLimits limits = LimitsOf(kTinySizes);
  limits.head_dim = 24;  // 4 heads
  EXPECT_EQ(PrepareWith(limits).code(), absl::StatusCode::kInvalidArgument);
}

TEST(PrepareTest, TakesTheModels) {
  for (const ModelSizes& sizes : {kTinySizes, kSmallSizes, kPaperSizes, kBenchSizes, kOddSizes}) {
    const absl::Status status = PrepareWith(LimitsOf(sizes));
    EXPECT_TRUE(status.ok()) << sizes.name << ": " << status.ToString();
  }
}

}  // namespace
}  // namespace soloist
