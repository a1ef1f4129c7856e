// The bodies of /v1/completions and /v1/chat/completions as GenerationRequests: OpenAI's fields and vLLM's.
#ifndef SOLOIST_SERVER_HTTP_OPENAI_REQUEST_H_
#define SOLOIST_SERVER_HTTP_OPENAI_REQUEST_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "server/generation.h"
#include "server/http/json_text.h"

namespace soloist {

// What a chat's prompt is made of.
struct ChatInput {
  Json messages;  // an array of objects, each with a role and a content that is text or text parts
  bool add_generation_prompt = true;
  bool continue_final_message = false;
  Json documents, template_kwargs;  // null, or for the template
};
// The prompt's tokens. Any thread.
using RenderChat = std::function<absl::StatusOr<std::vector<int32_t>>(const ChatInput&)>;

struct OpenAiContext {
  std::string model;          // the name that is served
  RenderChat render;          // null: a chat is refused
  int32_t max_prompts = 256;  // of a completion
};

struct OpenAiRequest {
  bool chat = false;
  // One for each prompt, which all else is equal in. request_id: the body's, if it has one.
  std::vector<GenerationRequest> prompts;
  int32_t n = 1;
  bool stream = false;
  bool include_usage = false;           // a last event with the usage
  bool continuous_usage_stats = false;  // the usage so far in each event
  bool echo = false;                    // the prompt in front of each text
  bool return_token_ids = false;
  bool return_tokens_as_token_ids = false;  // in logprobs: "token_id:5" for a token's text
  std::vector<std::string> unknown_fields;  // were ignored
};

// `body`: what the client sent. INVALID_ARGUMENT, NOT_FOUND: the model (see api_error.h). What only the engine's limits
// can tell is left to the front end. Costs time linear in the body; a chat is rendered.
absl::StatusOr<OpenAiRequest> ReadCompletion(const Json& body, const OpenAiContext& context);
absl::StatusOr<OpenAiRequest> ReadChat(const Json& body, const OpenAiContext& context);

// {messages, add_generation_prompt, ...}, as of a chat and of /tokenize.
absl::StatusOr<ChatInput> ReadChatInput(const Json& body);

// `param` of a message of the front end's: "top_p is 2, allowed: ..." is about top_p. Empty: about no field.
std::string_view FieldOf(std::string_view message);

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_OPENAI_REQUEST_H_
