#include "server/tokenizer/normalizer.h"

#include <cstdlib>
#include <utility>

#include "server/tokenizer/utf8.h"
#include "utf8proc.h"

namespace soloist {
namespace {

std::string Unicode(const std::string& text, int options) {
  utf8proc_uint8_t* out = nullptr;
  const auto size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &out, static_cast<utf8proc_option_t>(options));
  if (size < 0) return text;
  std::string result(reinterpret_cast<char*>(out), size);
  std::free(out);
  return result;
}

}  // namespace

std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  for (size_t at; (at = text.find(from)) != std::string_view::npos; text.remove_prefix(at + from.size())) {
    out.append(text.substr(0, at));
    out += to;
  }
  return out.append(text);
}

absl::Status Normalizer::Add(const Json& component) {
  const std::string type = TypeOf(component);
  if (type == "Sequence") {
    for (const Json& part : List(component, "normalizers")) RETURN_IF_ERROR(Add(part));
    return absl::OkStatus();
  }
  Step step{.kind = Step::kUnicode};
  if (type == "NFC") {
    step.unicode_options = UTF8PROC_STABLE | UTF8PROC_COMPOSE;
  } else if (type == "NFD") {
    step.unicode_options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE;
  } else if (type == "NFKC") {
    step.unicode_options = UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT;
  } else if (type == "NFKD") {
    step.unicode_options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT;
  } else if (type == "Prepend") {
    step.kind = Step::kPrepend;
    step.to = Text(component, "prepend");
  } else if (type == "Replace") {
    const Json& pattern = Member(component, "pattern");
    step.to = Text(component, "content");
    if (step.from = Text(pattern, "String"); !step.from.empty()) {
      step.kind = Step::kReplace;
    } else {
      const std::string regex = Text(pattern, "Regex");
      if (regex.empty()) return InvalidArgument("normalizer Replace: pattern has neither String nor Regex");
      ASSIGN_OR_RETURN(step.regex, Regex::Compile(regex));
      step.kind = Step::kReplaceRegex;
    }
  } else if (type == "Strip") {
    step.kind = Step::kStrip;
    step.left = Flag(component, "strip_left", true);
    step.right = Flag(component, "strip_right", true);
  } else {
    return InvalidArgument("normalizer '{}' is not supported", type);
  }
  steps_.push_back(std::move(step));
  return absl::OkStatus();
}

std::string Normalizer::Apply(std::string text) const {
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Step::kUnicode:
        text = Unicode(text, step.unicode_options);
        break;
      case Step::kPrepend:
        if (!text.empty()) text.insert(0, step.to);
        break;
      case Step::kReplace:
        text = ReplaceAll(text, step.from, step.to);
        break;
      case Step::kReplaceRegex: {
        std::string out;
        step.regex->Cover(text, [&](std::string_view piece, bool match) { out += match ? step.to : piece; });
        text = std::move(out);
        break;
      }
      case Step::kStrip: {
        std::string_view rest = text;
        if (step.left) rest.remove_prefix(LeadingSpace(rest));
        if (step.right) rest.remove_suffix(TrailingSpace(rest));
        text = std::string(rest);
        break;
      }
    }
  }
  return text;
}

}  // namespace soloist
