#include "base/clock.h"

namespace soloist {
namespace {

template <typename ChronoClock>
int64_t Ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(ChronoClock::now().time_since_epoch()).count();
}

class RealClock final : public Clock {
 public:
  int64_t NowNs() const override { return Ns<std::chrono::steady_clock>(); }
  int64_t UnixNs() const override { return Ns<std::chrono::system_clock>(); }
};

}  // namespace

const Clock& Clock::Real() {
  static const RealClock* clock = new RealClock;
  return *clock;
}

}  // namespace soloist
