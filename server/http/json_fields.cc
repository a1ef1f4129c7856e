#include "server/http/json_fields.h"

#include <cmath>
#include <limits>

#include "base/status.h"
#include "server/http/api_error.h"
#include "server/tokenizer/utf8.h"

namespace soloist {
namespace {

constexpr size_t kShownBytes = 60;

bool ToInt32(const Json& value, int32_t& out) {
  constexpr double kLow = std::numeric_limits<int32_t>::min(), kHigh = std::numeric_limits<int32_t>::max();
  if (!value.is_number()) return false;
  const auto number = value.get<double>();
  if (!(number >= kLow && number <= kHigh) || number != std::floor(number)) return false;
  out = static_cast<int32_t>(number);
  return true;
}

constexpr char kInt32[] = "an integer of 32 bits";

}  // namespace

std::string Shown(const Json& value) {
  if (value.is_structured()) {
    return fmt::format("{} of {}", value.is_array() ? "an array" : "an object", value.size());
  }
  if (value.is_string() && value.get_ref<const std::string&>().size() > kShownBytes) {
    // A character that the cut splits is repaired.
    return fmt::format("\"{}...\"", RepairUtf8(value.get_ref<const std::string&>().substr(0, kShownBytes)));
  }
  return value.dump();
}

absl::Status WrongType(std::string_view field, const Json& value, std::string_view expected) {
  return FieldError(field, fmt::format("{} is {}, expected {}", field, Shown(value), expected));
}

absl::Status ReadField(std::string_view field, const Json& value, bool& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_boolean()) return WrongType(field, value, "true or false");
  out = value.get<bool>();
  return absl::OkStatus();
}

absl::Status ReadField(std::string_view field, const Json& value, std::string& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_string()) return WrongType(field, value, "a string");
  out = value.get_ref<const std::string&>();
  return absl::OkStatus();
}

absl::Status ReadField(std::string_view field, const Json& value, std::optional<std::string>& out) {
  if (value.is_null()) return absl::OkStatus();
  return ReadField(field, value, out.emplace());
}

absl::Status ReadField(std::string_view field, const Json& value, std::optional<int32_t>& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!ToInt32(value, out.emplace())) return WrongType(field, value, kInt32);
  return absl::OkStatus();
}

absl::Status ReadField(std::string_view field, const Json& value, std::optional<uint64_t>& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_number_integer()) return WrongType(field, value, "an integer of 64 bits");
  out = value.is_number_unsigned() ? value.get<uint64_t>() : static_cast<uint64_t>(value.get<int64_t>());
  return absl::OkStatus();
}

absl::Status ReadField(std::string_view field, const Json& value, std::optional<float>& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_number()) return WrongType(field, value, "a number");
  const auto number = value.get<double>();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const bool fits = std::abs(number) <= static_cast<double>(std::numeric_limits<float>::max());
  out = fits ? static_cast<float>(number) : number < 0 ? -kInfinity : kInfinity;
  return absl::OkStatus();
}

absl::Status ReadField(std::string_view field, const Json& value, std::vector<int32_t>& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_array()) return WrongType(field, value, "an array of integers");
  out.resize(value.size());
  for (size_t i = 0; i < out.size(); ++i) {
    if (!ToInt32(value[i], out[i])) {
      return FieldError(field, fmt::format("{}[{}] is {}, expected {}", field, i, Shown(value[i]), kInt32));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadField(std::string_view field, const Json& value, std::vector<std::string>& out) {
  if (value.is_null()) return absl::OkStatus();
  if (!value.is_array()) return WrongType(field, value, "an array of strings");
  out.resize(value.size());
  for (size_t i = 0; i < out.size(); ++i) {
    if (!value[i].is_string()) {
      return FieldError(field, fmt::format("{}[{}] is {}, expected a string", field, i, Shown(value[i])));
    }
    out[i] = value[i].get_ref<const std::string&>();
  }
  return absl::OkStatus();
}

}  // namespace soloist
