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

// The code point of the character that well-formed `text` begins with.
char32_t FirstCodePoint(std::string_view text);
// Bytes of white space (Unicode's White_Space) at the beginning and at the end of well-formed text.
size_t LeadingSpace(std::string_view text);
size_t TrailingSpace(std::string_view text);
// Whether well-formed text begins or ends with a word character: a letter, mark, digit or connector.
bool BeginsWithWord(std::string_view text);
bool EndsWithWord(std::string_view text);

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_UTF8_H_
