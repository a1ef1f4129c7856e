// A BootstrapStore for ranks of one process.
#ifndef SOLOIST_TESTS_COMM_MEMORY_STORE_H_
#define SOLOIST_TESTS_COMM_MEMORY_STORE_H_

#include <condition_variable>
#include <map>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/comm/bootstrap.h"

namespace soloist {

class MemoryStore final : public BootstrapStore {
 public:
  absl::Status Set(const std::string& key, const std::string& value) override {
    const std::lock_guard lock(mutex_);
    if (!closed_.ok()) return closed_;
    const auto [it, inserted] = values_.emplace(key, value);
    if (!inserted && it->second != value) return absl::AlreadyExistsError(absl::StrCat(key, " has another value"));
    changed_.notify_all();
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override {
    std::unique_lock lock(mutex_);
    const auto there = [&] { return !closed_.ok() || values_.contains(key); };
    if (!changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), there)) {
      return absl::DeadlineExceededError(absl::StrCat("nobody has set ", key));
    }
    if (!closed_.ok()) return closed_;
    return values_.at(key);
  }

  void Close(const absl::Status& reason) {
    const std::lock_guard lock(mutex_);
    closed_ = reason;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
  absl::Status closed_;
};

}  // namespace soloist

#endif  // SOLOIST_TESTS_COMM_MEMORY_STORE_H_
