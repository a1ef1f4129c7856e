#include "tests/gpu/gpu_fixture.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <thread>
#include <tuple>
#include <utility>

#include "kernels/uniform.h"

namespace soloist {
namespace {

uint64_t BaseSeed() {
  static const uint64_t seed = [] {
    const int flag = GTEST_FLAG_GET(random_seed);
    const uint64_t drawn = flag != 0 ? flag : 1 + std::random_device()() % 99999;
    std::printf("inputs: --gtest_random_seed=%llu\n", static_cast<unsigned long long>(drawn));
    return drawn;
  }();
  return seed;
}

struct Prepared {
  OpLimits limits;
  bool deterministic;
  std::unique_ptr<Gpu> gpu;
};
std::vector<Prepared>& AllPrepared() {
  static std::vector<Prepared> all;
  return all;
}

auto KeyOf(const OpLimits& l) {
  return std::tuple(l.max_tokens, l.max_expert_rows, l.max_logit_rows, l.max_sequences, l.max_model_len, l.hidden_size,
                    l.expert_hidden_size, l.gated_experts, l.vocab_size, l.num_heads, l.num_kv_heads, l.head_dim,
                    l.num_experts, l.local_experts, l.top_k, l.fp8_kv);
}

// Devices go before the driver does.
class Releaser final : public testing::Environment {
 public:
  void TearDown() override { Gpu::ReleaseAll(); }
};
[[maybe_unused]] testing::Environment* const releaser = testing::AddGlobalTestEnvironment(new Releaser);

}  // namespace

BFloat16 Rounded(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

float FromF8(uint8_t bits) {
  const int exponent = (bits >> 3) & 15, fraction = bits & 7;
  if (exponent == 15 && fraction == 7) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude =
      exponent == 0 ? std::ldexp(static_cast<float>(fraction), -9) : std::ldexp(8.0f + fraction, exponent - 10);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

uint8_t ToF8(float x) {
  if (std::isnan(x)) return 0x7F;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::min(std::abs(x), 448.0f);
  // The largest code whose value is not above, then the nearer of it and the next.
  uint8_t low = 0;
  for (uint8_t step = 0x40; step > 0; step >>= 1) {
    if (low + step <= 0x7E && FromF8(low + step) <= magnitude) low += step;
  }
  if (low == 0x7E) return sign | low;
  const float below = magnitude - FromF8(low), above = FromF8(low + 1) - magnitude;
  return sign | static_cast<uint8_t>(above < below || (above == below && (low & 1) != 0) ? low + 1 : low);
}

void Parallel(int64_t n, const std::function<void(int64_t)>& body) {
  const auto threads = std::min<int64_t>(n, std::max(1u, std::thread::hardware_concurrency()));
  std::atomic<int64_t> next = 0;
  const auto work = [&] {
    for (int64_t i = next++; i < n; i = next++) body(i);
  };
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < threads; ++t) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
}

Random::Random() : state_(MixBits(BaseSeed())) {
  const auto* info = testing::UnitTest::GetInstance()->current_test_info();
  if (info == nullptr) return;
  for (const char* text : {info->test_suite_name(), info->name()}) {
    for (; *text != 0; ++text) state_ = MixBits(state_ ^ static_cast<uint8_t>(*text));
  }
}

uint64_t Random::Bits() { return MixBits(state_ += 0x632be59bd9b4e019); }

std::vector<float> Random::Normal(int64_t n, float scale) {
  const uint64_t key = Bits();
  std::vector<float> values(n);
  // The sum of four uniform numbers, variance 4/12, from one mix each.
  constexpr int64_t kChunk = 1 << 16;
  Parallel((n + kChunk - 1) / kChunk, [&](int64_t chunk) {
    for (int64_t i = chunk * kChunk; i < std::min(n, (chunk + 1) * kChunk); ++i) {
      const uint64_t draw = MixBits(key + static_cast<uint64_t>(i));
      const auto sum =
          static_cast<float>((draw & 0xffff) + (draw >> 16 & 0xffff) + (draw >> 32 & 0xffff) + (draw >> 48));
      values[i] = (sum / 65536.0f - 1.99997f) * 1.7320508f * scale;
    }
  });
  return values;
}

std::vector<BFloat16> Random::NormalBf16(int64_t n, float scale) {
  const std::vector<float> wide = Normal(n, scale);
  std::vector<BFloat16> values(n);
  std::transform(wide.begin(), wide.end(), values.begin(), Rounded);
  return values;
}

std::vector<int32_t> Random::Permutation(int32_t n) {
  std::vector<int32_t> values(n);
  std::iota(values.begin(), values.end(), 0);
  for (int32_t i = n - 1; i > 0; --i) std::swap(values[i], values[Int(0, i)]);
  return values;
}

Gpu::Gpu(const OpLimits& limits, bool deterministic) {
  auto factory = CreateDeviceFactory({.kind = "cuda", .deterministic = deterministic, .tuning_file = tuning_file()});
  CHECK_OK(factory.status());
  factory_ = *std::move(factory);
  auto device = factory_->CreateDevice(0);
  CHECK_OK(device.status());
  device_ = *std::move(device);
  CHECK_OK(device_->BindThread());
  auto stream = device_->CreateStream();
  CHECK_OK(stream.status());
  stream_ = *std::move(stream);
  CHECK_OK(device_->Prepare(limits));
}

Gpu& Gpu::For(const OpLimits& limits, bool deterministic) {
  for (const Prepared& prepared : AllPrepared()) {
    if (prepared.deterministic == deterministic && KeyOf(prepared.limits) == KeyOf(limits)) {
      return *prepared.gpu;
    }
  }
  AllPrepared().push_back({limits, deterministic, std::make_unique<Gpu>(limits, deterministic)});
  return *AllPrepared().back().gpu;
}

std::string& Gpu::tuning_file() {
  static std::string file;
  return file;
}

void Gpu::ReleaseAll() { AllPrepared().clear(); }

void Gpu::Synchronize(const std::string& what) {
  const absl::Status status = stream_->Synchronize();
  if (status.ok()) return;
  ADD_FAILURE() << what << ": " << status.ToString();
  std::printf("DEVICE ERROR in %s: %s: %s\n",
              testing::UnitTest::GetInstance()->current_test_info() != nullptr
                  ? testing::UnitTest::GetInstance()->current_test_info()->name()
                  : "set-up",
              what.c_str(), status.ToString().c_str());
  std::fflush(stdout);
  std::_Exit(3);
}

Errors::~Errors() {
  const double rms = std::sqrt(square_sum_ / static_cast<double>(std::max<int64_t>(rows_, 1)));
  std::printf(
      "  %-28s %7lld rows: error per row %.2e rms, %.2e worst (bound %.1e) at %s; worst element %.2f of its bound\n",
      name_.c_str(), static_cast<long long>(rows_), rms, worst_, bounds_.row, worst_what_.c_str(), worst_element_);
  if (bounds_.rms > 0) {
    EXPECT_LE(rms, bounds_.rms) << name_ << ": all rows together";
  }
  if (failures_ > 3) std::printf("  %s: %lld rows failed in all\n", name_.c_str(), static_cast<long long>(failures_));
}

void Errors::Add(const double* out, const double* ref, int64_t cols, const std::string& what) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < cols; ++i) {
    difference += (out[i] - ref[i]) * (out[i] - ref[i]);
    norm += ref[i] * ref[i];
  }
  const double error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  const double rms = std::sqrt(norm / static_cast<double>(cols));
  double element = 0;
  int64_t at = 0;
  for (int64_t i = 0; i < cols; ++i) {
    const double allowed = bounds_.element_relative * std::abs(ref[i]) + bounds_.element_row * rms + 1e-30;
    const double share = std::abs(out[i] - ref[i]) / allowed;
    if (!(share <= element)) element = share, at = i;
    if (std::isnan(share)) break;
  }
  ++rows_;
  square_sum_ += error * error;
  if (!(error <= worst_)) worst_ = error, worst_what_ = what;
  if (!(element <= worst_element_)) worst_element_ = element;
  if (error <= bounds_.row && element <= 1) return;
  if (++failures_ > 3) return;
  ADD_FAILURE() << name_ << " " << what << ": row error " << error << " (bound " << bounds_.row << "); column " << at
                << " of " << cols << " is " << out[at] << ", expected " << ref[at];
}

OpLimits LimitsOf(const ModelSizes& sizes, int64_t max_tokens, int64_t max_model_len) {
  OpLimits limits;
  limits.max_tokens = max_tokens;
  limits.max_expert_rows = 4 * max_tokens;
  limits.max_logit_rows = 512;
  limits.max_sequences = 512;
  limits.max_model_len = max_model_len;
  limits.hidden_size = sizes.hidden;
  limits.expert_hidden_size = sizes.inner;
  limits.gated_experts = sizes.gated;
  limits.vocab_size = sizes.vocab;
  limits.num_heads = sizes.heads;
  limits.num_kv_heads = sizes.kv_heads;
  limits.head_dim = sizes.head_dim;
  limits.num_experts = sizes.experts;
  limits.local_experts = sizes.experts;
  limits.top_k = 4;
  limits.fp8_kv = true;
  return limits;
}

}  // namespace soloist
