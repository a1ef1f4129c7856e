// A template, a zero byte, a JSON list of messages: no template and no conversation may do more than be refused or
// rendered, and no text of the conversation may come out as the template's.
#include <cstdint>
#include <string>
#include <string_view>

#include "base/check.h"
#include "nlohmann/json.hpp"
#include "server/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  const auto chat = soloist::ChatTemplate::FromText(std::string(input.substr(0, zero)), R"({"bos_token":"<s>"})");
  if (!chat.ok()) return 0;
  nlohmann::ordered_json messages =
      zero == std::string_view::npos
          ? nlohmann::ordered_json()
          : nlohmann::ordered_json::parse(input.substr(zero + 1), nullptr, /*allow_exceptions=*/false);
  const std::string mark = "\x7fq\x7f";
  if (!messages.is_array()) messages = {{{"role", "user"}, {"content", "a " + mark + " b"}}};
  const auto pieces = (*chat)->Render(messages, {});
  if (!pieces.ok() || input.find('\x7f') != std::string_view::npos) return 0;
  for (const soloist::ChatPiece& piece : *pieces)
    CHECK(!piece.from_template || piece.text.find('\x7f') == std::string::npos);
  return 0;
}
