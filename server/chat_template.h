// ChatTemplate: from the messages of a conversation to the prompt, with the model's own Jinja template, as
// transformers' apply_chat_template does it. The engine is third_party/jinja; only chat_template.cc sees its headers.
#ifndef SOLOIST_SERVER_CHAT_TEMPLATE_H_
#define SOLOIST_SERVER_CHAT_TEMPLATE_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "server/tokenizer/tokenizer.h"

namespace soloist {

// A part of a prompt, well-formed UTF-8.
struct ChatPiece {
  std::string text;
  bool from_template;  // false: it came with the request, and special tokens in it are text
};

struct ChatOptions {
  bool add_generation_prompt = true;
  // The prompt ends with the last message's text, to be continued. Not together with add_generation_prompt.
  bool continue_final_message = false;
  nlohmann::ordered_json tools;            // null, or a list of objects
  nlohmann::ordered_json documents;        // null, or a list of objects
  nlohmann::ordered_json template_kwargs;  // null, or an object: more variables, e.g. enable_thinking
};

// Immutable and thread-safe.
class ChatTemplate {
 public:
  // Limits of a request.
  static constexpr size_t kMaxMessages = 4096;
  static constexpr int kMaxJsonDepth = 64;  // of messages, tools, documents, template_kwargs

  // From `override_file`, a template, or where that is empty from the model: chat_template.jinja (and
  // additional_chat_templates/*.jinja), tokenizer_config.json (one template, or a list of named ones) or
  // chat_template.json. Variables such as bos_token are tokenizer_config.json's. NOT_FOUND: the model has none;
  // INVALID_ARGUMENT: one that the engine does not understand, or an ill-formed file. Renders it some times, to learn
  // what it makes of lists of parts and of null.
  static absl::StatusOr<std::unique_ptr<const ChatTemplate>> Load(const std::string& model_dir,
                                                                  const std::string& override_file);
  // The same from text. `tokenizer_config_json` may be empty.
  static absl::StatusOr<std::unique_ptr<const ChatTemplate>> FromText(const std::string& text,
                                                                      const std::string& tokenizer_config_json);
  ~ChatTemplate();

  // `messages`: a list of objects with `role` and `content`: a string, a list of {"type": "text", "text": ...}, or (of
  // assistants) null or nothing. Parts are joined with newlines unless the template takes them apart itself. A tool
  // call's arguments may be an object or, as OpenAI's clients send them, its text. INVALID_ARGUMENT names what is
  // wrong, or is the text that the template raises, or says which limit of a template's work was passed. Adjacent
  // pieces differ in from_template; the prompt is all of them, joined.
  absl::StatusOr<std::vector<ChatPiece>> Render(const nlohmann::ordered_json& messages,
                                                const ChatOptions& options) const;

  // Where it was read: a file's path.
  const std::string& origin() const { return origin_; }

 private:
  struct Program;
  struct Source;
  ChatTemplate() = default;
  static absl::StatusOr<std::unique_ptr<const ChatTemplate>> Compile(const std::vector<Source>& sources,
                                                                     std::string origin,
                                                                     nlohmann::ordered_json special_tokens);
  // The one that transformers takes.
  absl::StatusOr<const Program*> Choose(bool with_tools) const;

  std::string origin_;
  nlohmann::ordered_json special_tokens_;  // {"bos_token": "<s>", ...}
  std::vector<std::unique_ptr<const Program>> programs_;
};

// The prompt's ids: those of the whole text, except that special tokens count in the template's pieces only. Nothing is
// put around it: a template says bos_token itself.
std::vector<int32_t> EncodeChat(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces);

}  // namespace soloist

#endif  // SOLOIST_SERVER_CHAT_TEMPLATE_H_
