#include "cli/http_flags.h"

#include <utility>
#include <vector>

#include "base/logging.h"
#include "base/status.h"
#include "server/chat_template.h"
#include "server/http/api_error.h"

namespace soloist::cli {
namespace {

// Null where the model has no template, or one that is not understood. One that was asked for must be.
absl::StatusOr<RenderChat> LoadChatTemplate(const HttpFlags& flags, const std::string& model_dir,
                                            const Frontend& frontend) {
  auto loaded = ChatTemplate::Load(model_dir, flags.chat_template);
  if (absl::IsNotFound(loaded.status()) && flags.chat_template.empty()) {
    spdlog::info("the model has no chat template: /v1/chat/completions is refused");
    return RenderChat();
  }
  if (!loaded.ok() && flags.chat_template.empty()) {
    spdlog::warn("the model's chat template cannot be used, /v1/chat/completions is refused: {}",
                 loaded.status().message());
    return RenderChat();
  }
  RETURN_IF_ERROR(loaded.status());
  const std::shared_ptr<const ChatTemplate> chat = *std::move(loaded);
  const auto limit = static_cast<size_t>(frontend.limits().max_prompt_bytes);
  return [chat, limit, &frontend](const ChatInput& input) -> absl::StatusOr<std::vector<int32_t>> {
    ChatOptions options;
    options.add_generation_prompt = input.add_generation_prompt;
    options.continue_final_message = input.continue_final_message;
    options.documents = input.documents;
    options.template_kwargs = input.template_kwargs;
    ASSIGN_OR_RETURN(const std::vector<ChatPiece> pieces, chat->Render(input.messages, options));
    size_t bytes = 0;
    for (const ChatPiece& piece : pieces) bytes += piece.text.size();
    if (bytes > limit) {
      return FieldError("messages", fmt::format("bytes of the prompt: {}, the limit is {}", bytes, limit));
    }
    return EncodeChat(frontend.tokenizer(), pieces);
  };
}

}  // namespace

void HttpFlags::AddTo(CLI::App& app) {
  app.add_option("--http-address", address, "HOST:PORT of the OpenAI-compatible HTTP server; port 0: any free one")
      ->capture_default_str();
  app.add_option("--http-port", port, "the same by its port, at the host of --grpc-address")
      ->check(CLI::Range(0, 65535))
      ->excludes("--http-address");
  app.add_option("--http-threads", server.num_threads, "threads that serve HTTP connections")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app.add_option("--http-max-connections", server.max_connections, "HTTP connections open at a time; more are refused")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--http-header-timeout", header_timeout_s, "seconds for a request's header to come; its body: 6 times")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--http-heartbeat", heartbeat_s, "seconds without a token after which a stream gets a comment")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--http-allow-origin", api.allowed_origins,
                 "whose pages may call from a browser (CORS), such as https://example.com; *: anybody's");
  app.add_option("--chat-template", chat_template, "file with a Jinja template in place of the model's");
  app.add_flag("--metrics-per-layer", api.metrics_per_layer, "/metrics has the experts' series for each layer");
}

absl::StatusOr<HttpPort> OpenHttpPort(const HttpFlags& flags, const std::string& model_dir,
                                      const std::string& grpc_address, Frontend& frontend) {
  HttpPort http;
  if (!flags.enabled()) return http;
  HttpServerOptions options = flags.server;
  options.max_body_bytes = frontend.limits().max_message_bytes;
  options.header_timeout = absl::Seconds(flags.header_timeout_s);
  options.body_timeout = 6 * options.header_timeout;
  HttpApiOptions api = flags.api;
  api.generate.heartbeat = absl::Seconds(flags.heartbeat_s);
  ASSIGN_OR_RETURN(api.render_chat, LoadChatTemplate(flags, model_dir, frontend));
  http.api = std::make_unique<HttpApi>(frontend, std::move(api));
  const std::string address = !flags.port.has_value()
                                  ? flags.address
                                  : grpc_address.substr(0, grpc_address.rfind(':') + 1) + std::to_string(*flags.port);
  ASSIGN_OR_RETURN(
      http.server,
      HttpServer::Create(
          address, options, [api = http.api.get()](const std::shared_ptr<HttpExchange>& e) { api->Handle(e); },
          [](int status, const std::string& message) {
            return ErrorResponse({.status = status, .message = message, .param = {}, .code = {}});
          }));
  return http;
}

}  // namespace soloist::cli
