#include "server/http/api_error.h"

#include "absl/strings/cord.h"
#include "base/status.h"
#include "server/http/json_text.h"

namespace soloist {
namespace {

constexpr char kRetryAfterSeconds[] = "1";
// Payloads of a status.
constexpr char kParam[] = "soloist/param";
constexpr char kCode[] = "soloist/code";
constexpr size_t kShownBytes = 100;

std::string PayloadOf(const absl::Status& status, const char* name) {
  const auto payload = status.GetPayload(name);
  return payload.has_value() ? std::string(*payload) : std::string();
}

const char* TypeOf(int status) {
  if (status == 429) return "rate_limit_error";
  if (status == 503) return "service_unavailable";
  return status >= 500 ? "server_error" : "invalid_request_error";
}

void AppendOrNull(std::string& out, const std::string& text) {
  if (text.empty()) {
    out += "null";
  } else {
    AppendJsonString(out, text);
  }
}

}  // namespace

absl::Status FieldError(std::string_view field, const std::string& message) {
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kParam, absl::Cord(absl::string_view(field.data(), field.size())));
  return status;
}

absl::Status NoSuchModel(std::string_view asked, std::string_view served) {
  absl::Status status =
      NotFound("the model '{}' does not exist, this server has '{}'", asked.substr(0, kShownBytes), served);
  status.SetPayload(kParam, absl::Cord("model"));
  status.SetPayload(kCode, absl::Cord("model_not_found"));
  return status;
}

ApiError ToApiError(const absl::Status& status) {
  ApiError error{.status = 500,
                 .message = std::string(status.message()),
                 .param = PayloadOf(status, kParam),
                 .code = PayloadOf(status, kCode)};
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kFailedPrecondition:
      error.status = 400;
      break;
    case absl::StatusCode::kNotFound:
      error.status = 404;
      break;
    case absl::StatusCode::kAlreadyExists:
      error.status = 409;
      break;
    case absl::StatusCode::kResourceExhausted:
      error.status = 429;
      error.code = "rate_limit_exceeded";
      break;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kCancelled:
      error.status = 503;
      break;
    case absl::StatusCode::kDeadlineExceeded:
      error.status = 504;
      break;
    default:
      break;
  }
  return error;
}

std::string ErrorJson(const ApiError& error) {
  std::string out = R"({"error":{"message":)";
  AppendJsonString(out, error.message);
  out += R"(,"type":")";
  out += TypeOf(error.status);
  out += R"(","param":)";
  AppendOrNull(out, error.param);
  out += R"(,"code":)";
  AppendOrNull(out, error.code);
  out += "}}";
  return out;
}

HttpResponse ErrorResponse(const ApiError& error) {
  HttpResponse response{.status = error.status, .body = ErrorJson(error), .headers = {}};
  if (error.status == 429 || error.status == 503) response.headers.emplace_back("Retry-After", kRetryAfterSeconds);
  return response;
}

}  // namespace soloist
