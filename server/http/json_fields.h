// Fields of a JSON request with their types and ranges. null is as good as absent: the output stays as it was.
// Errors: INVALID_ARGUMENT that names field, value and what is allowed (FieldError).
#ifndef SOLOIST_SERVER_HTTP_JSON_FIELDS_H_
#define SOLOIST_SERVER_HTTP_JSON_FIELDS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "server/http/json_text.h"

namespace soloist {

// `value` for a message: its JSON, cut where it is long.
std::string Shown(const Json& value);
// "FIELD is VALUE, expected WHAT"
absl::Status WrongType(std::string_view field, const Json& value, std::string_view expected);

absl::Status ReadField(std::string_view field, const Json& value, bool& out);
absl::Status ReadField(std::string_view field, const Json& value, std::string& out);
absl::Status ReadField(std::string_view field, const Json& value, std::optional<std::string>& out);
// A number without a fraction, also written as 1.0.
absl::Status ReadField(std::string_view field, const Json& value, std::optional<int32_t>& out);
// As a 64-bit word: negative numbers too.
absl::Status ReadField(std::string_view field, const Json& value, std::optional<uint64_t>& out);
// Beyond a float's range: infinite.
absl::Status ReadField(std::string_view field, const Json& value, std::optional<float>& out);
absl::Status ReadField(std::string_view field, const Json& value, std::vector<int32_t>& out);
absl::Status ReadField(std::string_view field, const Json& value, std::vector<std::string>& out);

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_JSON_FIELDS_H_
