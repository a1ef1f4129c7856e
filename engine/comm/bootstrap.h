// BootstrapStore: how the ranks of a communicator find each other before they can talk: small values by key, set by one
// rank and read by others. In a cluster it is the leader's stream (no shared file system, no second port).
#ifndef SOLOIST_ENGINE_COMM_BOOTSTRAP_H_
#define SOLOIST_ENGINE_COMM_BOOTSTRAP_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace soloist {

// Thread-safe. Keys belong to one incarnation of one communicator: whoever makes a store for a new one starts empty.
class BootstrapStore {
 public:
  virtual ~BootstrapStore() = default;
  // At most 64 KiB. A key is set once; ALREADY_EXISTS for another value.
  virtual absl::Status Set(const std::string& key, const std::string& value) = 0;
  // Waits until some rank has set the key. DEADLINE_EXCEEDED names the key; CANCELLED or UNAVAILABLE if the store was
  // closed meanwhile.
  virtual absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) = 0;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_BOOTSTRAP_H_
