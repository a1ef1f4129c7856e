// What an HTTP client is told when something is wrong: a status and OpenAI's error object.
#ifndef SOLOIST_SERVER_HTTP_API_ERROR_H_
#define SOLOIST_SERVER_HTTP_API_ERROR_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "server/http/exchange.h"

namespace soloist {

struct ApiError {
  int status = 400;  // HTTP
  std::string message;
  std::string param;  // the request's field; empty: none in particular
  std::string code;   // "model_not_found", ...; empty: none
};

// INVALID_ARGUMENT about a field of the request, which ToApiError names as `param`.
absl::Status FieldError(std::string_view field, const std::string& message);
// NOT_FOUND, with OpenAI's code "model_not_found".
absl::Status NoSuchModel(std::string_view asked, std::string_view served);

// The one table from absl's codes to HTTP's. `status` is not OK.
ApiError ToApiError(const absl::Status& status);

// {"error":{"message","type","param","code"}}
std::string ErrorJson(const ApiError& error);
// With Retry-After where trying again may help.
HttpResponse ErrorResponse(const ApiError& error);

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_API_ERROR_H_
