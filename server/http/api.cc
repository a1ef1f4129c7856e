#include "server/http/api.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <utility>

#include "base/logging.h"
#include "base/status.h"
#include "server/http/api_error.h"
#include "server/http/json_fields.h"
#include "server/http/openapi.h"
#include "server/load_report.h"
#include "server/metrics/exporter.h"
#include "server/page/page.h"
#include "server/version.h"

namespace soloist {
namespace {

// Bodies up to these sizes are read on the connection's thread: some milliseconds. A chat's text is tokenized as well.
constexpr size_t kInlineCompletionBytes = 256 << 10;
constexpr size_t kInlineTextBytes = 16 << 10;
constexpr size_t kMaxLoggedFields = 1000;
// The page asks this server and nobody else.
constexpr char kPagePolicy[] =
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'";
constexpr char kModelPath[] = "/v1/models/";

std::string PercentDecoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    unsigned char byte = 0;
    const char* const digits = text.data() + i + 1;
    if (text[i] == '%' && i + 2 < text.size() && std::from_chars(digits, digits + 2, byte, 16).ptr == digits + 2) {
      out += static_cast<char>(byte);
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

bool IsJson(std::string_view content_type) {
  std::string type(content_type.substr(0, content_type.find(';')));
  std::erase_if(type, [](char c) { return c == ' ' || c == '\t'; });
  std::ranges::transform(type, type.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return type == "application/json" || (type.starts_with("application/") && type.ends_with("+json"));
}

void RespondStatus(HttpExchange& exchange, const absl::Status& status) {
  ApiError error = ToApiError(status);
  if (error.status == 400 && error.param.empty()) error.param = FieldOf(error.message);
  exchange.Respond(ErrorResponse(error));
}

HttpResponse JsonResponse(std::string body) { return {.body = std::move(body), .headers = {}}; }

}  // namespace

std::span<const HttpApi::Route> HttpApi::Routes() {
  static constexpr Route kRoutes[] = {
      {"GET", "/", &HttpApi::Page},
      {"GET", "/openapi.json", &HttpApi::Description},
      {"GET", "/v1/models", &HttpApi::Models},
      {"GET", kModelPath, &HttpApi::Model},
      {"POST", "/v1/completions", &HttpApi::Completions},
      {"POST", "/v1/chat/completions", &HttpApi::ChatCompletions},
      {"POST", "/tokenize", &HttpApi::Tokenize},
      {"POST", "/detokenize", &HttpApi::Detokenize},
      {"GET", "/health", &HttpApi::Health},
      {"GET", "/load", &HttpApi::Load},
      {"GET", "/metrics", &HttpApi::Metrics},
      {"GET", "/version", &HttpApi::Version},
  };
  return kRoutes;
}

HttpApi::HttpApi(Frontend& frontend, HttpApiOptions options)
    : frontend_(frontend),
      options_(std::move(options)),
      context_{.model = frontend.model().name, .render = options_.render_chat} {}

void HttpApi::Handle(const std::shared_ptr<HttpExchange>& exchange) {
  const HttpRequest& request = exchange->request();
  if (!request.request_id.empty()) exchange->AddHeader("X-Request-Id", request.request_id);
  const bool cross_origin = AllowOrigin(*exchange);
  std::string allowed;
  for (const Route& route : Routes()) {
    const bool prefix = route.path.size() > 1 && route.path.ends_with('/');
    if (prefix ? request.path.size() <= route.path.size() || !request.path.starts_with(route.path)
               : request.path != route.path) {
      continue;
    }
    if (request.method == route.method || (request.method == "HEAD" && route.method == "GET")) {
      return (this->*route.answer)(exchange);
    }
    allowed = route.method == "GET" ? "GET, HEAD" : route.method;
  }
  if (allowed.empty()) {
    return exchange->Respond(
        ErrorResponse({.status = 404, .message = fmt::format("there is nothing at {}", request.path)}));
  }
  if (request.method == "OPTIONS" && request.preflight && cross_origin) {
    return exchange->Respond(
        {.status = 204,
         .content_type = {},
         .body = {},
         .headers = {{"Access-Control-Allow-Methods", allowed},
                     {"Access-Control-Allow-Headers", "authorization, content-type, traceparent, x-request-id"},
                     {"Access-Control-Max-Age", "600"}}});
  }
  HttpResponse response = ErrorResponse(
      {.status = 405, .message = fmt::format("{} is not for {}, which has {}", request.path, request.method, allowed)});
  response.headers.emplace_back("Allow", allowed);
  exchange->Respond(std::move(response));
}

bool HttpApi::AllowOrigin(HttpExchange& exchange) const {
  const std::string& origin = exchange.request().origin;
  if (options_.allowed_origins.empty()) return false;
  exchange.AddHeader("Vary", "Origin");
  const bool allowed = !origin.empty() && std::ranges::any_of(options_.allowed_origins, [&](const std::string& one) {
    return one == "*" || one == origin;
  });
  if (!allowed) return false;
  exchange.AddHeader("Access-Control-Allow-Origin", origin);
  exchange.AddHeader("Access-Control-Expose-Headers", "X-Request-Id, Retry-After");
  return true;
}

// ---- Models, state

void HttpApi::Page(const std::shared_ptr<HttpExchange>& exchange) {
  exchange->Respond({.content_type = "text/html; charset=utf-8",
                     .body = std::string(soloist::Page()),
                     .headers = {{"Content-Security-Policy", kPagePolicy}}});
}

void HttpApi::Description(const std::shared_ptr<HttpExchange>& exchange) {
  exchange->Respond(JsonResponse(std::string(OpenApiJson())));
}

std::string HttpApi::ModelJson() const {
  const Engine* engine = frontend_.engine();
  Json model{{"id", frontend_.model().name},
             {"object", "model"},
             {"created", frontend_.start_unix_ns() / 1'000'000'000},
             {"owned_by", "soloist"},
             {"root", frontend_.model().name},
             {"parent", nullptr}};
  model["max_model_len"] = engine == nullptr ? Json() : Json(engine->Info().limits.max_model_len);
  return model.dump(-1, ' ', false, Json::error_handler_t::replace);
}

void HttpApi::Models(const std::shared_ptr<HttpExchange>& exchange) {
  exchange->Respond(JsonResponse(R"({"object":"list","data":[)" + ModelJson() + "]}"));
}

void HttpApi::Model(const std::shared_ptr<HttpExchange>& exchange) {
  const std::string name = PercentDecoded(std::string_view(exchange->request().path).substr(sizeof(kModelPath) - 1));
  if (name != frontend_.model().name) return RespondStatus(*exchange, NoSuchModel(name, frontend_.model().name));
  exchange->Respond(JsonResponse(ModelJson()));
}

void HttpApi::Health(const std::shared_ptr<HttpExchange>& exchange) {
  const HealthReport report = frontend_.Health();
  const char* const state = ServerStateName(report.state);
  if (report.state == ServerState::kReady || report.state == ServerState::kDegraded) {
    return exchange->Respond(JsonResponse(fmt::format(R"({{"status":"{}"}})", state)));
  }
  std::string why = state;
  for (const HealthReport::Check& check : report.checks) {
    if (!check.ok) why += fmt::format("; {}: {}", check.name, check.message);
  }
  exchange->Respond(ErrorResponse({.status = 503, .message = why}));
}

void HttpApi::Load(const std::shared_ptr<HttpExchange>& exchange) {
  exchange->Respond(JsonResponse(LoadReport(frontend_)));
}

void HttpApi::Metrics(const std::shared_ptr<HttpExchange>& exchange) {
  exchange->Respond({.content_type = "text/plain; version=0.0.4; charset=utf-8",
                     .body = PrometheusText(frontend_, {.per_layer = options_.metrics_per_layer}),
                     .headers = {}});
}

void HttpApi::Version(const std::shared_ptr<HttpExchange>& exchange) {
  exchange->Respond(JsonResponse(fmt::format(R"({{"version":"{}"}})", kVersion)));
}

// ---- Requests with a body

void HttpApi::WithBody(const std::shared_ptr<HttpExchange>& exchange, size_t inline_bytes,
                       std::function<absl::StatusOr<Answer>(const Json&)> work) {
  const HttpRequest& request = exchange->request();
  if (!IsJson(request.content_type)) {
    return exchange->Respond(ErrorResponse(
        {.status = 415,
         .message = fmt::format("Content-Type is '{}', expected application/json", request.content_type)}));
  }
  const auto run = [work = std::move(work)](const std::string& text) -> absl::StatusOr<Answer> {
    ASSIGN_OR_RETURN(const Json body, ParseJson(text));
    if (!body.is_object()) return InvalidArgument("the body is {}, expected a JSON object", Shown(body));
    return work(body);
  };
  const auto finish = [](const std::shared_ptr<HttpExchange>& to, const absl::StatusOr<Answer>& answer) {
    if (!answer.ok()) return RespondStatus(*to, answer.status());
    (*answer)(to);
  };
  if (request.body.size() <= inline_bytes) return finish(exchange, run(request.body));
  const absl::Status posted = frontend_.PostLarge([exchange, run, finish, text = std::move(exchange->request().body)] {
    exchange->Post([exchange, finish, answer = run(text)] { finish(exchange, answer); });
  });
  if (!posted.ok()) RespondStatus(*exchange, posted);
}

void HttpApi::Generate(const std::shared_ptr<HttpExchange>& exchange, size_t inline_bytes,
                       absl::StatusOr<OpenAiRequest> (*read)(const Json&, const OpenAiContext&)) {
  WithBody(exchange, inline_bytes, [this, read](const Json& body) -> absl::StatusOr<Answer> {
    ASSIGN_OR_RETURN(OpenAiRequest request, read(body, context_));
    LogUnknown(request.unknown_fields);
    auto shared = std::make_shared<OpenAiRequest>(std::move(request));
    return [this, shared](const std::shared_ptr<HttpExchange>& to) {
      AnswerGeneration(frontend_, to, std::move(*shared), options_.generate);
    };
  });
}

void HttpApi::Completions(const std::shared_ptr<HttpExchange>& exchange) {
  Generate(exchange, kInlineCompletionBytes, ReadCompletion);
}

void HttpApi::ChatCompletions(const std::shared_ptr<HttpExchange>& exchange) {
  Generate(exchange, kInlineTextBytes, ReadChat);
}

void HttpApi::LogUnknown(const std::vector<std::string>& fields) {
  if (fields.empty()) return;
  const std::lock_guard lock(mutex_);
  for (const std::string& field : fields) {
    if (logged_fields_.size() >= kMaxLoggedFields || !logged_fields_.insert(field).second) continue;
    spdlog::info("HTTP: the field {} of requests is not known and does nothing", Shown(field));
  }
}

// ---- Tokens

absl::StatusOr<HttpApi::Answer> HttpApi::TokenizeBody(const Json& body) const {
  std::optional<std::string> model, text;
  bool add_special_tokens = true, strings = false;
  for (const auto& [name, value] : body.get_ref<const Json::object_t&>()) {
    if (name == "model") RETURN_IF_ERROR(ReadField(name, value, model));
    if (name == "prompt") RETURN_IF_ERROR(ReadField(name, value, text));
    if (name == "add_special_tokens") RETURN_IF_ERROR(ReadField(name, value, add_special_tokens));
    if (name == "return_token_strs") RETURN_IF_ERROR(ReadField(name, value, strings));
  }
  if (model.has_value() && *model != context_.model) return NoSuchModel(*model, context_.model);
  std::vector<int32_t> ids;
  if (text.has_value()) {
    const auto limit = static_cast<size_t>(frontend_.limits().max_prompt_bytes);
    if (text->size() > limit) {
      return FieldError("prompt", fmt::format("bytes of the prompt: {}, the limit is {}", text->size(), limit));
    }
    ids = frontend_.tokenizer().Encode(*text, {.add_special_tokens = add_special_tokens});
  } else if (body.contains("messages")) {
    ASSIGN_OR_RETURN(const ChatInput input, ReadChatInput(body));
    if (context_.render == nullptr) return FieldError("messages", "the model has no chat template");
    ASSIGN_OR_RETURN(ids, context_.render(input));
  } else {
    return FieldError("prompt", "prompt (or messages) is missing");
  }
  std::string out = R"({"count":)";
  AppendJsonInt(out, static_cast<int64_t>(ids.size()));
  const Engine* engine = frontend_.engine();
  out += R"(,"max_model_len":)";
  AppendJsonInt(out, engine == nullptr ? 0 : engine->Info().limits.max_model_len);
  out += R"(,"tokens":[)";
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += ',';
    AppendJsonInt(out, ids[i]);
  }
  out += R"(],"token_strs":)";
  out += strings ? "[" : "null";
  for (size_t i = 0; strings && i < ids.size(); ++i) {
    if (i > 0) out += ',';
    AppendJsonString(out, frontend_.tokenizer().TokenBytes(ids[i]));
  }
  out += strings ? "]}" : "}";
  return [out = std::move(out)](const std::shared_ptr<HttpExchange>& to) { to->Respond(JsonResponse(out)); };
}

void HttpApi::Tokenize(const std::shared_ptr<HttpExchange>& exchange) {
  WithBody(exchange, kInlineTextBytes, [this](const Json& body) { return TokenizeBody(body); });
}

absl::StatusOr<HttpApi::Answer> HttpApi::DetokenizeBody(const Json& body) const {
  std::optional<std::string> model;
  std::vector<int32_t> ids;
  bool given = false;
  for (const auto& [name, value] : body.get_ref<const Json::object_t&>()) {
    if (name == "model") RETURN_IF_ERROR(ReadField(name, value, model));
    if (name != "tokens") continue;
    RETURN_IF_ERROR(ReadField(name, value, ids));
    given = !value.is_null();
  }
  if (model.has_value() && *model != context_.model) return NoSuchModel(*model, context_.model);
  if (!given) return FieldError("tokens", "tokens is missing");
  const Tokenizer& tokenizer = frontend_.tokenizer();
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= tokenizer.vocab_size()) {
      return FieldError("tokens",
                        fmt::format("tokens[{}] is {}, allowed: 0 to {}", i, ids[i], tokenizer.vocab_size() - 1));
    }
  }
  std::string out = R"({"prompt":)";
  AppendJsonString(out, tokenizer.Decode(ids, false));
  out += "}";
  return [out = std::move(out)](const std::shared_ptr<HttpExchange>& to) { to->Respond(JsonResponse(out)); };
}

void HttpApi::Detokenize(const std::shared_ptr<HttpExchange>& exchange) {
  WithBody(exchange, kInlineCompletionBytes, [this](const Json& body) { return DetokenizeBody(body); });
}

}  // namespace soloist
