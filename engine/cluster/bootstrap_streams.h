// The BootstrapStore of a cluster: values travel on the leader's streams. Keys belong to an epoch.
#ifndef SOLOIST_ENGINE_CLUSTER_BOOTSTRAP_STREAMS_H_
#define SOLOIST_ENGINE_CLUSTER_BOOTSTRAP_STREAMS_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "engine/comm/bootstrap.h"
#include "proto/worker.pb.h"

namespace soloist {

// A worker's end: asks the leader and waits for what comes back on the stream.
class StreamBootstrapStore final : public BootstrapStore {
 public:
  // `send` is called from the threads of the callers.
  StreamBootstrapStore(int64_t epoch, std::function<void(const worker::v1::WorkerMessage&)> send);

  absl::Status Set(const std::string& key, const std::string& value) override;
  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override;

  // From the stream. Values of other epochs are dropped.
  void OnValue(const worker::v1::BootstrapValue& value);
  // Everyone who waits gets `reason`, now and later.
  void Close(const absl::Status& reason);

 private:
  const int64_t epoch_;
  const std::function<void(const worker::v1::WorkerMessage&)> send_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
  absl::Status closed_;
};

// The leader's end: what was set, and who waits for what is not there yet. Not thread-safe.
template <typename Client>
class BootstrapTable {
 public:
  struct Answer {
    Client client;
    worker::v1::LeaderMessage message;
  };
  // Forgets everything: a new epoch.
  void Start(int64_t epoch) {
    epoch_ = epoch;
    entries_.clear();
  }
  // What must be sent for it. Requests of other epochs are dropped; a second value for a key is refused.
  std::vector<Answer> Set(const Client& client, const worker::v1::BootstrapSet& request) {
    if (request.epoch() != epoch_) return {};
    Entry& entry = entries_[request.key()];
    if (entry.set) {
      if (entry.value == request.value()) return {};
      return {Make(client, request.key(), entry.value, /*refused=*/true)};
    }
    entry.set = true;
    entry.value = request.value();
    std::vector<Answer> answers;
    for (const Client& waiting : entry.waiting) answers.push_back(Make(waiting, request.key(), entry.value, false));
    entry.waiting.clear();
    return answers;
  }
  std::vector<Answer> Get(const Client& client, const worker::v1::BootstrapGet& request) {
    if (request.epoch() != epoch_) return {};
    Entry& entry = entries_[request.key()];
    if (entry.set) return {Make(client, request.key(), entry.value, false)};
    entry.waiting.push_back(client);
    return {};
  }

 private:
  struct Entry {
    bool set = false;
    std::string value;
    std::vector<Client> waiting;
  };
  Answer Make(const Client& client, const std::string& key, const std::string& value, bool refused) const {
    Answer answer{client, {}};
    worker::v1::BootstrapValue& out = *answer.message.mutable_bootstrap_value();
    out.set_epoch(epoch_);
    out.set_key(key);
    out.set_value(value);
    out.set_refused(refused);
    return answer;
  }

  int64_t epoch_ = 0;
  std::map<std::string, Entry> entries_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_BOOTSTRAP_STREAMS_H_
