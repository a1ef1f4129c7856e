// Fields of OpenAI's requests that have an inside: forms of answers, and messages. Errors as in json_fields.h.
#ifndef SOLOIST_SERVER_HTTP_OPENAI_PARTS_H_
#define SOLOIST_SERVER_HTTP_OPENAI_PARTS_H_

#include <optional>
#include <string_view>

#include "absl/status/status.h"
#include "server/grammar/output_form.h"
#include "server/http/json_text.h"

namespace soloist {

// For what would change the answer and cannot be done: an error, unless the value says nothing (null, false, empty).
absl::Status RefuseField(std::string_view name, const Json& value);

// Each sets `out`, unless the value is null or asks for plain text; an error if another field has set it.
// A schema as JSON, or as text that is JSON.
absl::Status ReadSchema(std::string_view name, const Json& value, std::optional<OutputForm>& out);
absl::Status ReadRegex(std::string_view name, const Json& value, std::optional<OutputForm>& out);
absl::Status ReadGrammar(std::string_view name, const Json& value, std::optional<OutputForm>& out);
absl::Status ReadChoice(std::string_view name, const Json& value, std::optional<OutputForm>& out);
// OpenAI's {"type": "json_schema", ...}.
absl::Status ReadResponseFormat(std::string_view name, const Json& value, std::optional<OutputForm>& out);
// vLLM's newer name for the guided_ fields: {"regex": ...}.
absl::Status ReadStructuredOutputs(std::string_view name, const Json& value, std::optional<OutputForm>& out);

// An array of at least one message, with a role and text each.
absl::Status ReadMessages(std::string_view name, const Json& value, Json& out);

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_OPENAI_PARTS_H_
