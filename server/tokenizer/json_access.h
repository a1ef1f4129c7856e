// Reading a tokenizer.json that may be anything: each accessor gives an empty value where the file has another type.
#ifndef SOLOIST_SERVER_TOKENIZER_JSON_ACCESS_H_
#define SOLOIST_SERVER_TOKENIZER_JSON_ACCESS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/status.h"
#include "nlohmann/json.hpp"

namespace soloist {

using Json = nlohmann::json;

// Ids stay small enough that tables indexed by them cannot be made huge by a file.
inline constexpr int64_t kMaxTokenId = (1 << 24) - 1;

// Null if `object` has no such member.
inline const Json& Member(const Json& object, const char* name) {
  static const Json null;
  const auto it = object.find(name);
  return object.is_object() && it != object.end() ? *it : null;
}
// Null counts as absent.
inline bool IsSet(const Json& object, const char* name) { return !Member(object, name).is_null(); }
inline bool Flag(const Json& object, const char* name, bool absent) {
  const Json& value = Member(object, name);
  return value.is_boolean() ? value.get<bool>() : absent;
}
inline std::string Text(const Json& object, const char* name) {
  const Json& value = Member(object, name);
  return value.is_string() ? value.get<std::string>() : "";
}
// An empty list if it is none.
inline const Json& List(const Json& object, const char* name) {
  static const Json empty = Json::array();
  const Json& value = Member(object, name);
  return value.is_array() ? value : empty;
}
inline std::string TypeOf(const Json& component) { return IsSet(component, "type") ? Text(component, "type") : "?"; }

// `what` says where the id stands.
inline absl::StatusOr<int32_t> ToTokenId(const Json& value, const std::string& what) {
  if (value.is_number_integer() && value.get<int64_t>() >= 0 && value.get<int64_t>() <= kMaxTokenId) {
    return value.get<int32_t>();
  }
  return InvalidArgument("{} is {}, allowed: 0 to {}", what, value.dump(-1, ' ', false, Json::error_handler_t::replace),
                         kMaxTokenId);
}

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_JSON_ACCESS_H_
