// What the tests of the CUDA backend share: a device prepared for a model's sizes, device arrays with poison and guard
// zones, fresh random inputs from a printed seed, bfloat16 and FP8 on the host, and error norms.
#ifndef SOLOIST_TESTS_GPU_GPU_FIXTURE_H_
#define SOLOIST_TESTS_GPU_GPU_FIXTURE_H_

#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace soloist {

inline float Widened(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float Widened(float x) { return x; }
// Round to nearest even; NaN stays NaN.
BFloat16 Rounded(float x);
// OCP E4M3: the value of 8 bits; the nearest, ties to even, saturating at +-448.
float FromF8(uint8_t bits);
uint8_t ToF8(float x);

// body(i) for i in [0, n) on all cores.
void Parallel(int64_t n, const std::function<void(int64_t)>& body);

// Random numbers of one test, a function of --gtest_random_seed (0: drawn and printed) and the test's name.
class Random {
 public:
  Random();
  uint64_t Bits();
  // In [low, high].
  int64_t Int(int64_t low, int64_t high) { return low + static_cast<int64_t>(Bits() % (high - low + 1)); }
  double Unit() { return static_cast<double>(Bits() >> 11) * 0x1p-53; }
  // Mean 0, standard deviation `scale`, nearly normal.
  std::vector<float> Normal(int64_t n, float scale = 1);
  std::vector<BFloat16> NormalBf16(int64_t n, float scale = 1);
  // 0 .. n-1 in random order.
  std::vector<int32_t> Permutation(int32_t n);

 private:
  uint64_t state_;
};

// One GPU, prepared. Everything is enqueued on one stream.
class Gpu {
 public:
  // One per (limits, deterministic), made on first use and kept until the test suite ends.
  static Gpu& For(const OpLimits& limits, bool deterministic = false);
  static void ReleaseAll();
  // Of all that are made from now on; empty: none.
  static std::string& tuning_file();

  Gpu(const OpLimits& limits, bool deterministic);
  Device& device() { return *device_; }
  Ops& ops() { return device_->ops(); }
  Stream& stream() { return *stream_; }
  // Waits; an error of the device fails the test and ends the process, since nothing works after it.
  void Synchronize(const std::string& what = "");

 private:
  std::unique_ptr<DeviceFactory> factory_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

// n elements of T in device memory.
template <typename T>
class DeviceArray {
 public:
  static constexpr int64_t kGuardBytes = 4096;

  // An input: exactly these elements, so that a memory checker sees reads beyond them.
  DeviceArray(Gpu& gpu, const std::vector<T>& values) : gpu_(&gpu), size_(std::ssize(values)) {
    Allocate(0);
    Write(values.data(), 0, size_);
  }
  // An output: every byte 0xFF (NaN in each floating-point format here, -1 in integers) and a guard zone on both sides.
  static DeviceArray Poisoned(Gpu& gpu, int64_t size) {
    DeviceArray array(&gpu, size);
    array.Allocate(kGuardBytes);
    return array;
  }
  // Read and written: these elements between guard zones.
  static DeviceArray Guarded(Gpu& gpu, const std::vector<T>& values) {
    DeviceArray array = Poisoned(gpu, std::ssize(values));
    array.Write(values.data(), 0, array.size_);
    return array;
  }

  T* data() const { return reinterpret_cast<T*>(static_cast<char*>(buffer_.data()) + guard_); }
  int64_t size() const { return size_; }
  Tensor View(int64_t rows, int64_t cols) const {
    EXPECT_LE(rows * cols, size_);
    return MakeTensor(data(), rows, cols);
  }
  void Write(const T* values, int64_t at, int64_t count) {
    gpu_->device().Copy(data() + at, values, count * sizeof(T), gpu_->stream());
    gpu_->Synchronize();
  }
  // All elements; fails the test if a guard zone has changed.
  std::vector<T> Read(const std::string& what = "") const {
    std::vector<char> bytes(size_ * sizeof(T) + 2 * guard_);
    gpu_->device().Copy(bytes.data(), buffer_.data(), std::ssize(bytes), gpu_->stream());
    gpu_->Synchronize(what);
    int64_t changed = 0, first = 0;
    for (int64_t i = 0; i < guard_; ++i) {
      for (const int64_t at : {i, std::ssize(bytes) - 1 - i}) {
        if (static_cast<uint8_t>(bytes[at]) == 0xFF) continue;
        if (changed++ == 0) first = at - guard_;
      }
    }
    EXPECT_EQ(changed, 0) << what << ": bytes written outside the output; one is at byte offset " << first << " of "
                          << size_ * static_cast<int64_t>(sizeof(T));
    std::vector<T> values(size_);
    if (size_ > 0) std::memcpy(static_cast<void*>(values.data()), bytes.data() + guard_, size_ * sizeof(T));
    return values;
  }

 private:
  DeviceArray(Gpu* gpu, int64_t size) : gpu_(gpu), size_(size) {}
  void Allocate(int64_t guard) {
    guard_ = guard;
    const int64_t bytes = size_ * static_cast<int64_t>(sizeof(T)) + 2 * guard;
    auto buffer = gpu_->device().Allocate(std::max<int64_t>(bytes, 16));
    CHECK_OK(buffer.status());
    buffer_ = *std::move(buffer);
    if (guard == 0) return;
    const std::vector<uint8_t> poison(bytes, 0xFF);
    gpu_->device().Copy(buffer_.data(), poison.data(), bytes, gpu_->stream());
    gpu_->Synchronize();
  }

  Gpu* gpu_;
  int64_t size_;
  int64_t guard_ = 0;
  Buffer buffer_;
};

// The errors of outputs against float64 references, gathered over the cases of one test and printed at its end.
class Errors {
 public:
  // `row`: of ||out - ref|| / ||ref|| of each row. An element may differ by element_relative * |ref| +
  // element_row * (root mean square of its row).
  struct Bounds {
    double row = 0;
    double element_relative = 0;
    double element_row = 0;
    double rms = 0;  // of all rows' errors; 0: not bounded
  };
  // A bf16 output that was rounded once from a float32 sum: half a unit in the last place is 2^-8 of a value at most
  // (and 1.66e-3 rms where mantissas are even), so a row is within 2^-8 too; some room is left for the sum.
  static constexpr Bounds kRoundedOnce = {0x1p-8 * 1.02, 0x1p-8 * 1.02, 1e-3, 1.8e-3};
  // A bf16 output of bf16 intermediates, rounded three times at most: 3e-3 for all rows together. A row of few inner
  // elements scatters more.
  static constexpr Bounds kBf16 = {8e-3, 0x1p-8, 2e-2, 3e-3};
  // Attention, where a row is one head's 32 to 128 elements: probabilities and output are bf16. Few elements scatter
  // more, so the bound of 4e-3 holds for all rows together.
  static constexpr Bounds kAttention = {6e-3, 0x1p-8, 2.5e-2, 4e-3};
  // Float32 sums of exact products; tensor cores cut each partial sum off, which adds up over long rows.
  static constexpr Bounds kF32 = {2e-4, 1e-4, 1e-3, 0};

  Errors(std::string name, const Bounds& bounds) : name_(std::move(name)), bounds_(bounds) {}
  ~Errors();
  // One row. At most a few failures are printed per test.
  template <typename T>
  void Row(const T* out, const double* ref, int64_t cols, const std::string& what) {
    std::vector<double> wide(cols);
    for (int64_t i = 0; i < cols; ++i) wide[i] = Widened(out[i]);
    Add(wide.data(), ref, cols, what);
  }
  // All rows of a contiguous output.
  template <typename T>
  void Rows(const std::vector<T>& out, const std::vector<double>& ref, int64_t cols, const std::string& what) {
    ASSERT_EQ(out.size(), ref.size()) << what;
    for (int64_t i = 0; i * cols < std::ssize(ref); ++i) {
      Row(out.data() + i * cols, ref.data() + i * cols, cols, what + " row " + std::to_string(i));
    }
  }

 private:
  void Add(const double* out, const double* ref, int64_t cols, const std::string& what);

  const std::string name_;
  const Bounds bounds_;
  int64_t rows_ = 0, failures_ = 0;
  double worst_ = 0, worst_element_ = 0, square_sum_ = 0;
  std::string worst_what_;
};

// Fails if any element is NaN (as poison is) or infinite.
template <typename T>
void ExpectAllFinite(const std::vector<T>& values, const std::string& what) {
  int64_t bad = 0, first = -1;
  for (int64_t i = 0; i < std::ssize(values); ++i) {
    if (std::isfinite(Widened(values[i]))) continue;
    if (bad++ == 0) first = i;
  }
  EXPECT_EQ(bad, 0) << what << ": elements of " << values.size() << " are not finite (unwritten?), the first is "
                    << first;
}

// Whether the bytes are the same.
template <typename T>
bool SameBits(const T* a, const T* b, int64_t count) {
  return count == 0 || std::memcmp(a, b, count * sizeof(T)) == 0;
}

template <typename T>
bool IsPoison(const T& value) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  for (size_t i = 0; i < sizeof(T); ++i) {
    if (bytes[i] != 0xFF) return false;
  }
  return true;
}

// "m=3 n=8": for messages.
template <typename... Args>
std::string Text(const char* format, Args... args) {
  char text[256];
  std::snprintf(text, sizeof(text), format, args...);
  return text;
}

// Sizes that the op tests use: of the models in models/, and odd ones. Widths are multiples of 64, as the backend asks.
struct ModelSizes {
  const char* name;
  int64_t hidden, inner;  // inner: expert_hidden
  bool gated;
  int64_t vocab;
  int heads, kv_heads, head_dim, experts;
};
inline constexpr ModelSizes kTinySizes = {"tiny", 256, 128, true, 4096, 4, 2, 64, 16};
inline constexpr ModelSizes kSmallSizes = {"paper16-small", 128, 256, false, 512, 4, 4, 32, 16};
inline constexpr ModelSizes kPaperSizes = {"paper16", 4096, 16384, false, 32000, 32, 32, 128, 2};
inline constexpr ModelSizes kBenchSizes = {"bench-1b", 1024, 896, true, 32000, 16, 8, 64, 16};
inline constexpr ModelSizes kOddSizes = {"odd", 320, 192, true, 1008, 6, 3, 32, 5};
OpLimits LimitsOf(const ModelSizes& sizes, int64_t max_tokens = 2048, int64_t max_model_len = 16384);

}  // namespace soloist

#endif  // SOLOIST_TESTS_GPU_GPU_FIXTURE_H_
