// A tokenizer.json, a zero byte, a text: no file and no text may do more than be refused or tokenized.
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "server/tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  const std::string_view json = input.substr(0, zero);
  const std::string_view text = zero == std::string_view::npos ? json.substr(0, 256) : input.substr(zero + 1);
  const auto tokenizer = soloist::Tokenizer::FromJson(json, "");
  if (!tokenizer.ok()) return 0;
  for (const bool parse : {true, false}) {
    const std::vector<int32_t> ids =
        (*tokenizer)->Encode(text, {.add_special_tokens = parse, .parse_special_tokens = parse});
    const std::string whole = (*tokenizer)->Decode(ids, false);
    std::string pieces;
    soloist::IncrementalDecoder decoder(**tokenizer, false);
    for (const int32_t id : ids) pieces += decoder.Push(id);
    CHECK(pieces + decoder.Flush() == whole);
  }
  return 0;
}
