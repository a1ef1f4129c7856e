#include "server/tokenizer/pre_tokenizer.h"

#include <array>
#include <unordered_map>

#include "base/status.h"
#include "pcre2.h"
#include "server/tokenizer/utf8.h"

namespace soloist {

const char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

void Splitter::FreeCode::operator()(pcre2_real_code_8* code) const { pcre2_code_free(code); }

absl::StatusOr<Splitter> Splitter::Compile(const std::string& pattern) {
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
  return Splitter(code);
}

void Splitter::Split(std::string_view text, const std::function<void(std::string_view)>& word) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(code_.get(), nullptr), pcre2_match_data_free);
  size_t done = 0, from = 0;
  while (from < text.size()) {
    const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                  PCRE2_NO_UTF_CHECK, match.get(), nullptr);
    if (found < 0) break;
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
    if (range[1] == range[0]) {  // an empty match: on to the next character
      from = range[0] + NextUtf8(text.substr(range[0])).bytes;
      continue;
    }
    if (range[0] > done) word(text.substr(done, range[0] - done));
    word(text.substr(range[0], range[1] - range[0]));
    done = from = range[1];
  }
  if (done < text.size()) word(text.substr(done));
}

namespace {

struct ByteLevelMap {
  std::array<std::string, 256> characters;
  std::unordered_map<std::string, char> bytes;
  ByteLevelMap() {
    // Printable bytes stand for themselves, the others for U+0100 and up, in order.
    int next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      const int code = printable ? b : next++;
      std::string& out = characters[b];
      if (code < 0x80) {
        out.push_back(static_cast<char>(code));
      } else {
        out.push_back(static_cast<char>(0xC0 | (code >> 6)));
        out.push_back(static_cast<char>(0x80 | (code & 0x3F)));
      }
      bytes[out] = static_cast<char>(b);
    }
  }
};

const ByteLevelMap& Map() {
  static const ByteLevelMap* map = new ByteLevelMap;
  return *map;
}

}  // namespace

std::string ToByteLevel(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) out += Map().characters[static_cast<unsigned char>(c)];
  return out;
}

std::string FromByteLevel(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const std::string character(text.substr(0, NextUtf8(text).bytes));
    const auto it = Map().bytes.find(character);
    if (it != Map().bytes.end()) {
      out.push_back(it->second);
    } else {
      out += character;
    }
    text.remove_prefix(character.size());
  }
  return out;
}

}  // namespace soloist
