// UTF-8 by the Unicode standard: maximal subparts of ill-formed sequences become U+FFFD, as in Python's
// errors="replace".
#ifndef SOLOIST_SERVER_TOKENIZER_UTF8_H_
#define SOLOIST_SERVER_TOKENIZER_UTF8_H_

#include <cstddef>
#include <string>
#include <string_view>

namespace soloist {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// What begins at text[0].
struct Utf8Step {
  enum Kind { kCharacter, kInvalid, kIncomplete } kind;
  size_t bytes;  // of the character, of the ill-formed part, or all of a beginning that more bytes could complete
};
Utf8Step NextUtf8(std::string_view text);

// text with every ill-formed part replaced.
std::string RepairUtf8(std::string_view text);

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_UTF8_H_
