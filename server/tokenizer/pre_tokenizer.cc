#include "server/tokenizer/pre_tokenizer.h"

#include <algorithm>
#include <utility>

#include "server/tokenizer/byte_level.h"

namespace soloist {
namespace {

constexpr char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// ASCII's punctuation, and Unicode's.
constexpr char kPunctuation[] = R"([!-/:-@\[-`{-~\p{P}])";

}  // namespace

absl::StatusOr<PreTokenizer::Behavior> PreTokenizer::ParseBehavior(const std::string& name, const std::string& type) {
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  return InvalidArgument("pre_tokenizer {}: behavior '{}' is not supported", type, name);
}

absl::Status PreTokenizer::AddSplit(const std::string& pattern, Behavior behavior, bool invert) {
  ASSIGN_OR_RETURN(Regex regex, Regex::Compile(pattern));
  steps_.push_back({.kind = Step::kSplit, .regex = std::move(regex), .behavior = behavior, .invert = invert});
  return absl::OkStatus();
}

absl::Status PreTokenizer::Add(const Json& component) {
  const std::string type = TypeOf(component);
  if (type == "Sequence") {
    for (const Json& part : List(component, "pretokenizers")) RETURN_IF_ERROR(Add(part));
    return absl::OkStatus();
  }
  if (!steps_.empty() && steps_.back().kind == Step::kByteLevel) {
    return InvalidArgument("pre_tokenizer '{}' after ByteLevel is not supported", type);
  }
  if (type == "ByteLevel") {
    Step step{.kind = Step::kByteLevel};
    if (Flag(component, "add_prefix_space", true)) step.prepend = Prepend::kAlways;
    if (Flag(component, "use_regex", true)) {
      ASSIGN_OR_RETURN(step.regex, Regex::Compile(kGpt2Pattern));
    }
    steps_.push_back(std::move(step));
    return absl::OkStatus();
  }
  if (type == "Metaspace") {
    Step step{.kind = Step::kMetaspace, .behavior = Behavior::kMergedWithNext, .replacement = "▁"};
    if (IsSet(component, "replacement")) step.replacement = Text(component, "replacement");
    if (step.replacement.empty()) return InvalidArgument("pre_tokenizer Metaspace: replacement is empty");
    const std::string scheme = Text(component, "prepend_scheme");
    if (scheme.empty() ? Flag(component, "add_prefix_space", true) : scheme == "always") {
      step.prepend = Prepend::kAlways;
    } else if (scheme == "first") {
      step.prepend = Prepend::kFirst;
    } else if (!scheme.empty() && scheme != "never") {
      return InvalidArgument("pre_tokenizer Metaspace: prepend_scheme '{}' is not supported", scheme);
    }
    if (Flag(component, "split", true)) {
      ASSIGN_OR_RETURN(step.regex, Regex::Compile(Regex::Quote(step.replacement)));
    }
    steps_.push_back(std::move(step));
    return absl::OkStatus();
  }
  if (type == "Split") {
    const Json& pattern = Member(component, "pattern");
    std::string regex = Text(pattern, "Regex");
    if (regex.empty()) regex = Regex::Quote(Text(pattern, "String"));
    if (regex.empty()) return InvalidArgument("pre_tokenizer Split: pattern has neither String nor Regex");
    ASSIGN_OR_RETURN(const Behavior behavior, ParseBehavior(Text(component, "behavior"), type));
    return AddSplit(regex, behavior, Flag(component, "invert", false));
  }
  if (type == "Digits") {
    const bool each = Flag(component, "individual_digits", false);
    return AddSplit(R"(\p{N})", each ? Behavior::kIsolated : Behavior::kContiguous, false);
  }
  if (type == "Punctuation") {
    const std::string name = IsSet(component, "behavior") ? Text(component, "behavior") : "Isolated";
    ASSIGN_OR_RETURN(const Behavior behavior, ParseBehavior(name, type));
    return AddSplit(kPunctuation, behavior, false);
  }
  if (type == "Whitespace") return AddSplit(R"(\w+|[^\w\s]+)", Behavior::kRemoved, true);
  if (type == "WhitespaceSplit") return AddSplit(R"(\s)", Behavior::kRemoved, false);
  if (type == "CharDelimiterSplit") {
    const std::string delimiter = Text(component, "delimiter");
    if (delimiter.empty()) return InvalidArgument("pre_tokenizer CharDelimiterSplit: delimiter is empty");
    return AddSplit(Regex::Quote(delimiter), Behavior::kRemoved, false);
  }
  return InvalidArgument("pre_tokenizer '{}' is not supported", type);
}

void PreTokenizer::Split(std::string_view text, bool at_start, const Word& word) const { Run(0, text, at_start, word); }

void PreTokenizer::Run(size_t index, std::string_view text, bool at_start, const Word& word) const {
  if (text.empty()) return;
  if (index == steps_.size()) return word(text);
  const Step& step = steps_[index];
  const char* const begin = text.data();
  const Word next = [&](std::string_view piece) {
    if (step.kind == Step::kByteLevel) return Run(index + 1, ToByteLevel(piece), false, word);
    Run(index + 1, piece, at_start && piece.data() == begin, word);
  };
  if (step.kind == Step::kSplit) return Cut(step, text, next);

  std::string changed(text);
  const std::string_view space = step.kind == Step::kMetaspace ? std::string_view(step.replacement) : " ";
  if (step.kind == Step::kMetaspace && step.replacement != " ") {
    std::string out;
    for (const char c : changed) c == ' ' ? out += step.replacement : out += c;
    changed = std::move(out);
  }
  const bool prepend = step.prepend == Prepend::kAlways || (step.prepend == Prepend::kFirst && at_start);
  if (prepend && !changed.starts_with(space)) changed.insert(0, space);
  if (!step.regex.has_value()) return next(changed);
  Cut(step, changed, next);
}

void PreTokenizer::Cut(const Step& step, std::string_view text, const Word& word) {
  // What has not been passed on yet: it may grow by the next piece. A match never follows a match in the merging
  // behaviours: the second one stands alone, as in the tokenizers library.
  std::string_view held;
  bool held_match = false;
  const auto flush = [&] {
    if (!held.empty()) word(held);
    held = {};
  };
  step.regex->Cover(text, [&](std::string_view piece, bool found) {
    const bool match = found != step.invert;
    const bool grow = !held.empty() && [&] {
      switch (step.behavior) {
        case Behavior::kRemoved:
        case Behavior::kIsolated:
          return false;
        case Behavior::kMergedWithPrevious:
          return match && !held_match;
        case Behavior::kMergedWithNext:
          return held_match && !match;
        case Behavior::kContiguous:
          return match == held_match;
      }
      return false;
    }();
    if (!grow) flush();
    if (step.behavior == Behavior::kRemoved && match) return;
    held = grow ? std::string_view(held.data(), held.size() + piece.size()) : piece;
    held_match = match;
  });
  flush();
}

}  // namespace soloist
