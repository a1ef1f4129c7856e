#include "cli/loadtest/live.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <utility>

#include "base/clock.h"
#include "fmt/format.h"

namespace soloist::cli {
namespace {

constexpr std::chrono::milliseconds kDisplayPeriod(500);
constexpr int kUnknownColumns = 80;

LiveHistogram::Counts Difference(LiveHistogram::Counts late, const LiveHistogram::Counts& early) {
  for (size_t i = 0; i < late.size(); ++i) late[i] -= early[i];
  return late;
}

}  // namespace

int LiveHistogram::BucketOf(int64_t ns) {
  if (ns <= 1000) return 0;
  return std::min(kBuckets - 1, static_cast<int>(std::log2(static_cast<double>(ns) * 1e-3) * 8));
}

LiveHistogram::Counts LiveHistogram::Take() const {
  Counts out;
  for (int i = 0; i < kBuckets; ++i) out[i] = counts_[i].load(std::memory_order_relaxed);
  return out;
}

double LiveHistogram::QuantileMs(const Counts& counts, double q) {
  const int64_t all = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (all == 0) return 0;
  const double rank = q * static_cast<double>(all);
  int64_t below = 0;
  for (int i = 0; i < kBuckets; ++i) {
    below += counts[i];
    if (static_cast<double>(below) >= rank) return std::exp2((i + 1) / 8.0) * 1e-3;
  }
  return std::exp2(kBuckets / 8.0) * 1e-3;
}

std::string LiveStats::Line(int64_t now_ns, double share, int width) {
  samples_.push_back({now_ns, ok_.load(), tokens_.load(), ttft_.Take(), itl_.Take()});
  if (samples_.size() > kWindow + 1) samples_.pop_front();
  const Sample &late = samples_.back(), &early = samples_.front();
  const double s = std::max(static_cast<double>(late.ns - early.ns) * 1e-9, 1e-9);
  const auto ttft = Difference(late.ttft, early.ttft), itl = Difference(late.itl, early.itl);
  constexpr int kBar = 16;
  const int full = static_cast<int>(std::lround(std::clamp(share, 0.0, 1.0) * kBar));
  std::string line = fmt::format(
      "[{:#<{}}{:.<{}}] {:3.0f}%  {} running  {:.1f} req/s  output {:.0f} tok/s  TTFT {:.1f}/{:.1f}  ITL {:.2f}/{:.2f} "
      "ms",
      "", full, "", kBar - full, 100 * std::clamp(share, 0.0, 1.0), sent_.load() - late.ok - failed_.load(),
      static_cast<double>(late.ok - early.ok) / s, static_cast<double>(late.tokens - early.tokens) / s,
      LiveHistogram::QuantileMs(ttft, 0.5), LiveHistogram::QuantileMs(ttft, 0.99), LiveHistogram::QuantileMs(itl, 0.5),
      LiveHistogram::QuantileMs(itl, 0.99));
  if (failed_.load() > 0) line += fmt::format("  {} failed", failed_.load());
  return line.substr(0, static_cast<size_t>(std::max(width, 0)));
}

LiveDisplay::LiveDisplay(LiveStats& stats, std::function<double()> share)
    : stats_(stats), share_(std::move(share)), thread_([this] { Run(); }) {}

LiveDisplay::~LiveDisplay() {
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
  }
  changed_.notify_one();
  thread_.join();
  fmt::print(stderr, "\r\033[K");
}

void LiveDisplay::Run() {
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kDisplayPeriod, [this] { return ended_; })) {
    winsize size{};
    const int columns = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col : kUnknownColumns;
    fmt::print(stderr, "\r{}\033[K", stats_.Line(Clock::Real().NowNs(), share_(), columns - 1));
  }
}

}  // namespace soloist::cli
