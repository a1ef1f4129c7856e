#include "server/chat_template.h"

#include <algorithm>
#include <array>
#include <exception>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string_view>
#include <utility>

#include "base/status.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "jinja/value.h"
#include "server/chat_messages.h"

namespace soloist {
namespace {

using Json = nlohmann::ordered_json;

// Tokenizer settings that transformers hands to templates as variables.
constexpr std::array kSpecialTokens = {"bos_token", "eos_token", "unk_token",  "sep_token",
                                       "pad_token", "cls_token", "mask_token", "additional_special_tokens"};
// Roles that count as the template's text: some build a special token of them, '<|' + role + '|>'.
constexpr std::array<std::string_view, 9> kRoles = {"system", "developer", "user",    "assistant",    "tool",
                                                    "model",  "function",  "ipython", "tool_response"};
constexpr size_t kMaxTemplateBytes = 4 << 20;

// What a rendering may cost; the engine has more limits of its own (limits.h). A message takes 20 to 60 steps, a step
// some microseconds.
struct Budget {
  int64_t steps;
  size_t text_bytes;  // of all strings made on the way
};
constexpr Budget kRequest = {.steps = 500'000, .text_bytes = size_t{1} << 30};
constexpr Budget kTrial = {.steps = 20'000, .text_bytes = size_t{4} << 20};

// `from_request`: its strings, keys too, are marked, and special tokens in them will not count.
absl::StatusOr<jinja::value> ToValue(const Json& json, bool from_request, int depth = 0) {
  if (depth > ChatTemplate::kMaxJsonDepth) {
    return InvalidArgument("JSON is nested deeper than {} levels", ChatTemplate::kMaxJsonDepth);
  }
  const auto text = [&](const std::string& from) {
    auto value = jinja::mk_val<jinja::value_string>(from);
    if (from_request) value->mark_input();
    return value;
  };
  switch (json.type()) {
    case Json::value_t::boolean:
      return jinja::mk_val<jinja::value_bool>(json.get<bool>());
    case Json::value_t::number_unsigned:
      if (json.get<uint64_t>() > INT64_MAX) {
        return InvalidArgument("the number {} is too large, limit {}", json.get<uint64_t>(), INT64_MAX);
      }
      [[fallthrough]];
    case Json::value_t::number_integer:
      return jinja::mk_val<jinja::value_int>(json.get<int64_t>());
    case Json::value_t::number_float:
      return jinja::mk_val<jinja::value_float>(json.get<double>());
    case Json::value_t::string:
      return text(json.get_ref<const std::string&>());
    case Json::value_t::array: {
      auto list = jinja::mk_val<jinja::value_array>();
      for (const Json& item : json) {
        ASSIGN_OR_RETURN(jinja::value value, ToValue(item, from_request, depth + 1));
        list->push_back(std::move(value));
      }
      return list;
    }
    case Json::value_t::object: {
      auto object = jinja::mk_val<jinja::value_object>();
      for (const auto& [key, item] : json.items()) {
        ASSIGN_OR_RETURN(jinja::value value, ToValue(item, from_request, depth + 1));
        object->insert(jinja::value(text(key)), value);
      }
      return object;
    }
    default:
      return jinja::mk_val<jinja::value_none>();
  }
}

absl::StatusOr<jinja::value> MessagesToValue(const Json& messages) {
  auto list = jinja::mk_val<jinja::value_array>();
  for (const Json& message : messages) {
    ASSIGN_OR_RETURN(jinja::value value, ToValue(message, /*from_request=*/true));
    const std::string& role = message["role"].get_ref<const std::string&>();
    if (std::ranges::find(kRoles, role) != kRoles.end()) {
      value->insert(jinja::mk_val<jinja::value_string>("role"), jinja::mk_val<jinja::value_string>(role));
    }
    list->push_back(std::move(value));
  }
  return list;
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("{}: cannot be opened", path);
  std::ostringstream text;
  text << file.rdbuf();
  return std::move(text).str();
}

// An object; a file that is not there is an empty one.
absl::StatusOr<Json> ReadJson(const std::string& path) {
  const auto text = ReadFile(path);
  if (!text.ok()) return Json::object();
  Json json = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return InvalidArgument("{}: not a JSON object", path);
  return json;
}

// A token is its text, or an object with `content`.
Json SpecialTokens(const Json& config) {
  const auto text_of = [](const Json& token) {
    return token.is_object() && token.contains("content") ? token["content"] : token;
  };
  Json tokens = Json::object();
  for (const char* name : kSpecialTokens) {
    if (!config.contains(name)) continue;
    const Json& token = config[name];
    if (token.is_array()) {
      Json list = Json::array();
      for (const Json& item : token) list.push_back(text_of(item));
      tokens[name] = std::move(list);
    } else if (const Json text = text_of(token); text.is_string()) {
      tokens[name] = text;
    }
  }
  return tokens;
}

std::string Joined(const std::vector<ChatPiece>& pieces) {
  std::string text;
  for (const ChatPiece& piece : pieces) text += piece.text;
  return text;
}

// Drops what the template puts after the last message's text, as transformers does.
absl::Status CutAfterFinalMessage(const Json& message, std::vector<ChatPiece>& pieces) {
  const auto content = message.find("content");
  std::string final_text;
  if (content != message.end() && content->is_string()) final_text = *content;
  if (content != message.end() && content->is_array() && !content->empty()) final_text = content->back()["text"];
  const std::string_view space = " \t\n\v\f\r";
  const size_t begin = final_text.find_first_not_of(space);
  if (begin == std::string::npos) return InvalidArgument("continue_final_message: the last message has no text");
  const std::string_view left_stripped = std::string_view(final_text).substr(begin);
  const std::string_view stripped = left_stripped.substr(0, left_stripped.find_last_not_of(space) + 1);
  const std::string rendered = Joined(pieces);
  const size_t at = rendered.rfind(stripped);
  if (at == std::string::npos) {
    return InvalidArgument("continue_final_message: the template does not print the last message's text as it is");
  }
  const bool kept = std::string_view(rendered).substr(at, left_stripped.size()) == final_text;
  size_t left = at + (kept ? left_stripped.size() : stripped.size());
  for (ChatPiece& piece : pieces) {
    piece.text.resize(std::min(piece.text.size(), left));
    left -= piece.text.size();
  }
  std::erase_if(pieces, [](const ChatPiece& piece) { return piece.text.empty(); });
  return absl::OkStatus();
}

}  // namespace

struct ChatTemplate::Source {
  std::string name;  // "default", "tool_use", ...
  std::string text;
};

struct ChatTemplate::Program {
  std::string name;
  std::string text;
  jinja::program code;
  ContentStyle style;

  using Variables = std::vector<std::pair<std::string, jinja::value>>;
  absl::StatusOr<std::vector<ChatPiece>> Run(const Variables& variables, const Budget& budget) const {
    try {
      jinja::context context(text);
      context.lim->max_steps = budget.steps;
      context.lim->max_bytes = budget.text_bytes;
      for (const auto& [variable, value] : variables) context.set_val(variable, value);
      const jinja::string prompt = jinja::runtime(context).execute(code);
      std::vector<ChatPiece> pieces;
      for (const jinja::string_part& part : prompt.parts) {
        if (!part.val.empty()) pieces.push_back({part.val, !part.is_input});
      }
      return pieces;
    } catch (const jinja::template_exception& raised) {
      return InvalidArgument("{}", raised.what());
    } catch (const std::exception& failure) {
      return InvalidArgument("chat template: {}", failure.what());
    }
  }

  // With messages as they are.
  absl::StatusOr<std::vector<ChatPiece>> RunPrepared(const Json& messages, const ChatOptions& options,
                                                     const Json& special_tokens, const Budget& budget) const {
    Variables variables;
    for (const auto& [name, token] : special_tokens.items()) {
      ASSIGN_OR_RETURN(jinja::value value, ToValue(token, /*from_request=*/false));
      variables.emplace_back(name, std::move(value));
    }
    if (!options.template_kwargs.is_null()) {
      for (const auto& [name, json] : options.template_kwargs.items()) {
        auto value = ToValue(json, /*from_request=*/true);
        if (!value.ok()) return Annotate(value.status(), fmt::format("template_kwargs '{}'", name));
        variables.emplace_back(name, *std::move(value));
      }
    }
    auto conversation = MessagesToValue(messages);
    if (!conversation.ok()) return Annotate(conversation.status(), "messages");
    variables.emplace_back("messages", *std::move(conversation));
    auto tools = ToValue(options.tools, /*from_request=*/true);
    if (!tools.ok()) return Annotate(tools.status(), "tools");
    variables.emplace_back("tools", *std::move(tools));
    auto documents = ToValue(options.documents, /*from_request=*/true);
    if (!documents.ok()) return Annotate(documents.status(), "documents");
    variables.emplace_back("documents", *std::move(documents));
    variables.emplace_back("add_generation_prompt", jinja::mk_val<jinja::value_bool>(options.add_generation_prompt));
    return Run(variables, budget);
  }

  // Renders conversations in which one message has parts, or null, and looks for its text.
  void LearnStyle(const Json& special_tokens) {
    const Json parts = Json::parse(R"([{"type":"text","text":"part-1"},{"type":"text","text":"part-2"}])");
    const Json user = {{"role", "user"}, {"content", "u"}};
    const Json call = Json::parse(R"([{"id":"c1","type":"function","function":{"name":"f","arguments":{}}}])");
    const auto render = [&](const Json& messages) -> std::optional<std::string> {
      const auto pieces = RunPrepared(messages, ChatOptions{}, special_tokens, kTrial);
      if (!pieces.ok()) return std::nullopt;
      return Joined(*pieces);
    };
    const auto takes_apart = [&](const Json& messages) {
      const auto text = render(messages);
      return text && text->find("part-1") != std::string::npos && text->find("part-2") != std::string::npos &&
             text->find("'text'") == std::string::npos && text->find("\"text\"") == std::string::npos;
    };
    const auto with_parts = [&](const char* role) { return Json{{"role", role}, {"content", parts}}; };
    const Json calling = {{"role", "assistant"}, {"content", ""}, {"tool_calls", call}};
    if (takes_apart(Json::array({with_parts("user")}))) style.parts_of.insert("user");
    if (takes_apart(Json::array({with_parts("system"), user}))) style.parts_of.insert("system");
    if (takes_apart(Json::array({with_parts("developer"), user}))) style.parts_of.insert("developer");
    if (takes_apart(Json::array({user, with_parts("assistant"), user}))) style.parts_of.insert("assistant");
    if (takes_apart(Json::array({user, calling, with_parts("tool")}))) style.parts_of.insert("tool");
    Json null = calling;
    null["content"] = nullptr;
    const Json result = {{"role", "tool"}, {"tool_call_id", "c1"}, {"name", "f"}, {"content", "r"}};
    for (const Json& next : {result, user}) {
      const auto with_null = render(Json::array({user, null, next})),
                 with_empty = render(Json::array({user, calling, next}));
      if (with_empty && (!with_null || with_null->find("None") != std::string::npos)) style.null_is_empty = true;
    }
  }
};

ChatTemplate::~ChatTemplate() = default;

absl::StatusOr<std::unique_ptr<const ChatTemplate>> ChatTemplate::Compile(const std::vector<Source>& sources,
                                                                          std::string origin, Json special_tokens) {
  std::unique_ptr<ChatTemplate> compiled(new ChatTemplate);
  compiled->origin_ = std::move(origin);
  compiled->special_tokens_ = std::move(special_tokens);
  for (const Source& source : sources) {
    auto program = std::make_unique<Program>();
    program->name = source.name;
    if (source.text.size() > kMaxTemplateBytes) {
      return InvalidArgument("{}: the chat template '{}' has {} bytes, limit {}", compiled->origin_, source.name,
                             source.text.size(), kMaxTemplateBytes);
    }
    try {
      const jinja::lexer_result tokens = jinja::lexer().tokenize(source.text);
      program->text = tokens.source;
      program->code = jinja::parse_from_tokens(tokens);
    } catch (const std::exception& failure) {
      return InvalidArgument("{}: chat template '{}': {}", compiled->origin_, source.name, failure.what());
    }
    program->LearnStyle(compiled->special_tokens_);
    compiled->programs_.push_back(std::move(program));
  }
  return compiled;
}

absl::StatusOr<std::unique_ptr<const ChatTemplate>> ChatTemplate::FromText(const std::string& text,
                                                                           const std::string& tokenizer_config_json) {
  Json config = Json::object();
  if (!tokenizer_config_json.empty()) config = Json::parse(tokenizer_config_json, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return InvalidArgument("tokenizer_config.json: not a JSON object");
  return Compile({{"default", text}}, "text", SpecialTokens(config));
}

absl::StatusOr<std::unique_ptr<const ChatTemplate>> ChatTemplate::Load(const std::string& model_dir,
                                                                       const std::string& override_file) {
  const std::string config_path = model_dir + "/tokenizer_config.json";
  ASSIGN_OR_RETURN(const Json config, ReadJson(config_path));
  Json special_tokens = SpecialTokens(config);
  if (!override_file.empty()) {
    ASSIGN_OR_RETURN(std::string text, ReadFile(override_file));
    return Compile({{"default", std::move(text)}}, override_file, std::move(special_tokens));
  }
  const std::string template_path = model_dir + "/chat_template.jinja";
  if (auto text = ReadFile(template_path); text.ok()) {
    std::vector<Source> sources = {{"default", *std::move(text)}};
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(model_dir + "/additional_chat_templates", error)) {
      if (entry.path().extension() != ".jinja") continue;
      ASSIGN_OR_RETURN(std::string more, ReadFile(entry.path()));
      sources.push_back({entry.path().stem(), std::move(more)});
    }
    return Compile(sources, template_path, std::move(special_tokens));
  }
  for (const std::string& path : {config_path, model_dir + "/chat_template.json"}) {
    ASSIGN_OR_RETURN(const Json json, ReadJson(path));
    const auto found = json.find("chat_template");
    if (found == json.end() || found->is_null()) continue;
    if (found->is_string()) return Compile({{"default", *found}}, path, std::move(special_tokens));
    std::vector<Source> sources;
    for (const Json& named : *found) {
      if (!named.is_object() || !named.value("name", Json()).is_string() ||
          !named.value("template", Json()).is_string()) {
        return InvalidArgument("{}: chat_template must be a string or a list of {{name, template}}", path);
      }
      sources.push_back({named["name"], named["template"]});
    }
    if (sources.empty()) return InvalidArgument("{}: chat_template is an empty list", path);
    return Compile(sources, path, std::move(special_tokens));
  }
  return NotFound("{} has no chat template (chat_template.jinja, or tokenizer_config.json's chat_template)", model_dir);
}

absl::StatusOr<const ChatTemplate::Program*> ChatTemplate::Choose(bool with_tools) const {
  const auto named = [&](std::string_view name) {
    return std::ranges::find_if(programs_, [&](const auto& program) { return program->name == name; });
  };
  auto found = with_tools ? named("tool_use") : programs_.end();
  if (found == programs_.end()) found = named("default");
  if (found == programs_.end() && programs_.size() == 1) found = programs_.begin();
  if (found == programs_.end()) return InvalidArgument("{}: no chat template is named 'default'", origin_);
  return found->get();
}

absl::StatusOr<std::vector<ChatPiece>> ChatTemplate::Render(const Json& messages, const ChatOptions& options) const {
  RETURN_IF_ERROR(CheckObjects(options.tools, "tools"));
  RETURN_IF_ERROR(CheckObjects(options.documents, "documents"));
  if (options.continue_final_message && options.add_generation_prompt) {
    return InvalidArgument("continue_final_message and add_generation_prompt exclude each other");
  }
  if (!options.template_kwargs.is_null()) {
    if (!options.template_kwargs.is_object()) return InvalidArgument("template_kwargs is not an object");
    for (const auto& [name, value] : options.template_kwargs.items()) {
      for (const char* reserved : {"messages", "tools", "documents", "add_generation_prompt", "chat_template"}) {
        if (name == reserved) return InvalidArgument("template_kwargs may not set '{}'", name);
      }
      if (special_tokens_.contains(name)) return InvalidArgument("template_kwargs may not set '{}'", name);
    }
  }
  ASSIGN_OR_RETURN(const Program* program, Choose(!options.tools.is_null()));
  ASSIGN_OR_RETURN(const Json prepared, PrepareMessages(messages, program->style, kMaxMessages));
  ASSIGN_OR_RETURN(std::vector<ChatPiece> pieces, program->RunPrepared(prepared, options, special_tokens_, kRequest));
  if (options.continue_final_message) RETURN_IF_ERROR(CutAfterFinalMessage(prepared.back(), pieces));
  return pieces;
}

std::vector<int32_t> EncodeChat(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces) {
  std::vector<Tokenizer::Segment> segments;
  segments.reserve(pieces.size());
  for (const ChatPiece& piece : pieces) segments.push_back({piece.text, piece.from_template});
  return tokenizer.EncodeSegments(segments, /*add_special_tokens=*/false);
}

}  // namespace soloist
