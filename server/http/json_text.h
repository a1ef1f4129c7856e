// JSON in and out with limits: requests become values that are safe to walk, and text is written without a tree.
#ifndef SOLOIST_SERVER_HTTP_JSON_TEXT_H_
#define SOLOIST_SERVER_HTTP_JSON_TEXT_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace soloist {

// Members in the order in which they came.
using Json = nlohmann::ordered_json;

inline constexpr int kMaxJsonDepth = 96;

// One JSON value (RFC 8259) and nothing behind it; time and memory linear in the text. INVALID_ARGUMENT: not
// well-formed, ill-formed UTF-8, a number beyond a double's range, a name twice in an object, deeper than
// kMaxJsonDepth.
absl::StatusOr<Json> ParseJson(std::string_view text);

// Appends `text` as a JSON string with its quotes. Ill-formed UTF-8 becomes U+FFFD.
void AppendJsonString(std::string& out, std::string_view text);
// Appends the shortest text that is the same float again; JSON has no infinities, so beyond +-9999 it is that.
void AppendJsonLogprob(std::string& out, float value);
void AppendJsonInt(std::string& out, int64_t value);

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_JSON_TEXT_H_
