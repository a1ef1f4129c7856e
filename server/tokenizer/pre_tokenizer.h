// Splits text into words before BPE: regular expressions through PCRE2 (UTF mode, Unicode classes), and GPT-2's mapping
// of bytes to printable characters.
#ifndef SOLOIST_SERVER_TOKENIZER_PRE_TOKENIZER_H_
#define SOLOIST_SERVER_TOKENIZER_PRE_TOKENIZER_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

struct pcre2_real_code_8;

namespace soloist {

// GPT-2's pattern, which ByteLevel uses.
extern const char kGpt2Pattern[];

// A compiled pattern. Thread-safe.
class Splitter {
 public:
  // INVALID_ARGUMENT with PCRE2's message.
  static absl::StatusOr<Splitter> Compile(const std::string& pattern);

  // Calls `word` for each match and each stretch between matches, in order ("Isolated"). A text on which the matcher
  // gives up (its own limits) is one word from there on.
  void Split(std::string_view text, const std::function<void(std::string_view)>& word) const;

 private:
  struct FreeCode {
    void operator()(pcre2_real_code_8* code) const;
  };
  explicit Splitter(pcre2_real_code_8* code) : code_(code) {}
  std::unique_ptr<pcre2_real_code_8, FreeCode> code_;
};

// Each byte as the character that stands for it in a byte-level vocabulary.
std::string ToByteLevel(std::string_view bytes);
// And back; a character that stands for no byte stays as it is.
std::string FromByteLevel(std::string_view text);

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_PRE_TOKENIZER_H_
