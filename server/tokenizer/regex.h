// Regex: a PCRE2 pattern in UTF mode with Unicode classes, as Hugging Face tokenizers' patterns expect.
#ifndef SOLOIST_SERVER_TOKENIZER_REGEX_H_
#define SOLOIST_SERVER_TOKENIZER_REGEX_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

struct pcre2_real_code_8;

namespace soloist {

// Immutable; copies share the compiled code. Thread-safe.
class Regex {
 public:
  // INVALID_ARGUMENT with PCRE2's message.
  static absl::StatusOr<Regex> Compile(const std::string& pattern);
  // The pattern that matches `text` itself.
  static std::string Quote(std::string_view text);

  // Covers `text`, well-formed UTF-8, in order with pieces that match and pieces between them; none is empty. A text on
  // which the matcher gives up (its own limits) matches no more from there on.
  void Cover(std::string_view text, const std::function<void(std::string_view piece, bool match)>& piece) const;

 private:
  explicit Regex(std::shared_ptr<pcre2_real_code_8> code) : code_(std::move(code)) {}
  std::shared_ptr<pcre2_real_code_8> code_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_REGEX_H_
