// Sends planned requests on time and waits for all of them.
#ifndef SOLOIST_CLI_LOADTEST_DRIVER_H_
#define SOLOIST_CLI_LOADTEST_DRIVER_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "cli/loadtest/load_client.h"
#include "cli/loadtest/metrics.h"
#include "cli/loadtest/profile.h"
#include "cli/loadtest/workload.h"

namespace soloist::cli {

// The driver's clock, injectable.
class LoadTimer {
 public:
  virtual ~LoadTimer() = default;
  virtual int64_t NowNs() const = 0;
  // Returns at ns, or soon after Wake(), whichever is first; may return early. A Wake() before the call counts.
  virtual void WaitUntil(int64_t ns) = 0;
  // From any thread.
  virtual void Wake() = 0;
  // Real time.
  static std::unique_ptr<LoadTimer> Create();
};

struct LoadOptions {
  // None: open loop, each request at its time whatever the server does. Else that many requests (rounded) are kept in
  // flight, and a request is meant to be sent when a place becomes free: when another request has ended, or when the
  // profile rises.
  std::optional<Profile> concurrency;
  // Nothing is sent that is meant for this time (since the start) or later.
  int64_t stop_after_ns = std::numeric_limits<int64_t>::max();
  // Share of requests that hang up after half of their tokens.
  double cancel_share = 0;
  uint64_t seed = 0;
  LiveStats* live = nullptr;
};

// One record per request sent, in order. Blocks until the last has ended.
std::vector<RequestRecord> RunLoad(LoadClient& client, const RequestSource& source, const LoadOptions& options,
                                   LoadTimer& timer);

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_DRIVER_H_
