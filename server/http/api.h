// HttpApi: what the HTTP port answers: OpenAI's API, vLLM's additions, and what an operator asks.
#ifndef SOLOIST_SERVER_HTTP_API_H_
#define SOLOIST_SERVER_HTTP_API_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "server/frontend.h"
#include "server/http/exchange.h"
#include "server/http/generate_call.h"
#include "server/http/openai_request.h"

namespace soloist {

struct HttpApiOptions {
  bool metrics_per_layer = false;
  // Whose pages may call from a browser (CORS), such as "https://example.com"; "*": anybody's.
  std::vector<std::string> allowed_origins;
  RenderChat render_chat;  // null: the model has no chat template
  GenerateCallOptions generate;
};

// Thread-safe.
class HttpApi {
 public:
  struct Route {
    std::string_view method;  // GET (and HEAD) or POST
    std::string_view path;    // one that ends with '/' is of all that begins so, but for "/"
    void (HttpApi::*answer)(const std::shared_ptr<HttpExchange>& exchange);
  };
  static std::span<const Route> Routes();

  // `frontend` must outlive it and its exchanges.
  HttpApi(Frontend& frontend, HttpApiOptions options);

  // In the exchange's strand.
  void Handle(const std::shared_ptr<HttpExchange>& exchange);

 private:
  void Page(const std::shared_ptr<HttpExchange>& exchange);
  void Description(const std::shared_ptr<HttpExchange>& exchange);
  void Models(const std::shared_ptr<HttpExchange>& exchange);
  void Model(const std::shared_ptr<HttpExchange>& exchange);
  void Completions(const std::shared_ptr<HttpExchange>& exchange);
  void ChatCompletions(const std::shared_ptr<HttpExchange>& exchange);
  void Tokenize(const std::shared_ptr<HttpExchange>& exchange);
  void Detokenize(const std::shared_ptr<HttpExchange>& exchange);
  void Health(const std::shared_ptr<HttpExchange>& exchange);
  void Load(const std::shared_ptr<HttpExchange>& exchange);
  void Metrics(const std::shared_ptr<HttpExchange>& exchange);
  void Version(const std::shared_ptr<HttpExchange>& exchange);

  // Runs `work` with the parsed body, on this thread or, if the body is larger than `inline_bytes`, where large texts
  // are tokenized; what it returns is run in the strand.
  using Answer = std::function<void(const std::shared_ptr<HttpExchange>& exchange)>;
  void WithBody(const std::shared_ptr<HttpExchange>& exchange, size_t inline_bytes,
                std::function<absl::StatusOr<Answer>(const Json& body)> work);
  void Generate(const std::shared_ptr<HttpExchange>& exchange, size_t inline_bytes,
                absl::StatusOr<OpenAiRequest> (*read)(const Json&, const OpenAiContext&));
  absl::StatusOr<Answer> TokenizeBody(const Json& body) const;
  absl::StatusOr<Answer> DetokenizeBody(const Json& body) const;
  bool AllowOrigin(HttpExchange& exchange) const;
  void LogUnknown(const std::vector<std::string>& fields);
  std::string ModelJson() const;

  Frontend& frontend_;
  const HttpApiOptions options_;
  const OpenAiContext context_;
  std::mutex mutex_;
  std::set<std::string> logged_fields_;  // mutex_
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_API_H_
