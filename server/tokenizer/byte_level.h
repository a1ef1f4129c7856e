// GPT-2's mapping of bytes to printable characters, in which byte-level vocabularies are spelt.
#ifndef SOLOIST_SERVER_TOKENIZER_BYTE_LEVEL_H_
#define SOLOIST_SERVER_TOKENIZER_BYTE_LEVEL_H_

#include <string>
#include <string_view>

namespace soloist {

// Each byte as the character that stands for it.
std::string ToByteLevel(std::string_view bytes);
// And back; a text with a character that stands for no byte stays as it is.
std::string FromByteLevel(std::string_view text);

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_BYTE_LEVEL_H_
