// AddedTokens: tokens that are found in text as they are, before it is split into words.
#ifndef SOLOIST_SERVER_TOKENIZER_ADDED_TOKENS_H_
#define SOLOIST_SERVER_TOKENIZER_ADDED_TOKENS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "server/tokenizer/json_access.h"
#include "server/tokenizer/normalizer.h"

namespace soloist {

// Immutable once parsed; thread-safe.
class AddedTokens {
 public:
  struct Token {
    std::string content;
    std::string pattern;  // what is looked for: the content, normalized if the token is
    bool special = false;
    bool single_word = false;  // not inside a word
    bool lstrip = false;       // takes the white space before it along
    bool rstrip = false;       // and after it
    bool normalized = false;   // looked for in normalized text
  };

  // tokenizer.json's added_tokens.
  absl::Status Parse(const Json& list, const Normalizer& normalizer);

  // Whether text[begin, end) may be a special token; where not, it is text.
  using SpecialAt = std::function<bool(size_t begin, size_t end)>;
  // Cuts `text` (raw, or normalized) at the tokens that are looked for there: leftmost first, of those the longest.
  // Calls `plain` for what lies between them (not empty), `token` for each.
  void Split(std::string_view text, bool normalized, const SpecialAt& special,
             const std::function<void(std::string_view)>& plain, const std::function<void(int32_t)>& token) const;

  const std::map<int32_t, Token>& tokens() const { return tokens_; }
  bool IsSpecial(int32_t id) const {
    const auto it = tokens_.find(id);
    return it != tokens_.end() && it->second.special;
  }

 private:
  int32_t Match(std::string_view text, size_t at, bool normalized, const SpecialAt& special) const;

  std::map<int32_t, Token> tokens_;
  std::unordered_map<char, std::vector<int32_t>> by_first_[2];  // [normalized]: ids by their first byte, longest first
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_ADDED_TOKENS_H_
