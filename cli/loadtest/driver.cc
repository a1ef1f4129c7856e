#include "cli/loadtest/driver.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <utility>

#include "base/clock.h"
#include "cli/loadtest/live.h"

namespace soloist::cli {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
// How far requests are prepared ahead of their time: that many, or that many prompt tokens.
constexpr size_t kAhead = 2048;
constexpr int64_t kAheadTokens = 4 << 20;
// Nothing is prepared in the last moment before a send.
constexpr int64_t kPrepareMarginNs = 500'000;

class RealTimer final : public LoadTimer {
 public:
  int64_t NowNs() const override { return Clock::Real().NowNs(); }
  void WaitUntil(int64_t ns) override {
    std::unique_lock lock(mutex_);
    const auto woken = [this] { return woken_; };
    if (ns == kNever) {
      changed_.wait(lock, woken);
    } else {
      changed_.wait_for(lock, std::chrono::nanoseconds(ns - NowNs()), woken);
    }
    woken_ = false;
  }
  void Wake() override {
    std::lock_guard lock(mutex_);
    woken_ = true;
    changed_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool woken_ = false;
};

class Driver {
 public:
  Driver(LoadClient& client, const RequestSource& source, const LoadOptions& options, LoadTimer& timer)
      : client_(client),
        source_(source),
        options_(options),
        timer_(timer),
        random_(options.seed ^ 0xbb67ae8584caa73bULL),
        cancels_(options.cancel_share),
        stop_after_ns_(options.stop_after_ns) {
    if (options.concurrency && std::isfinite(options.concurrency->end_s())) {
      stop_after_ns_ = std::min<int64_t>(stop_after_ns_, std::llround(options.concurrency->end_s() * 1e9));
    }
  }

  std::vector<RequestRecord> Run() {
    while (PrepareOne()) {
    }
    start_ns_ = timer_.NowNs();
    while (AwaitTurn()) {
      Ready& next = ready_.front();
      ahead_tokens_ -= next.tokens;
      if (options_.live != nullptr) options_.live->Sent();
      {
        std::lock_guard lock(mutex_);
        ++running_;
      }
      const std::shared_ptr<PreparedCall> call = std::move(next.call);
      ready_.pop_front();
      call->Send();
    }
    const size_t sent = records_.size() - ready_.size();
    ready_.clear();
    while (Running()) timer_.WaitUntil(kNever);
    std::vector<RequestRecord> out;
    out.reserve(sent);
    std::move(records_.begin(), records_.begin() + static_cast<std::ptrdiff_t>(sent), std::back_inserter(out));
    return out;
  }

 private:
  struct Ready {
    std::shared_ptr<PreparedCall> call;
    RequestRecord* record;
    int64_t at_ns, tokens;
  };

  // False if there is no more, or enough is ready.
  bool PrepareOne() {
    if (exhausted_ || ready_.size() >= kAhead || (ahead_tokens_ > kAheadTokens && !ready_.empty())) return false;
    const std::optional<PlannedRequest> request = source_();
    if (!request || request->at_ns >= stop_after_ns_) {
      exhausted_ = true;
      return false;
    }
    RequestRecord* record = &records_.emplace_back();
    record->prompt_tokens = static_cast<int>(request->prompt.size());
    record->live = options_.live;
    if (cancels_(random_)) record->cancel_after_tokens = std::max(1, request->output_tokens / 2);
    const auto tokens = static_cast<int64_t>(request->prompt.size() + request->text.size());
    ready_.push_back(
        {client_.Prepare(*request, record, [this, record] { Ended(*record); }), record, request->at_ns, tokens});
    ahead_tokens_ += tokens;
    return true;
  }

  void Ended(const RequestRecord& record) {
    if (options_.live != nullptr) options_.live->Ended(record.ok());
    const int64_t now_ns = timer_.NowNs();
    std::lock_guard lock(mutex_);
    if (options_.concurrency) free_since_ns_.push(now_ns);
    --running_;
    if (options_.concurrency || running_ == 0) timer_.Wake();
  }

  bool Running() {
    std::lock_guard lock(mutex_);
    return running_ > 0;
  }

  // Blocks until the first of ready_ may be sent, and sets when that was meant to be. False: none will be.
  bool AwaitTurn() {
    if (ready_.empty() && !PrepareOne()) return false;
    for (;;) {
      const int64_t now_ns = timer_.NowNs();
      int64_t turn_ns = kNever;
      if (!options_.concurrency) {
        turn_ns = start_ns_ + ready_.front().at_ns;
      } else if (const auto free_ns = TakePlace(now_ns, turn_ns)) {
        if (*free_ns - start_ns_ >= stop_after_ns_) return false;
        ready_.front().record->intended_ns = *free_ns;
        return true;
      } else if (now_ns - start_ns_ >= stop_after_ns_) {
        return false;
      } else if (stop_after_ns_ != kNever) {
        turn_ns = std::min(turn_ns, start_ns_ + stop_after_ns_);
      }
      if (!options_.concurrency && turn_ns <= now_ns) {
        ready_.front().record->intended_ns = turn_ns;
        return true;
      }
      if (turn_ns - now_ns > kPrepareMarginNs && PrepareOne()) continue;
      timer_.WaitUntil(turn_ns);
    }
  }

  // When the place became free that is taken; none, and when the next one opens by the profile, if none is free.
  std::optional<int64_t> TakePlace(int64_t now_ns, int64_t& next_ns) {
    std::lock_guard lock(mutex_);
    for (;;) {
      const std::optional<double> rise_s =
          options_.concurrency->NextAtLeast(static_cast<double>(places_) + 0.5, profile_s_);
      const int64_t rise_ns = rise_s ? start_ns_ + std::llround(*rise_s * 1e9) : kNever;
      if (rise_ns > now_ns) {
        next_ns = rise_ns;
        break;
      }
      free_since_ns_.push(rise_ns);
      profile_s_ = *rise_s;
      ++places_;
    }
    const double now_s = static_cast<double>(now_ns - start_ns_) * 1e-9;
    // 1e-6: at a rise itself the profile may round down.
    const double target = std::floor(options_.concurrency->At(now_s) + 0.5 + 1e-6);
    for (; static_cast<double>(places_) > target && !free_since_ns_.empty(); --places_) {
      free_since_ns_.pop();
      profile_s_ = now_s;
    }
    if (free_since_ns_.empty()) return std::nullopt;
    const int64_t free_ns = free_since_ns_.top();
    free_since_ns_.pop();
    return free_ns;
  }

  LoadClient& client_;
  const RequestSource& source_;
  const LoadOptions& options_;
  LoadTimer& timer_;
  std::mt19937_64 random_;
  std::bernoulli_distribution cancels_;
  int64_t stop_after_ns_;
  int64_t start_ns_ = 0;
  std::deque<RequestRecord> records_;  // sent ones, then those of ready_
  std::deque<Ready> ready_;
  int64_t ahead_tokens_ = 0;
  bool exhausted_ = false;
  int64_t places_ = 0;    // free or taken
  double profile_s_ = 0;  // rises of the concurrency before that are done
  std::mutex mutex_;
  int64_t running_ = 0;
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> free_since_ns_;
};

}  // namespace

std::unique_ptr<LoadTimer> LoadTimer::Create() { return std::make_unique<RealTimer>(); }

std::vector<RequestRecord> RunLoad(LoadClient& client, const RequestSource& source, const LoadOptions& options,
                                   LoadTimer& timer) {
  return Driver(client, source, options, timer).Run();
}

}  // namespace soloist::cli
