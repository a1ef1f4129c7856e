// What the op tests share: a CPU device, random inputs, poison for outputs, the relative norm.
#ifndef SOLOIST_TESTS_KERNELS_OPS_FIXTURE_H_
#define SOLOIST_TESTS_KERNELS_OPS_FIXTURE_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"
#include "kernels/device.h"

namespace soloist {

inline constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

inline float Widened(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// ||out - ref|| / ||ref||.
inline double RelativeError(const std::vector<float>& out, const std::vector<double>& ref) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    difference += std::pow(out[i] - ref[i], 2);
    norm += ref[i] * ref[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

// Of a product of `kernel`, F32 sums included.
inline double GemmBound(std::string_view kernel) { return kernel == "avx512_bf16" ? 1e-5 : 1e-6; }

// Parameter: one of the GEMM kernels of this CPU, threads.
class OpsTest : public testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  OpsTest() {
    factory_ = *CreateDeviceFactory({.cpu_threads = std::get<1>(GetParam()), .cpu_gemm = std::get<0>(GetParam())});
    device_ = *factory_->CreateDevice(0);
    stream_ = *device_->CreateStream();
  }

  Ops& ops() { return device_->ops(); }
  Stream& stream() { return *stream_; }
  std::vector<float> Random(int64_t n, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> values(n);
    for (float& v : values) v = normal(random_);
    return values;
  }
  std::vector<BFloat16> RandomBf16(int64_t n, float scale = 1) {
    std::vector<float> wide = Random(n, scale);
    std::vector<BFloat16> values(n);
    Narrow(wide.data(), values.data(), n);
    return values;
  }

  // Against float64, and each row alone against all of them.
  void CheckLinear(const std::string& name);

  std::mt19937 random_{20261124};
  std::unique_ptr<DeviceFactory> factory_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_KERNELS_OPS_FIXTURE_H_
