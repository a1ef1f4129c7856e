#include "engine/cluster/bootstrap_streams.h"

#include <utility>

#include "absl/time/clock.h"
#include "base/status.h"

namespace soloist {
namespace {

constexpr size_t kMaxValueBytes = 64 << 10;

}  // namespace

StreamBootstrapStore::StreamBootstrapStore(int64_t epoch, std::function<void(const worker::v1::WorkerMessage&)> send)
    : epoch_(epoch), send_(std::move(send)) {}

absl::Status StreamBootstrapStore::Set(const std::string& key, const std::string& value) {
  if (value.size() > kMaxValueBytes) {
    return InvalidArgument("bootstrap: value of '{}' has {} bytes, limit {}", key, value.size(), kMaxValueBytes);
  }
  {
    const std::lock_guard lock(mutex_);
    if (!closed_.ok()) return closed_;
    const auto [it, inserted] = values_.emplace(key, value);
    if (!inserted && it->second != value) return AlreadyExists("bootstrap: '{}' has another value already", key);
  }
  worker::v1::WorkerMessage message;
  message.mutable_bootstrap_set()->set_epoch(epoch_);
  message.mutable_bootstrap_set()->set_key(key);
  message.mutable_bootstrap_set()->set_value(value);
  send_(message);
  return absl::OkStatus();
}

absl::StatusOr<std::string> StreamBootstrapStore::Get(const std::string& key, absl::Duration timeout) {
  {
    const std::lock_guard lock(mutex_);
    if (!closed_.ok()) return closed_;
    if (const auto it = values_.find(key); it != values_.end()) return it->second;
  }
  worker::v1::WorkerMessage message;
  message.mutable_bootstrap_get()->set_epoch(epoch_);
  message.mutable_bootstrap_get()->set_key(key);
  send_(message);
  std::unique_lock lock(mutex_);
  const auto there = [&] { return !closed_.ok() || values_.contains(key); };
  if (!changed_.wait_for(lock, absl::ToChronoNanoseconds(timeout), there)) {
    return DeadlineExceeded("bootstrap: no rank has set '{}' within {}", key, absl::FormatDuration(timeout));
  }
  if (!closed_.ok()) return closed_;
  return values_.at(key);
}

void StreamBootstrapStore::OnValue(const worker::v1::BootstrapValue& value) {
  const std::lock_guard lock(mutex_);
  if (value.epoch() != epoch_) return;
  if (value.refused()) {
    // Set has returned long ago: two ranks disagree, and this group will not do.
    closed_.Update(AlreadyExists("bootstrap: '{}' has another value already", value.key()));
  } else {
    values_.emplace(value.key(), value.value());
  }
  changed_.notify_all();
}

void StreamBootstrapStore::Close(const absl::Status& reason) {
  const std::lock_guard lock(mutex_);
  closed_.Update(reason);
  changed_.notify_all();
}

}  // namespace soloist
