// JsonFields: reads typed, bounded fields of one JSON object; the first fault becomes the status.
#ifndef SOLOIST_ENGINE_MODEL_JSON_FIELDS_H_
#define SOLOIST_ENGINE_MODEL_JSON_FIELDS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/status.h"
#include "nlohmann/json.hpp"

namespace soloist {

// Parses an object. INVALID_ARGUMENT unless it is one, nested no deeper than 64 levels (nlohmann's parser is iterative,
// but what walks the tree is not).
inline absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, std::string_view source_name) {
  int depth = 0, deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  if (deepest > 64) return InvalidArgument("{}: JSON nested {} levels deep, limit 64", source_name, deepest);
  nlohmann::json parsed = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (parsed.is_discarded()) return InvalidArgument("{}: not valid JSON", source_name);
  if (!parsed.is_object())
    return InvalidArgument("{}: a JSON object is expected, found {}", source_name, parsed.type_name());
  return parsed;
}

class JsonFields {
 public:
  JsonFields(const nlohmann::json& object, std::string_view source_name) : object_(object), source_(source_name) {}

  // A value that is absent or null is `absent`; without one the field is required.
  int64_t Int(const char* name, int64_t min, int64_t max, std::optional<int64_t> absent = std::nullopt) {
    const nlohmann::json* value = Find(name);
    if (value == nullptr) return Absent(name, absent, min);
    const bool fits = value->is_number_unsigned() ? value->get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)
                                                  : value->is_number_integer();
    if (!fits || value->get<int64_t>() < min || value->get<int64_t>() > max) {
      Fail(InvalidArgument("{}: {} is {}, allowed: an integer from {} to {}", source_, name, Short(*value), min, max));
      return min;
    }
    return value->get<int64_t>();
  }
  // min < value <= max.
  double Number(const char* name, double min, double max, std::optional<double> absent = std::nullopt) {
    const nlohmann::json* value = Find(name);
    if (value == nullptr) return Absent(name, absent, max);
    if (!value->is_number() || !(value->get<double>() > min && value->get<double>() <= max)) {
      Fail(InvalidArgument("{}: {} is {}, allowed: a number in ({}, {}]", source_, name, Short(*value), min, max));
      return max;
    }
    return value->get<double>();
  }
  bool Bool(const char* name, bool absent) {
    const nlohmann::json* value = Find(name);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) {
      Fail(InvalidArgument("{}: {} is {}, allowed: true or false", source_, name, Short(*value)));
      return absent;
    }
    return value->get<bool>();
  }
  // One id or a list of ids in [0, limit).
  std::vector<int32_t> TokenIds(const char* name, int64_t limit) {
    std::vector<int32_t> ids;
    const nlohmann::json* value = Find(name);
    if (value == nullptr) return ids;
    const nlohmann::json list = value->is_array() ? *value : nlohmann::json::array({*value});
    for (const nlohmann::json& id : list) {
      if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= limit) {
        Fail(InvalidArgument("{}: {} holds {}, allowed: token ids from 0 to {}", source_, name, Short(id), limit - 1));
        return {};
      }
      ids.push_back(id.get<int32_t>());
    }
    return ids;
  }
  // A field that would change the result and that we do not have: only absent, null or `allowed` passes.
  void Refuse(const char* name, const nlohmann::json& allowed, const char* why) {
    const nlohmann::json* value = Find(name);
    if (value != nullptr && *value != allowed) {
      Fail(InvalidArgument("{}: {} is {}: {}", source_, name, Short(*value), why));
    }
  }

  const nlohmann::json* Find(const char* name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  const std::string& source() const { return source_; }
  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  const absl::Status& status() const { return status_; }

 private:
  template <typename T>
  T Absent(const char* name, const std::optional<T>& absent, T fallback) {
    if (!absent.has_value()) Fail(InvalidArgument("{}: {} is missing", source_, name));
    return absent.value_or(fallback);
  }
  static std::string Short(const nlohmann::json& value) {
    std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    return text.size() > 80 ? text.substr(0, 77) + "..." : text;
  }

  const nlohmann::json& object_;
  const std::string source_;
  absl::Status status_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_JSON_FIELDS_H_
