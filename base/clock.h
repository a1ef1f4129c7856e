// Time, injectable. All times are nanoseconds of a monotonic clock unless a name says otherwise.
#ifndef SOLOIST_BASE_CLOCK_H_
#define SOLOIST_BASE_CLOCK_H_

#include <atomic>
#include <chrono>
#include <cstdint>

namespace soloist {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  // Monotonic, arbitrary origin.
  virtual int64_t NowNs() const = 0;
  // Wall time since the Unix epoch, for what clients see.
  virtual int64_t UnixNs() const = 0;

  // The real one; never destroyed.
  static const Clock& Real();
};

// For tests: stands still until told to move. UnixNs() equals NowNs().
class ManualClock final : public Clock {
 public:
  int64_t NowNs() const override { return now_ns_.load(); }
  int64_t UnixNs() const override { return now_ns_.load(); }
  void AdvanceNs(int64_t delta_ns) { now_ns_ += delta_ns; }

 private:
  std::atomic<int64_t> now_ns_{0};
};

}  // namespace soloist

#endif  // SOLOIST_BASE_CLOCK_H_
