#include "server/http/json_text.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/status.h"
#include "server/tokenizer/utf8.h"

namespace soloist {
namespace {

constexpr float kLowestLogprob = -9999;
// Objects with more members look their names up in a set.
constexpr size_t kSmallObject = 16;
constexpr size_t kShownBytes = 40;

// Builds the value while it counts depth and names. Any false ends the parse.
class Builder final : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return Put(nullptr); }
  bool boolean(bool value) override { return Put(value); }
  bool number_integer(number_integer_t value) override { return Put(value); }
  bool number_unsigned(number_unsigned_t value) override { return Put(value); }
  bool number_float(number_float_t value, const string_t&) override { return Put(value); }
  bool string(string_t& value) override { return Put(std::move(value)); }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override { return Open(Json::object()); }
  bool start_array(size_t) override { return Open(Json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    Level& level = open_.back();
    auto& members = level.value->get_ref<Json::object_t&>();
    if (members.size() == kSmallObject) {
      for (const auto& member : members) level.names.insert(member.first);
    }
    const bool twice = members.size() < kSmallObject
                           ? std::ranges::any_of(
                                 members, [&](const auto& member) { return member.first == name; })
                           : !level.names.insert(name).second;
    if (twice) return Fail(fmt::format("the name '{}' comes twice in an object", name.substr(0, kShownBytes)));
    name_ = std::move(name);
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception& error) override {
    const std::string_view what = error.what();
    return Fail(error.id == 406 ? fmt::format("a number at byte {} is beyond a double's range", position)
                                : fmt::format("not well-formed at byte {}: {}", position,
                                              RepairUtf8(what.substr(0, what.find("; last read"))
                                                             .substr(std::min(what.size(), what.find("] ") + 2)))));
  }

  Json& value() { return root_; }
  const std::string& failure() const { return failure_; }

 private:
  struct Level {
    Json* value;
    std::unordered_set<std::string> names;  // of an object of more than kSmallObject members
  };

  bool Fail(std::string why) {
    failure_ = std::move(why);
    return false;
  }
  Json* Place(Json value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *open_.back().value;
    if (parent.is_array()) {
      auto& elements = parent.get_ref<Json::array_t&>();
      elements.push_back(std::move(value));
      return &elements.back();
    }
    // Not operator[], which looks through all members.
    auto& members = parent.get_ref<Json::object_t&>();
    members.push_back({std::move(name_), std::move(value)});
    return &members.back().second;
  }
  template <typename T>
  bool Put(T value) {
    Place(Json(std::move(value)));
    return true;
  }
  bool Open(Json value) {
    if (open_.size() == kMaxJsonDepth) return Fail(fmt::format("nested deeper than {} levels", kMaxJsonDepth));
    open_.push_back({.value = Place(std::move(value)), .names = {}});
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  Json root_;
  std::vector<Level> open_;
  std::string name_, failure_;
};

}  // namespace

absl::StatusOr<Json> ParseJson(std::string_view text) {
  if (text.empty()) return InvalidArgument("the JSON text is empty");
  Builder builder;
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) return InvalidArgument("JSON: {}", builder.failure());
  return std::move(builder.value());
}

void AppendJsonString(std::string& out, std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  out += '"';
  size_t plain = 0;  // what is copied as it is begins here
  for (size_t i = 0; i < text.size();) {
    const auto c = static_cast<unsigned char>(text[i]);
    if (c >= 0x80) {
      const Utf8Step step = NextUtf8(text.substr(i));
      if (step.kind != Utf8Step::kCharacter) {
        out.append(text, plain, i - plain).append(kReplacement);
        plain = i + step.bytes;
      }
      i += step.bytes;
      continue;
    }
    if (c >= 0x20 && c != '"' && c != '\\') {
      ++i;
      continue;
    }
    out.append(text, plain, i - plain);
    plain = ++i;
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\r':
        out += "\\r";
        break;
      default:
        out += "\\u00";
        out += kHex[c >> 4];
        out += kHex[c & 15];
    }
  }
  out.append(text, plain);
  out += '"';
}

void AppendJsonLogprob(std::string& out, float value) {
  if (!(value > kLowestLogprob)) value = kLowestLogprob;
  fmt::format_to(std::back_inserter(out), "{}", std::min(value, -kLowestLogprob));
}

void AppendJsonInt(std::string& out, int64_t value) {
  const fmt::format_int text(value);
  out.append(text.data(), text.size());
}

}  // namespace soloist
