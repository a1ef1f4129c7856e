// What a load test shows while it runs.
#ifndef SOLOIST_CLI_LOADTEST_LIVE_H_
#define SOLOIST_CLI_LOADTEST_LIVE_H_

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace soloist::cli {

// Durations in buckets an eighth of an octave wide, from 1 us to 18 h. Adding is wait-free.
class LiveHistogram {
 public:
  static constexpr int kBuckets = 36 * 8;
  using Counts = std::array<int64_t, kBuckets>;

  void Add(int64_t ns) { counts_[BucketOf(ns)].fetch_add(1, std::memory_order_relaxed); }
  Counts Take() const;
  // Upper edge of the bucket that holds that quantile, in ms; 0 if all counts are 0.
  static double QuantileMs(const Counts& counts, double q);

 private:
  static int BucketOf(int64_t ns);
  std::array<std::atomic<int64_t>, kBuckets> counts_{};
};

// Counters of a running test. Clients' threads add; one thread calls Line.
class LiveStats {
 public:
  void Sent() { sent_.fetch_add(1, std::memory_order_relaxed); }
  void FirstToken(int64_t ttft_ns) { ttft_.Add(ttft_ns); }
  void Tokens(int64_t count) { tokens_.fetch_add(count, std::memory_order_relaxed); }
  void Gap(int64_t ns) { itl_.Add(ns); }
  void Ended(bool ok) { (ok ? ok_ : failed_).fetch_add(1, std::memory_order_relaxed); }

  int64_t ended() const { return ok_.load() + failed_.load(); }

  // One line of at most `width` columns: a bar for `share` (0 to 1) of the run, and rates and percentiles since the
  // call kWindow calls ago.
  std::string Line(int64_t now_ns, double share, int width);
  static constexpr size_t kWindow = 8;

 private:
  struct Sample {
    int64_t ns, ok, tokens;
    LiveHistogram::Counts ttft, itl;
  };
  std::atomic<int64_t> sent_{0}, ok_{0}, failed_{0}, tokens_{0};
  LiveHistogram ttft_, itl_;
  std::deque<Sample> samples_;
};

// A line on stderr, which must be a terminal, that is written anew twice a second until destroyed.
class LiveDisplay {
 public:
  // `share`: how much of the run is done, 0 to 1. Called by a thread of the display.
  LiveDisplay(LiveStats& stats, std::function<double()> share);
  ~LiveDisplay();
  LiveDisplay(const LiveDisplay&) = delete;
  LiveDisplay& operator=(const LiveDisplay&) = delete;

 private:
  void Run();

  LiveStats& stats_;
  const std::function<double()> share_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
  std::thread thread_;
};

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_LIVE_H_
