// One protocol's side of the load tester.
#ifndef SOLOIST_CLI_LOADTEST_LOAD_CLIENT_H_
#define SOLOIST_CLI_LOADTEST_LOAD_CLIENT_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "cli/loadtest/metrics.h"
#include "cli/loadtest/workload.h"

namespace soloist::cli {

// What a server says of itself; empty and 0: it does not say.
struct ServerDescription {
  std::string version, model, device;
  int vocab_size = 0, max_model_len = 0;
  int num_ranks = 0;
};

// A request with everything done that can be done before it is sent. May be dropped unsent.
class PreparedCall {
 public:
  virtual ~PreparedCall() = default;
  // Sends without waiting, once. The call keeps itself alive until its end. Sets the record's sent_ns.
  virtual void Send() = 0;
};

// Thread-safe.
class LoadClient {
 public:
  virtual ~LoadClient() = default;
  // The call fills *record as the answer comes (chunks, counts, outcome, end_ns, engine times), hangs up after
  // record->cancel_after_tokens, then calls `done` once, from any thread. *record outlives that.
  virtual std::shared_ptr<PreparedCall> Prepare(const PlannedRequest& request, RequestRecord* record,
                                                std::function<void()> done) = 0;
  // By the server's tokenizer, without added special tokens. Blocks.
  virtual absl::StatusOr<int> CountTokens(const std::string& text) = 0;
  virtual const ServerDescription& server() const = 0;
};

}  // namespace soloist::cli

#endif  // SOLOIST_CLI_LOADTEST_LOAD_CLIENT_H_
