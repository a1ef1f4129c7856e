#include "server/chat_messages.h"

#include <utility>

#include "base/status.h"

namespace soloist {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMaxRoleBytes = 64;

absl::Status CheckPart(const Json& part, const std::string& where) {
  if (!part.is_object()) return InvalidArgument("{} is {}, expected an object", where, part.type_name());
  const auto type = part.find("type");
  if (type == part.end() || !type->is_string()) return InvalidArgument("{}.type must be a string", where);
  if (*type != "text") {
    return InvalidArgument("{} has the type '{}': only 'text' is supported", where, type->get<std::string>());
  }
  const auto text = part.find("text");
  if (text == part.end() || !text->is_string()) return InvalidArgument("{}.text must be a string", where);
  return absl::OkStatus();
}

absl::Status PrepareContent(Json& message, const std::string& role, const std::string& where,
                            const ContentStyle& style) {
  const auto content = message.find("content");
  if (content == message.end() || content->is_null()) {
    if (role != "assistant") {
      return InvalidArgument("{}.content is missing: only an assistant's message may have none", where);
    }
    if (style.null_is_empty) message["content"] = "";
    return absl::OkStatus();
  }
  if (content->is_string()) return absl::OkStatus();
  if (!content->is_array()) {
    return InvalidArgument("{}.content is {}, expected a string or a list of parts", where, content->type_name());
  }
  std::string text;
  for (size_t i = 0; i < content->size(); ++i) {
    const Json& part = (*content)[i];
    RETURN_IF_ERROR(CheckPart(part, fmt::format("{}.content[{}]", where, i)));
    if (i > 0) text += '\n';
    text += part["text"].get_ref<const std::string&>();
  }
  if (!style.parts_of.contains(role)) *content = std::move(text);
  return absl::OkStatus();
}

absl::Status PrepareToolCalls(Json& message, const std::string& where) {
  const auto calls = message.find("tool_calls");
  if (calls == message.end() || calls->is_null()) return absl::OkStatus();
  if (!calls->is_array()) return InvalidArgument("{}.tool_calls is {}, expected a list", where, calls->type_name());
  for (size_t i = 0; i < calls->size(); ++i) {
    Json& call = (*calls)[i];
    const std::string here = fmt::format("{}.tool_calls[{}]", where, i);
    if (!call.is_object()) return InvalidArgument("{} is {}, expected an object", here, call.type_name());
    // As OpenAI has it, or the function itself.
    const auto nested = call.find("function");
    Json& function = nested == call.end() ? call : *nested;
    const auto name = function.is_object() ? function.find("name") : function.end();
    if (!function.is_object() || name == function.end() || !name->is_string()) {
      return InvalidArgument("{}.function.name must be a string", here);
    }
    const auto arguments = function.find("arguments");
    if (arguments == function.end() || arguments->is_object()) continue;
    Json parsed = Json::object();
    if (arguments->is_string() && !arguments->get_ref<const std::string&>().empty()) {
      parsed = Json::parse(arguments->get_ref<const std::string&>(), nullptr, /*allow_exceptions=*/false);
    }
    if (!parsed.is_object() || !(arguments->is_string() || arguments->is_null())) {
      return InvalidArgument("{}.function.arguments must be a JSON object, or its text", here);
    }
    *arguments = std::move(parsed);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Json> PrepareMessages(const Json& messages, const ContentStyle& style, size_t max_messages) {
  if (!messages.is_array()) return InvalidArgument("messages is {}, expected a list", messages.type_name());
  if (messages.empty()) return InvalidArgument("messages is empty");
  if (messages.size() > max_messages) {
    return InvalidArgument("messages has {} entries, limit {}", messages.size(), max_messages);
  }
  Json prepared = messages;
  for (size_t i = 0; i < prepared.size(); ++i) {
    Json& message = prepared[i];
    const std::string where = fmt::format("messages[{}]", i);
    if (!message.is_object()) return InvalidArgument("{} is {}, expected an object", where, message.type_name());
    const auto found = message.find("role");
    if (found == message.end() || !found->is_string()) return InvalidArgument("{}.role must be a string", where);
    const std::string role = *found;
    if (role.empty() || role.size() > kMaxRoleBytes) {
      return InvalidArgument("{}.role has {} bytes, allowed: 1 to {}", where, role.size(), kMaxRoleBytes);
    }
    RETURN_IF_ERROR(PrepareContent(message, role, where, style));
    RETURN_IF_ERROR(PrepareToolCalls(message, where));
  }
  return prepared;
}

absl::Status CheckObjects(const Json& list, const char* name) {
  if (list.is_null()) return absl::OkStatus();
  if (!list.is_array()) return InvalidArgument("{} is {}, expected a list of objects", name, list.type_name());
  for (size_t i = 0; i < list.size(); ++i) {
    if (!list[i].is_object()) return InvalidArgument("{}[{}] is {}, expected an object", name, i, list[i].type_name());
  }
  return absl::OkStatus();
}

}  // namespace soloist
