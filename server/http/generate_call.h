// One POST of /v1/completions or /v1/chat/completions, from the request as it was read to the last byte of its answer.
#ifndef SOLOIST_SERVER_HTTP_GENERATE_CALL_H_
#define SOLOIST_SERVER_HTTP_GENERATE_CALL_H_

#include <memory>

#include "absl/time/time.h"
#include "server/frontend.h"
#include "server/http/exchange.h"
#include "server/http/openai_request.h"

namespace soloist {

struct GenerateCallOptions {
  absl::Duration heartbeat = absl::Seconds(5);
  // Of an answer that is not streamed; more is refused, and the request cancelled.
  int64_t max_answer_bytes = 256 << 20;
};

// In the exchange's strand. `frontend` must outlive the exchange.
void AnswerGeneration(Frontend& frontend, std::shared_ptr<HttpExchange> exchange, OpenAiRequest request,
                      const GenerateCallOptions& options);

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_GENERATE_CALL_H_
