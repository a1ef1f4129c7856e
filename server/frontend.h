// Frontend: START HERE for server/. What gRPC and HTTP share: one path from a GenerationRequest to an OutputStream, and
// what an operator asks. A protocol's service turns its messages into these types and back, and does nothing else.
#ifndef SOLOIST_SERVER_FRONTEND_H_
#define SOLOIST_SERVER_FRONTEND_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "engine/engine.h"
#include "scheduler/step_loop.h"
#include "server/generation.h"
#include "server/grammar/grammar_compiler.h"
#include "server/metrics/request_metrics.h"
#include "server/output_stream.h"
#include "server/tokenizer/tokenizer.h"
#include "server/work_queue.h"

namespace soloist {

// What can be told before the weights are loaded.
struct ModelDescription {
  std::string name;
  std::string architecture;
  std::vector<int32_t> eos_token_ids;
  SamplingDefaults defaults;
};

struct FrontendOptions {
  ServerLimits limits;
  // That turn tokens into text and messages; as many again tokenize large prompts and have output forms compiled, and
  // as many compute masks of allowed tokens.
  int num_threads = 2;
  bool log_requests = true;  // one line for each request that ends, see request_log.h
  // A rank whose step has been running for longer is not ok.
  absl::Duration stall_after = absl::Seconds(30);
};

enum class ServerState { kStarting, kReady, kDegraded, kDraining, kNotReady };

struct HealthReport {
  struct Check {
    std::string name;  // "engine", "admission", "rank/0", "rank/1", ...
    bool ok = true;
    std::string message;
    std::optional<int64_t> last_step_age_ns;  // ranks
    std::optional<int64_t> busy_ns;           // ranks
  };
  // kDegraded: a rank is not ok, or the engine recovers from the loss of one ("engine" says what was lost, since when,
  // and what is being done; "rank/R" the same of a rank). Requests are accepted, and wait.
  ServerState state = ServerState::kStarting;
  std::vector<Check> checks;
};

// Thread-safe.
class Frontend {
 public:
  Frontend(FrontendOptions options, ModelDescription model, std::unique_ptr<const Tokenizer> tokenizer,
           const Clock& clock);
  ~Frontend();

  // The model is loaded: requests are accepted from now on. Once. Both must outlive the front end's requests: call
  // Stop before they go.
  void Start(const Engine& engine, StepLoop& loop);
  // Loading has failed: Health says why.
  void Fail(const absl::Status& status);
  // Runs what is queued in the threads, joins them. No call may come after it but Health.
  void Stop();

  // What a call of Generate needs. All are called from the front end's or the step loop's threads.
  struct Callbacks {
    // Accepted: the stream is `stream`. `request_id` and `seed` are those drawn where the client gave none.
    std::function<void(std::shared_ptr<OutputStream> stream, uint64_t seed)> accepted;
    // Refused; nothing follows.
    std::function<void(const absl::Status&)> refused;
    // stream->Process should be called soon (use Post). Also before `accepted` has returned.
    std::function<void()> ready;
  };
  // Exactly one of accepted and refused is called, perhaps before Generate returns (small prompts), perhaps later.
  // Statuses: INVALID_ARGUMENT, ALREADY_EXISTS, RESOURCE_EXHAUSTED, UNAVAILABLE. The stream counts as open until
  // Closed(id) is called.
  void Generate(GenerationRequest request, const Callbacks& callbacks);
  // Frees the request's memory; its outputs end with kCancelled. Unknown ids are ignored.
  void Cancel(const std::string& request_id);
  // As Cancel; NOT_FOUND if no such request is open.
  absl::Status Abort(const std::string& request_id);
  // After the stream's last event has been sent or its connection is gone. Once for each accepted request; whoever
  // calls it is the stream's last consumer. Logs the request.
  void Closed(const std::string& request_id);

  // Runs `job` on one of the threads that serve streams.
  void Post(std::function<void()> job) { stream_threads_->Post(std::move(job)); }
  // Runs `job` where large texts are tokenized; RESOURCE_EXHAUSTED if too many wait.
  absl::Status PostLarge(std::function<void()> job);

  const RequestMetrics& request_metrics() const { return metrics_; }
  HealthReport Health() const;
  // Refuses new requests from now on.
  void Drain();
  int32_t open_streams() const;
  // Zeros until Start.
  GrammarStats grammar_stats() const;

  // Null until Start.
  const Engine* engine() const { return engine_.load(); }
  StepLoop* loop() const { return loop_.load(); }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const ModelDescription& model() const { return model_; }
  const ServerLimits& limits() const { return options_.limits; }
  const Clock& clock() const { return clock_; }
  // Wall time of a Clock::NowNs; 0 stays 0.
  int64_t UnixNs(int64_t now_ns) const { return now_ns == 0 ? 0 : now_ns + unix_offset_ns_; }
  int64_t start_unix_ns() const { return start_unix_ns_; }

 private:
  // Texts up to that size are tokenized on the calling thread: about 1 ms.
  static constexpr size_t kInlinePromptBytes = 8 << 10;

  absl::Status Accepting() const;
  HealthReport::Check EngineCheck(const EngineCondition& condition, const LoadSnapshot& load) const;
  // What a request has brought along until it is closed.
  struct Open {
    std::string trace_parent;
    std::shared_ptr<OutputStream> stream;  // null: being admitted
  };

  void Refuse(const absl::Status& status, const Callbacks& callbacks);
  absl::Status PostBounded(std::atomic<int32_t>& pending, int32_t limit, const char* what, std::function<void()> job);
  // Those that may take long.
  absl::Status TokenizeAndAdmit(GenerationRequest request, int64_t received_ns, const Callbacks& callbacks);
  absl::Status Admit(const GenerationRequest& request, std::vector<int32_t> prompt, int64_t received_ns,
                     const Callbacks& callbacks);
  absl::Status Reserve(const std::string& request_id, const std::string& trace_parent);

  const FrontendOptions options_;
  const ModelDescription model_;
  const std::unique_ptr<const Tokenizer> tokenizer_;
  const Clock& clock_;
  const int64_t unix_offset_ns_;
  const int64_t start_unix_ns_;
  std::atomic<const Engine*> engine_{nullptr};
  std::atomic<StepLoop*> loop_{nullptr};
  std::atomic<bool> draining_{false};
  RequestMetrics metrics_;
  std::atomic<int32_t> pending_large_{0}, pending_forms_{0};
  std::unique_ptr<GrammarCompiler> grammars_;  // set before loop_
  mutable std::mutex mutex_;
  absl::Status failure_;                        // mutex_
  std::unordered_map<std::string, Open> open_;  // mutex_; accepted requests, and those being admitted, by id
  std::unique_ptr<WorkQueue> prompt_threads_;
  std::unique_ptr<WorkQueue> stream_threads_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_FRONTEND_H_
