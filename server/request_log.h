// The one line that the log has of a request.
#ifndef SOLOIST_SERVER_REQUEST_LOG_H_
#define SOLOIST_SERVER_REQUEST_LOG_H_

#include <optional>
#include <string>
#include <string_view>

#include "server/output_stream.h"

namespace soloist {

// Of a W3C traceparent header, https://www.w3.org/TR/trace-context/ section 3.2.
struct TraceParent {
  std::string_view trace_id;   // 32 hexadecimal digits
  std::string_view parent_id;  // 16
  bool sampled = false;
};
// Parts of `header`; nothing if it is not well formed.
std::optional<TraceParent> ParseTraceParent(std::string_view header);

// A JSON object: request_id; trace_id and parent_id where `trace_parent` has them; prompt_tokens,
// cached_prompt_tokens, output_tokens, preemptions; finish, one reason per output ("open": its client went away before
// it ended); queue_ms, ttft_ms, e2e_ms since the request was received, as far as it came; error, the first output's.
// From the stream's consumer thread.
std::string RequestLogLine(const OutputStream& stream, std::string_view trace_parent);

}  // namespace soloist

#endif  // SOLOIST_SERVER_REQUEST_LOG_H_
