// PreTokenizer: splits normalized text into the words that BPE works on.
#ifndef SOLOIST_SERVER_TOKENIZER_PRE_TOKENIZER_H_
#define SOLOIST_SERVER_TOKENIZER_PRE_TOKENIZER_H_

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "server/tokenizer/json_access.h"
#include "server/tokenizer/regex.h"

namespace soloist {

// ByteLevel, Split (all behaviours), Metaspace, Digits, Punctuation, Whitespace, WhitespaceSplit, CharDelimiterSplit,
// and sequences of them. Immutable once made; thread-safe.
class PreTokenizer {
 public:
  // Appends a component of tokenizer.json. INVALID_ARGUMENT names what is not supported.
  absl::Status Add(const Json& component);

  // Calls `word` for each word, in order, in the vocabulary's spelling. `at_start`: the text is the beginning of the
  // whole input.
  using Word = std::function<void(std::string_view)>;
  void Split(std::string_view text, bool at_start, const Word& word) const;

 private:
  // How matches of a pattern and what lies between them become words.
  enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum class Prepend { kAlways, kFirst, kNever };
  struct Step {
    enum Kind { kSplit, kByteLevel, kMetaspace } kind;
    std::optional<Regex> regex;  // kSplit; kByteLevel and kMetaspace: if they split
    Behavior behavior = Behavior::kIsolated;
    bool invert = false;
    Prepend prepend = Prepend::kNever;
    std::string replacement;  // kMetaspace: what stands for a space
  };
  static absl::StatusOr<Behavior> ParseBehavior(const std::string& name, const std::string& type);
  absl::Status AddSplit(const std::string& pattern, Behavior behavior, bool invert);
  void Run(size_t step, std::string_view text, bool at_start, const Word& word) const;
  static void Cut(const Step& step, std::string_view text, const Word& word);

  std::vector<Step> steps_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_PRE_TOKENIZER_H_
