#include "server/tokenizer/regex.h"

#include "base/status.h"
#include "pcre2.h"
#include "server/tokenizer/utf8.h"

namespace soloist {

absl::StatusOr<Regex> Regex::Compile(const std::string& pattern) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP,
                                   &error, &offset, nullptr);
  if (code == nullptr) {
    char message[256] = {};
    pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(message), sizeof(message));
    return InvalidArgument("pattern '{}' at {}: {}", pattern, offset, message);
  }
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  return Regex(std::shared_ptr<pcre2_code>(code, pcre2_code_free));
}

std::string Regex::Quote(std::string_view text) {
  std::string out;
  for (const char c : text) {
    // A backslash before a letter, a digit or a part of a character would mean something else.
    if (static_cast<unsigned char>(c) < 0x80 && !std::isalnum(static_cast<unsigned char>(c))) out.push_back('\\');
    out.push_back(c);
  }
  return out;
}

void Regex::Cover(std::string_view text, const std::function<void(std::string_view, bool)>& piece) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(code_.get(), nullptr), pcre2_match_data_free);
  size_t done = 0, from = 0;
  while (from < text.size()) {
    const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                  PCRE2_NO_UTF_CHECK, match.get(), nullptr);
    if (found < 0) break;
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
    // \K in a pattern can make a match begin before the search, or after its own end.
    if (range[0] < done || range[1] <= range[0]) {
      const size_t at = std::max<size_t>(from, range[0]);
      if (at >= text.size()) break;
      from = at + NextUtf8(text.substr(at)).bytes;
      continue;
    }
    if (range[0] > done) piece(text.substr(done, range[0] - done), false);
    piece(text.substr(range[0], range[1] - range[0]), true);
    done = from = range[1];
  }
  if (done < text.size()) piece(text.substr(done), false);
}

}  // namespace soloist
