// The messages of a chat request: checked, and brought into the form that a chat template expects.
#ifndef SOLOIST_SERVER_CHAT_MESSAGES_H_
#define SOLOIST_SERVER_CHAT_MESSAGES_H_

#include <cstddef>
#include <set>
#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace soloist {

// What a template makes of contents that are not a string.
struct ContentStyle {
  std::set<std::string> parts_of;  // roles whose lists of parts it takes apart itself
  bool null_is_empty = false;      // it fails on null, or prints it: it gets ""
};

// `messages` as the template gets them: lists of parts as one text (joined with newlines) where it does not take them
// apart, a tool call's arguments as the object that their text is. INVALID_ARGUMENT names message, field and what was
// expected: messages[2].content[0] ...
absl::StatusOr<nlohmann::ordered_json> PrepareMessages(const nlohmann::ordered_json& messages,
                                                       const ContentStyle& style, size_t max_messages);

// Null, or a list of objects.
absl::Status CheckObjects(const nlohmann::ordered_json& list, const char* name);

}  // namespace soloist

#endif  // SOLOIST_SERVER_CHAT_MESSAGES_H_
