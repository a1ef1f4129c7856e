#include "server/grammar/grammar_checks.h"

#include <algorithm>
#include <vector>

#include "base/status.h"
#include "nlohmann/json.hpp"
#include "server/grammar/output_form.h"

namespace soloist {
namespace {

constexpr int64_t kMost = int64_t{1} << 62;

int64_t Times(int64_t a, int64_t b) { return b != 0 && a > kMost / b ? kMost : a * b; }

// The larger bound of "{m}", "{m,}" or "{m,n}" at the text's beginning, and its size; 0 bytes: it is none.
struct Quantifier {
  int64_t bound = 0;
  size_t bytes = 0;
};
Quantifier ParseQuantifier(std::string_view text) {
  Quantifier quantifier;
  int64_t number = 0;
  bool digits = false;
  for (size_t i = 1; i < text.size(); ++i) {
    const char c = text[i];
    if (c >= '0' && c <= '9') {
      number = std::min(Times(number, 10) + (c - '0'), kMost);
      digits = true;
    } else if (c == ',' || c == '}') {
      quantifier.bound = std::max(quantifier.bound, number);
      number = 0;
      if (c == '}' && digits) {
        quantifier.bytes = i + 1;
        return quantifier;
      }
    } else if (c != ' ') {
      break;
    }
  }
  return {};
}

absl::Status CheckChoices(const OutputForm& form, const OutputFormLimits& limits) {
  if (form.choices.empty()) return InvalidArgument("choice: there is none");
  if (std::ssize(form.choices) > limits.max_choices) {
    return InvalidArgument("choice: {} choices, the limit is {}", form.choices.size(), limits.max_choices);
  }
  int64_t bytes = 0;
  for (size_t i = 0; i < form.choices.size(); ++i) {
    if (form.choices[i].empty()) return InvalidArgument("choice: number {} is empty", i);
    bytes += std::ssize(form.choices[i]);
  }
  if (bytes <= limits.max_bytes) return absl::OkStatus();
  return InvalidArgument("choice: {} bytes together, the limit is {}", bytes, limits.max_bytes);
}

using Json = nlohmann::json;

// Where one of these stands, xgrammar looks at it alone, except for `type` beside the last four.
constexpr const char* kWhole[] = {"$ref", "const", "enum", "anyOf", "oneOf", "allOf"};
// Of what it would miss then.
constexpr const char* kAssertions[] = {"properties",
                                       "required",
                                       "additionalProperties",
                                       "items",
                                       "prefixItems",
                                       "minItems",
                                       "maxItems",
                                       "minLength",
                                       "maxLength",
                                       "pattern",
                                       "minimum",
                                       "maximum",
                                       "exclusiveMinimum",
                                       "exclusiveMaximum",
                                       "multipleOf",
                                       "minProperties",
                                       "maxProperties",
                                       "patternProperties",
                                       "propertyNames"};
constexpr const char* kUnsupported[] = {
    "not",          "if",       "then",        "else",        "dependentRequired", "dependentSchemas",
    "dependencies", "contains", "minContains", "maxContains", "$dynamicRef",       "$recursiveRef"};

absl::Status CheckKeywords(const Json& schema, const std::string& path);

absl::Status CheckEach(const Json& schemas, const std::string& path) {
  for (const auto& [key, value] : schemas.items())
    RETURN_IF_ERROR(CheckKeywords(value, fmt::format("{}/{}", path, key)));
  return absl::OkStatus();
}

absl::Status CheckKeywords(const Json& schema, const std::string& path) {
  if (!schema.is_object()) return absl::OkStatus();
  const auto refused = [&path](std::string_view keyword) {
    return InvalidArgument("json_schema: the keyword '{}' at '{}' is not supported", keyword, path);
  };
  for (const char* keyword : kUnsupported) {
    if (schema.contains(keyword)) return refused(keyword);
  }
  if (schema.value("uniqueItems", Json(false)) != Json(false)) return refused("uniqueItems");
  for (const char* whole : kWhole) {
    if (!schema.contains(whole)) continue;
    for (const char* other : kAssertions) {
      if (schema.contains(other)) {
        return InvalidArgument("json_schema: the keyword '{}' beside '{}' at '{}' is not supported", other, whole,
                               path);
      }
    }
    for (const char* other : kWhole) {
      if (other != whole && schema.contains(other)) {
        return InvalidArgument("json_schema: the keyword '{}' beside '{}' at '{}' is not supported", other, whole,
                               path);
      }
    }
  }
  for (const char* keyword :
       {"properties", "patternProperties", "$defs", "definitions", "anyOf", "oneOf", "allOf", "prefixItems"}) {
    if (schema.contains(keyword) && schema[keyword].is_structured()) {
      RETURN_IF_ERROR(CheckEach(schema[keyword], path + "/" + keyword));
    }
  }
  for (const char* keyword : {"additionalProperties", "items", "propertyNames", "unevaluatedProperties",
                              "unevaluatedItems", "additionalItems"}) {
    if (schema.contains(keyword)) RETURN_IF_ERROR(CheckKeywords(schema[keyword], path + "/" + keyword));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckSchemaKeywords(const std::string& schema) {
  return CheckKeywords(Json::parse(schema, nullptr, /*allow_exceptions=*/false), "#");
}

const char* OutputFormName(OutputForm::Kind kind) {
  switch (kind) {
    case OutputForm::Kind::kNone:
      return "none";
    case OutputForm::Kind::kJsonObject:
      return "json_object";
    case OutputForm::Kind::kJsonSchema:
      return "json_schema";
    case OutputForm::Kind::kRegex:
      return "regex";
    case OutputForm::Kind::kChoice:
      return "choice";
    case OutputForm::Kind::kGrammar:
      break;
  }
  return "grammar";
}

absl::Status CheckOutputForm(const OutputForm& form, const OutputFormLimits& limits) {
  if (form.kind == OutputForm::Kind::kNone) return InvalidArgument("the response format names none");
  if (form.kind == OutputForm::Kind::kJsonObject) return absl::OkStatus();
  if (form.kind == OutputForm::Kind::kChoice) return CheckChoices(form, limits);
  const char* name = OutputFormName(form.kind);
  if (form.text.empty()) return InvalidArgument("{}: it is empty", name);
  if (std::ssize(form.text) > limits.max_bytes) {
    return InvalidArgument("{}: {} bytes, the limit is {}", name, form.text.size(), limits.max_bytes);
  }
  if (form.text.find('\0') != std::string::npos) return InvalidArgument("{}: it has a zero byte", name);
  if (const int64_t depth = BracketDepth(form.text); depth > limits.max_depth) {
    return InvalidArgument("{}: brackets are {} deep, the limit is {}", name, depth, limits.max_depth);
  }
  if (const int64_t items = RepeatedItems(form.text); items > limits.max_repetitions + std::ssize(form.text)) {
    return InvalidArgument("{}: its repetitions {{m,n}} written out are {} items, the limit is {}", name, items,
                           limits.max_repetitions + std::ssize(form.text));
  }
  return absl::OkStatus();
}

int64_t BracketDepth(std::string_view text) {
  int64_t depth = 0, most = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\\') ++i;
    if (c == '(' || c == '[' || c == '{') most = std::max(most, ++depth);
    if ((c == ')' || c == ']' || c == '}') && depth > 0) --depth;
  }
  return most;
}

int64_t RepeatedItems(std::string_view text) {
  struct Group {
    int64_t items = 0, last = 0;  // without the last one; the last one's
  };
  std::vector<Group> open(1);
  const auto add = [&open](int64_t items) {
    Group& group = open.back();
    group.items = std::min(kMost, group.items + group.last);
    group.last = items;
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '(') {
      open.emplace_back();
    } else if (c == ')' && open.size() > 1) {
      const int64_t items = open.back().items + open.back().last;
      open.pop_back();
      add(std::min(kMost, std::max<int64_t>(items, 1)));
    } else if (const Quantifier quantifier = c == '{' ? ParseQuantifier(text.substr(i)) : Quantifier();
               quantifier.bytes > 0) {
      open.back().last = Times(std::max<int64_t>(open.back().last, 1), std::max<int64_t>(quantifier.bound, 1));
      i += quantifier.bytes - 1;
    } else {
      if (c == '\\') ++i;
      add(1);
    }
  }
  int64_t all = 0;
  for (const Group& group : open) all = std::min(kMost, all + group.items + group.last);
  return all;
}

std::string ChoiceGrammar(std::span<const std::string> choices) {
  std::string grammar = "root ::= ";
  for (size_t i = 0; i < choices.size(); ++i) {
    grammar += i == 0 ? "\"" : " | \"";
    for (const char c : choices[i]) {
      if (c == '"' || c == '\\') {
        grammar += '\\';
        grammar += c;
      } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
        grammar += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
      } else {
        grammar += c;
      }
    }
    grammar += '"';
  }
  return grammar;
}

}  // namespace soloist
