#include "server/http/openai_parts.h"

#include <utility>

#include "base/status.h"
#include "server/http/api_error.h"
#include "server/http/json_fields.h"

namespace soloist {
namespace {

absl::Status SetForm(std::string_view name, OutputForm form, std::optional<OutputForm>& out) {
  if (out.has_value()) {
    return FieldError(name, fmt::format("{}: the answer's form is already given by another field", name));
  }
  out = std::move(form);
  return absl::OkStatus();
}

absl::Status ReadTextForm(std::string_view name, const Json& value, OutputForm::Kind kind,
                          std::optional<OutputForm>& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_string()) return WrongType(name, value, "a string");
  return SetForm(name, {.kind = kind, .text = value.get<std::string>(), .choices = {}}, out);
}

absl::Status CheckContent(const Json& content, size_t message) {
  if (content.is_string() || content.is_null()) return absl::OkStatus();
  const std::string field = fmt::format("messages[{}].content", message);
  if (!content.is_array()) return WrongType(field, content, "a string or an array of parts");
  for (size_t i = 0; i < content.size(); ++i) {
    const Json& part = content[i];
    const std::string name = fmt::format("{}[{}]", field, i);
    if (!part.is_object()) return WrongType(name, part, "an object");
    const Json type = part.value("type", Json());
    if (type != "text") return WrongType(name + ".type", type, "text, which is all that this server reads");
    if (!part.contains("text") || !part.at("text").is_string()) return FieldError(name, name + " has no text");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RefuseField(std::string_view name, const Json& value) {
  const bool nothing =
      value.is_null() || value == false || ((value.is_structured() || value.is_string()) && value.empty());
  if (nothing) return absl::OkStatus();
  return FieldError(name, fmt::format("{} is not supported by this server: leave it out", name));
}

// ---- Forms of answers

absl::Status ReadSchema(std::string_view name, const Json& value, std::optional<OutputForm>& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_object() && !value.is_boolean() && !value.is_string()) return WrongType(name, value, "a JSON schema");
  return SetForm(name,
                 {.kind = OutputForm::Kind::kJsonSchema,
                  .text = value.is_string() ? value.get<std::string>() : value.dump(),
                  .choices = {}},
                 out);
}

absl::Status ReadRegex(std::string_view name, const Json& value, std::optional<OutputForm>& out) {
  return ReadTextForm(name, value, OutputForm::Kind::kRegex, out);
}
absl::Status ReadGrammar(std::string_view name, const Json& value, std::optional<OutputForm>& out) {
  return ReadTextForm(name, value, OutputForm::Kind::kGrammar, out);
}

absl::Status ReadChoice(std::string_view name, const Json& value, std::optional<OutputForm>& out) {
  if (value.is_null()) return absl::OkStatus();
  OutputForm form{.kind = OutputForm::Kind::kChoice, .text = {}, .choices = {}};
  RETURN_IF_ERROR(ReadField(name, value, form.choices));
  return SetForm(name, std::move(form), out);
}

absl::Status ReadJsonObjectForm(std::string_view name, const Json& value, std::optional<OutputForm>& out) {
  bool wanted = false;
  RETURN_IF_ERROR(ReadField(name, value, wanted));
  if (!wanted) return absl::OkStatus();
  return SetForm(name, {.kind = OutputForm::Kind::kJsonObject, .text = {}, .choices = {}}, out);
}

absl::Status ReadResponseFormat(std::string_view name, const Json& value, std::optional<OutputForm>& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_object()) return WrongType(name, value, "an object");
  const Json type = value.value("type", Json());
  if (type == "text") return absl::OkStatus();
  if (type == "json_object") return ReadJsonObjectForm(name, true, out);
  if (type != "json_schema") return WrongType("response_format.type", type, "text, json_object or json_schema");
  const Json schema = value.value("json_schema", Json());
  if (!schema.is_object() || !schema.contains("schema")) {
    return WrongType("response_format.json_schema", schema, "an object with a schema");
  }
  return ReadSchema("response_format.json_schema.schema", schema.at("schema"), out);
}

absl::Status ReadStructuredOutputs(std::string_view name, const Json& value, std::optional<OutputForm>& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_object()) return WrongType(name, value, "an object");
  for (const auto& [key, form] : value.get_ref<const Json::object_t&>()) {
    const std::string field = fmt::format("{}.{}", name, key);
    absl::Status status = key == "json"          ? ReadSchema(field, form, out)
                          : key == "regex"       ? ReadRegex(field, form, out)
                          : key == "choice"      ? ReadChoice(field, form, out)
                          : key == "grammar"     ? ReadGrammar(field, form, out)
                          : key == "json_object" ? ReadJsonObjectForm(field, form, out)
                                                 : RefuseField(field, form);
    RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

// ---- Chats

absl::Status ReadMessages(std::string_view name, const Json& value, Json& out) {
  if (!value.is_array() || value.empty()) return WrongType(name, value, "an array of at least one message");
  for (size_t i = 0; i < value.size(); ++i) {
    const Json& message = value[i];
    const std::string field = fmt::format("{}[{}]", name, i);
    if (!message.is_object()) return WrongType(field, message, "an object");
    const Json role = message.value("role", Json());
    if (!role.is_string() || role.get_ref<const std::string&>().empty()) {
      return WrongType(field + ".role", role, "a role's name");
    }
    for (const char* refused : {"tool_calls", "function_call"}) {
      if (message.contains(refused)) RETURN_IF_ERROR(RefuseField(field + "." + refused, message.at(refused)));
    }
    if (!message.contains("content")) return FieldError(field, field + " has no content");
    RETURN_IF_ERROR(CheckContent(message.at("content"), i));
  }
  out = value;
  return absl::OkStatus();
}

}  // namespace soloist
