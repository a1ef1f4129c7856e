// Renders chat templates for render_test.py: reads one request a line from standard input and writes one answer a line:
// {"text": ...} or {"error": ...}.
//
// A request: {"template": FILE, "config": tokenizer_config, "messages": [...], "tools": ..., "add_generation_prompt":
// ..., "template_kwargs": ...}.
#include <iostream>
#include <map>
#include <string>

#include "nlohmann/json.hpp"
#include "server/chat_template.h"

namespace soloist {
namespace {

using Json = nlohmann::ordered_json;

std::string Answer(const Json& request) {
  static std::map<std::string, absl::StatusOr<std::unique_ptr<const ChatTemplate>>> templates;
  const std::string source = request["template"];
  auto found = templates.find(source);
  if (found == templates.end()) {
    found = templates.emplace(source, ChatTemplate::FromText(source, request["config"].dump())).first;
  }
  Json answer;
  if (!found->second.ok()) {
    answer["error"] = found->second.status().message();
    return answer.dump();
  }
  ChatOptions options;
  options.add_generation_prompt = request["add_generation_prompt"];
  options.tools = request["tools"];
  options.template_kwargs = request["template_kwargs"];
  const auto pieces = (*found->second)->Render(request["messages"], options);
  if (!pieces.ok()) {
    answer["error"] = pieces.status().message();
    return answer.dump();
  }
  std::string text;
  for (const ChatPiece& piece : *pieces) text += piece.text;
  answer["text"] = text;
  return answer.dump();
}

}  // namespace
}  // namespace soloist

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << soloist::Answer(nlohmann::ordered_json::parse(line)) << '\n';
  }
}
