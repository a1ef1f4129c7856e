// Normalizer: what a tokenizer.json does to text before it is split.
#ifndef SOLOIST_SERVER_TOKENIZER_NORMALIZER_H_
#define SOLOIST_SERVER_TOKENIZER_NORMALIZER_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "server/tokenizer/json_access.h"
#include "server/tokenizer/regex.h"

namespace soloist {

std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to);

// NFC, NFD, NFKC, NFKD, Prepend, Replace (String, Regex), Strip, and sequences of them.
class Normalizer {
 public:
  // Appends a component of tokenizer.json (a Sequence: its parts). INVALID_ARGUMENT names what is not supported.
  absl::Status Add(const Json& component);
  // Well-formed UTF-8 in and out.
  std::string Apply(std::string text) const;

 private:
  struct Step {
    enum Kind { kUnicode, kPrepend, kReplace, kReplaceRegex, kStrip } kind;
    int unicode_options = 0;  // utf8proc's
    std::string from, to;     // kReplace; kPrepend and kReplaceRegex: to
    std::optional<Regex> regex;
    bool left = false, right = false;  // kStrip
  };
  std::vector<Step> steps_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_NORMALIZER_H_
