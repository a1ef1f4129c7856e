#include "server/tokenizer/byte_level.h"

#include <array>
#include <unordered_map>

#include "server/tokenizer/utf8.h"

namespace soloist {
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
  for (std::string_view rest = text; !rest.empty();) {
    const std::string character(rest.substr(0, NextUtf8(rest).bytes));
    const auto it = Map().bytes.find(character);
    if (it == Map().bytes.end()) return std::string(text);
    out.push_back(it->second);
    rest.remove_prefix(character.size());
  }
  return out;
}

}  // namespace soloist
