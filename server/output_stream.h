// OutputStream: where one request's tokens become text, between the step loop and a connection.
//
//   step loop --OnToken/OnFinish--> [inbox] --Process--> text, stop strings --Next--> Delta | OutputEnd | RequestEnd
//
// Log-probabilities of the prompt go the same way, as they come; those that are there come before all else.
//
// The step loop only appends to the inbox; decoding and stop strings run on the consumer's thread. What the consumer
// does not take coalesces into one Delta per output and is bounded: past the limit the outputs end with
// RESOURCE_EXHAUSTED and their KV blocks are free.
#ifndef SOLOIST_SERVER_OUTPUT_STREAM_H_
#define SOLOIST_SERVER_OUTPUT_STREAM_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"
#include "scheduler/request.h"
#include "server/metrics/request_metrics.h"
#include "server/stop_strings.h"
#include "server/tokenizer/tokenizer.h"

namespace soloist {

struct OutputStreamOptions {
  std::string request_id;
  int32_t prompt_tokens = 0;
  int32_t first_prompt_token = 0;  // the one that PromptLogprobs does not name
  int32_t num_outputs = 1;
  bool skip_special_tokens = true;
  std::vector<std::string> stop_strings;
  bool include_stop = false;
  // Tokens that end an output; their text is left out unless include_stop.
  std::unordered_set<int32_t> stop_tokens;
  int64_t received_ns = 0;            // Clock::NowNs when the server had the request
  RequestMetrics* metrics = nullptr;  // counts here, if not null; must outlive the stream
  // What may wait to be taken, all outputs together.
  int64_t max_buffered_tokens = 16384;
  int64_t max_buffered_bytes = 4 << 20;
  // A Delta or a PromptLogprobs is cut at the token that passes it.
  int64_t max_delta_bytes = 256 << 10;
};

// Text and tokens of one output since its last Delta.
struct Delta {
  int32_t output_index = 0;
  std::string text;
  std::vector<TokenEvent> tokens;
};

// The end of one output; its last Delta came before.
struct OutputEnd {
  int32_t output_index = 0;
  FinishReason reason = FinishReason::kNone;
  std::optional<std::string> stop_string;
  std::optional<int32_t> stop_token;
  int32_t output_tokens = 0;
  absl::Status error;
  bool retryable = false;
  RequestTimes times;
};

// The end of the request; nothing follows.
struct RequestEnd {
  int32_t prompt_tokens = 0;
  int32_t cached_prompt_tokens = 0;
  int32_t output_tokens = 0;
  int32_t preemptions = 0;
  RequestTimes times;  // first and last over the outputs
};

using StreamEvent = std::variant<Delta, OutputEnd, RequestEnd, PromptLogprobs>;

// OnToken, OnPromptLogprobs and OnFinish: the step loop's thread. Process and Next: one thread at a time, the
// consumer's.
class OutputStream final : public TokenSink {
 public:
  // on_ready: called from the step loop's thread when the inbox stops being empty; must not block and must see to it
  // that Process runs. cancel_output: called from Process when a stop string ends an output.
  // `tokenizer` must outlive it.
  OutputStream(OutputStreamOptions options, const Tokenizer& tokenizer, const Clock& clock,
               std::function<void()> on_ready, std::function<void(int32_t output_index)> cancel_output);

  bool OnToken(TokenEvent event) override;
  // Counts by its bytes alone.
  bool OnPromptLogprobs(const PromptLogprobs& event) override;
  void OnFinish(const FinishEvent& event) override;

  // Turns what has arrived into text. Cheap when nothing has.
  void Process();
  // The next event, oldest output first by turns; nothing if there is none yet.
  std::optional<StreamEvent> Next();
  // The limits were passed: the reader is too slow. Any thread.
  bool overflowed() const { return overflowed_; }

  const OutputStreamOptions& options() const { return options_; }
  // Of what was processed; reason kNone: not yet ended. The consumer's thread.
  std::vector<OutputEnd> ends() const;
  const RequestEnd& totals() const { return end_; }

 private:
  struct Output {
    Output(const Tokenizer& tokenizer, const StopStrings& stops, const OutputStreamOptions& options)
        : decoder(tokenizer, options.skip_special_tokens), matcher(stops, options.include_stop) {}
    IncrementalDecoder decoder;
    StopMatcher matcher;
    Delta delta;
    OutputEnd end;
    bool stopped = false;   // a stop string was found: later tokens are dropped
    bool finished = false;  // OnFinish was processed
    bool end_taken = false;
    int32_t tokens = 0;
  };

  using Arrival = std::variant<TokenEvent, FinishEvent, PromptLogprobs>;

  void Count(const TokenEvent& event);
  void Arrive(Arrival arrival);
  void ProcessPrompt(const PromptLogprobs& all);
  void ProcessToken(TokenEvent event);
  void ProcessFinish(const FinishEvent& event);
  int64_t BytesOf(const TokenEvent& event) const;

  const OutputStreamOptions options_;
  const Tokenizer& tokenizer_;
  const Clock& clock_;
  const StopStrings stops_;
  const std::function<void()> on_ready_;
  const std::function<void(int32_t)> cancel_output_;
  std::atomic<int64_t> buffered_tokens_{0};
  std::atomic<int64_t> buffered_bytes_{0};
  std::atomic<bool> overflowed_{false};

  // The step loop's.
  struct Arrived {
    int32_t tokens = 0;
    int64_t last_ns = 0;
  };
  std::vector<Arrived> arrived_;  // [num_outputs]

  std::mutex mutex_;
  std::vector<Arrival> inbox_;  // mutex_

  // The consumer's.
  std::vector<Arrival> taken_;
  std::deque<PromptLogprobs> prompt_;
  std::vector<Output> outputs_;
  size_t turn_ = 0;
  int32_t ends_taken_ = 0;
  RequestEnd end_;
  bool end_taken_ = false;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_OUTPUT_STREAM_H_
