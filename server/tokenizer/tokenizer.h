// Tokenizer: a Hugging Face tokenizer.json in C++: byte-level BPE (GPT-2, Llama-3, Qwen) and SentencePiece-style BPE
// with byte fallback (Llama-2, Mixtral). What a file asks for and this does not have is refused by name, never ignored.
#ifndef SOLOIST_SERVER_TOKENIZER_TOKENIZER_H_
#define SOLOIST_SERVER_TOKENIZER_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace soloist {

// Immutable and thread-safe.
class Tokenizer {
 public:
  // tokenizer.json, and tokenizer_config.json where there is one. Errors name file and component.
  static absl::StatusOr<std::unique_ptr<const Tokenizer>> Load(const std::string& model_dir);
  // `tokenizer_config_json` may be empty.
  static absl::StatusOr<std::unique_ptr<const Tokenizer>> FromJson(std::string_view tokenizer_json,
                                                                   std::string_view tokenizer_config_json);
  virtual ~Tokenizer() = default;

  struct EncodeOptions {
    bool add_special_tokens = true;    // what the post-processor puts around the text
    bool parse_special_tokens = true;  // false: text that looks like a special token is plain text
  };
  // Ill-formed UTF-8 becomes U+FFFD first. Time is near-linear in the text's length.
  std::vector<int32_t> Encode(std::string_view text, const EncodeOptions& options) const {
    const Segment whole{.text = text, .parse_special_tokens = options.parse_special_tokens};
    return EncodeSegments({&whole, 1}, options.add_special_tokens);
  }
  std::vector<int32_t> Encode(std::string_view text) const { return Encode(text, EncodeOptions{}); }
  // A part of a text.
  struct Segment {
    std::string_view text;  // ill-formed UTF-8 becomes U+FFFD in each by itself
    bool parse_special_tokens = true;
  };
  // As Encode of all the texts, joined, but a special token counts only where all of it lies in segments that parse
  // them.
  virtual std::vector<int32_t> EncodeSegments(std::span<const Segment> segments, bool add_special_tokens) const = 0;
  // Well-formed UTF-8. Ids outside the vocabulary give nothing.
  std::string Decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  // One more than the largest id.
  virtual int32_t vocab_size() const = 0;
  virtual std::optional<int32_t> TokenId(std::string_view token) const = 0;
  // What the token stands for, before the decoder's work on the beginning of the text; may be a part of a character.
  virtual std::string_view TokenBytes(int32_t id) const = 0;
  virtual bool IsSpecial(int32_t id) const = 0;
  // The decoder removes one leading space from a text's first token (SentencePiece).
  virtual bool strips_leading_space() const = 0;
  virtual std::optional<int32_t> bos_id() const = 0;
  virtual std::optional<int32_t> eos_id() const = 0;
  virtual const std::string& chat_template() const = 0;
};

// Text of a growing token list: the pieces, joined, are Decode of all ids. Never splits a character. Not thread-safe.
class IncrementalDecoder {
 public:
  // `tokenizer` must outlive it.
  IncrementalDecoder(const Tokenizer& tokenizer, bool skip_special_tokens)
      : tokenizer_(tokenizer), skip_special_tokens_(skip_special_tokens) {}
  std::string Push(int32_t id);
  // What is left: the beginning of a character that never ended is U+FFFD.
  std::string Flush();

 private:
  const Tokenizer& tokenizer_;
  const bool skip_special_tokens_;
  bool at_start_ = true;
  std::string pending_;  // an incomplete character, at most 3 bytes
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_TOKENIZER_H_
