#include "server/tokenizer/tokenizer.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "base/status.h"
#include "nlohmann/json.hpp"
#include "server/tokenizer/bpe.h"
#include "server/tokenizer/pre_tokenizer.h"
#include "server/tokenizer/utf8.h"
#include "utf8proc.h"

namespace soloist {
namespace {

using Json = nlohmann::json;

// Ids stay small enough that tables indexed by them cannot be made huge by a file.
constexpr int64_t kMaxId = 1 << 24;

struct Normalizer {
  enum Kind { kNfc, kPrepend, kReplace } kind;
  std::string from;  // kReplace
  std::string to;    // kReplace; kPrepend: what goes in front
};

std::string ReplaceAll(std::string_view text, const std::string& from, const std::string& to) {
  std::string out;
  for (size_t at; (at = text.find(from)) != std::string_view::npos; text.remove_prefix(at + from.size())) {
    out.append(text.substr(0, at));
    out += to;
  }
  return out.append(text);
}

std::string Nfc(const std::string& text) {
  utf8proc_uint8_t* out = nullptr;
  const auto size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &out, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (size < 0) return text;
  std::string result(reinterpret_cast<char*>(out), size);
  std::free(out);
  return result;
}

std::string TypeOf(const Json& component) {
  const auto it = component.find("type");
  return component.is_object() && it != component.end() && it->is_string() ? it->get<std::string>() : "?";
}
bool Flag(const Json& object, const char* name, bool absent) {
  const auto it = object.find(name);
  return it != object.end() && it->is_boolean() ? it->get<bool>() : absent;
}
std::string Text(const Json& object, const char* name) {
  const auto it = object.find(name);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}
bool IsSet(const Json& object, const char* name) {
  const auto it = object.find(name);
  return it != object.end() && !it->is_null();
}

class BpeTokenizer final : public Tokenizer {
 public:
  absl::Status Parse(const Json& root) {
    if (IsSet(root, "truncation"))
      return InvalidArgument("truncation is set: not supported (the server limits prompts)");
    if (IsSet(root, "padding")) return InvalidArgument("padding is set: not supported");
    RETURN_IF_ERROR(ParseModel(root.value("model", Json())));
    RETURN_IF_ERROR(ParseAddedTokens(root.value("added_tokens", Json::array())));
    if (IsSet(root, "normalizer")) RETURN_IF_ERROR(ParseNormalizer(root["normalizer"]));
    if (IsSet(root, "pre_tokenizer")) RETURN_IF_ERROR(ParsePreTokenizer(root["pre_tokenizer"]));
    if (IsSet(root, "post_processor")) RETURN_IF_ERROR(ParsePostProcessor(root["post_processor"]));
    if (IsSet(root, "decoder")) RETURN_IF_ERROR(ParseDecoder(root["decoder"]));
    FillTokenBytes();
    return absl::OkStatus();
  }

  absl::Status ParseConfig(const Json& config) {
    const auto id_of = [&](const char* name, std::optional<int32_t>& id) {
      const auto it = config.find(name);
      if (it == config.end()) return;
      const std::string token = it->is_object() ? Text(*it, "content") : it->is_string() ? it->get<std::string>() : "";
      id = TokenId(token);
    };
    id_of("bos_token", bos_);
    id_of("eos_token", eos_);
    chat_template_ = Text(config, "chat_template");
    return absl::OkStatus();
  }

  std::vector<int32_t> Encode(std::string_view text, const EncodeOptions& options) const override {
    std::vector<int32_t> ids;
    if (options.add_special_tokens) ids = prefix_;
    const std::string repaired = RepairUtf8(text);
    std::string_view rest = repaired;
    size_t plain = 0;
    while (plain < rest.size()) {
      const int32_t added = MatchAdded(rest.substr(plain), options.parse_special_tokens);
      if (added < 0) {
        plain += NextUtf8(rest.substr(plain)).bytes;
        continue;
      }
      EncodePlain(rest.substr(0, plain), ids);
      ids.push_back(added);
      rest.remove_prefix(plain + added_.at(added).content.size());
      plain = 0;
    }
    EncodePlain(rest, ids);
    if (options.add_special_tokens) ids.insert(ids.end(), suffix_.begin(), suffix_.end());
    return ids;
  }

  int32_t vocab_size() const override { return static_cast<int32_t>(bytes_.size()); }
  std::optional<int32_t> TokenId(std::string_view token) const override {
    for (const auto& [id, added] : added_) {
      if (added.content == token) return id;
    }
    const auto it = model_.vocab.find(std::string(token));
    if (it == model_.vocab.end()) return std::nullopt;
    return it->second;
  }
  std::string_view TokenBytes(int32_t id) const override {
    return id >= 0 && id < vocab_size() ? std::string_view(bytes_[id]) : std::string_view();
  }
  bool IsSpecial(int32_t id) const override {
    const auto it = added_.find(id);
    return it != added_.end() && it->second.special;
  }
  bool strips_leading_space() const override { return strip_leading_space_; }
  std::optional<int32_t> bos_id() const override { return bos_; }
  std::optional<int32_t> eos_id() const override { return eos_; }
  const std::string& chat_template() const override { return chat_template_; }

 private:
  struct Added {
    std::string content;
    bool special;
  };

  absl::Status ParseModel(const Json& model) {
    if (!model.is_object()) return InvalidArgument("model is missing");
    const std::string type = IsSet(model, "type") ? TypeOf(model) : "BPE";
    if (type != "BPE") return InvalidArgument("model type '{}' is not supported, only BPE", type);
    for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
      if (IsSet(model, name) && model[name] != "" && model[name] != 0) {
        return InvalidArgument("model.{} is {}: not supported", name, model[name].dump());
      }
    }
    if (!IsSet(model, "vocab") || !model["vocab"].is_object()) return InvalidArgument("model.vocab is missing");
    for (const auto& [token, id] : model["vocab"].items()) {
      if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= kMaxId) {
        return InvalidArgument("model.vocab['{}'] is {}, allowed: 0 to {}", token, id.dump(), kMaxId - 1);
      }
      model_.vocab[token] = id.get<int32_t>();
    }
    if (!IsSet(model, "merges") || !model["merges"].is_array()) return InvalidArgument("model.merges is missing");
    int32_t rank = 0;
    for (const Json& merge : model["merges"]) {
      std::string left, right;
      if (merge.is_string()) {
        const std::string both = merge.get<std::string>();
        const size_t space = both.find(' ', 1);
        if (space == std::string::npos) return InvalidArgument("model.merges[{}] is '{}'", rank, both);
        left = both.substr(0, space);
        right = both.substr(space + 1);
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        left = merge[0].get<std::string>();
        right = merge[1].get<std::string>();
      } else {
        return InvalidArgument("model.merges[{}] is neither a string nor a pair", rank);
      }
      const auto a = model_.vocab.find(left), b = model_.vocab.find(right), both = model_.vocab.find(left + right);
      if (a == model_.vocab.end() || b == model_.vocab.end() || both == model_.vocab.end()) {
        return InvalidArgument("model.merges[{}]: '{}' + '{}' is not in the vocabulary", rank, left, right);
      }
      model_.merges.try_emplace((static_cast<uint64_t>(a->second) << 32) | static_cast<uint32_t>(b->second),
                                BpeModel::Merge{rank, both->second});
      ++rank;
    }
    model_.byte_fallback = Flag(model, "byte_fallback", false);
    model_.fuse_unk = Flag(model, "fuse_unk", false);
    model_.ignore_merges = Flag(model, "ignore_merges", false);
    if (IsSet(model, "unk_token")) {
      const auto it = model_.vocab.find(Text(model, "unk_token"));
      if (it == model_.vocab.end())
        return InvalidArgument("model.unk_token {} is not in the vocabulary", model["unk_token"].dump());
      model_.unk_id = it->second;
    }
    for (int b = 0; b < 256; ++b) {
      const auto it = model_.vocab.find(fmt::format("<0x{:02X}>", b));
      model_.byte_ids[b] = it == model_.vocab.end() ? -1 : it->second;
    }
    return absl::OkStatus();
  }

  absl::Status ParseAddedTokens(const Json& tokens) {
    if (!tokens.is_array()) return InvalidArgument("added_tokens is not a list");
    for (const Json& token : tokens) {
      const auto id = token.is_object() ? token.find("id") : token.end();
      if (!token.is_object() || id == token.end() || !id->is_number_integer() || id->get<int64_t>() < 0 ||
          id->get<int64_t>() >= kMaxId || Text(token, "content").empty()) {
        return InvalidArgument("added_tokens holds {}, expected id and content", token.dump());
      }
      for (const char* name : {"lstrip", "rstrip", "single_word"}) {
        if (Flag(token, name, false)) {
          return InvalidArgument("added token '{}' has {}: not supported", Text(token, "content"), name);
        }
      }
      added_[id->get<int32_t>()] = {Text(token, "content"), Flag(token, "special", false)};
    }
    for (const auto& [id, added] : added_) by_first_[added.content[0]].push_back(id);
    for (auto& [first, ids] : by_first_) {
      std::sort(ids.begin(), ids.end(),
                [this](int32_t a, int32_t b) { return added_.at(a).content.size() > added_.at(b).content.size(); });
    }
    return absl::OkStatus();
  }

  absl::Status ParseNormalizer(const Json& component) {
    const std::string type = TypeOf(component);
    if (type == "Sequence") {
      for (const Json& part : component.value("normalizers", Json::array())) RETURN_IF_ERROR(ParseNormalizer(part));
      return absl::OkStatus();
    }
    if (type == "NFC") {
      normalizers_.push_back({Normalizer::kNfc, "", ""});
    } else if (type == "Prepend") {
      normalizers_.push_back({Normalizer::kPrepend, "", Text(component, "prepend")});
    } else if (type == "Replace") {
      const Json pattern = component.value("pattern", Json::object());
      if (Text(pattern, "String").empty())
        return InvalidArgument("normalizer Replace: only String patterns are supported");
      normalizers_.push_back({Normalizer::kReplace, Text(pattern, "String"), Text(component, "content")});
    } else {
      return InvalidArgument("normalizer '{}' is not supported", type);
    }
    return absl::OkStatus();
  }

  absl::Status ParsePreTokenizer(const Json& component) {
    const std::string type = TypeOf(component);
    if (type == "Sequence") {
      for (const Json& part : component.value("pretokenizers", Json::array())) RETURN_IF_ERROR(ParsePreTokenizer(part));
      return absl::OkStatus();
    }
    if (byte_level_) return InvalidArgument("pre_tokenizer '{}' after ByteLevel is not supported", type);
    if (type == "ByteLevel") {
      byte_level_ = true;
      add_prefix_space_ = Flag(component, "add_prefix_space", true);
      if (Flag(component, "use_regex", true)) {
        ASSIGN_OR_RETURN(Splitter splitter, Splitter::Compile(kGpt2Pattern));
        splitters_.push_back(std::move(splitter));
      }
      return absl::OkStatus();
    }
    if (type == "Split") {
      const std::string pattern = Text(component.value("pattern", Json::object()), "Regex");
      if (pattern.empty()) return InvalidArgument("pre_tokenizer Split: only Regex patterns are supported");
      if (Text(component, "behavior") != "Isolated" || Flag(component, "invert", false)) {
        return InvalidArgument("pre_tokenizer Split: only behavior Isolated without invert is supported");
      }
      ASSIGN_OR_RETURN(Splitter splitter, Splitter::Compile(pattern));
      splitters_.push_back(std::move(splitter));
      return absl::OkStatus();
    }
    return InvalidArgument("pre_tokenizer '{}' is not supported", type);
  }

  absl::Status ParsePostProcessor(const Json& component) {
    const std::string type = TypeOf(component);
    if (type == "ByteLevel") return absl::OkStatus();  // trims offsets only
    if (type == "Sequence") {
      for (const Json& part : component.value("processors", Json::array())) RETURN_IF_ERROR(ParsePostProcessor(part));
      return absl::OkStatus();
    }
    if (type != "TemplateProcessing") return InvalidArgument("post_processor '{}' is not supported", type);
    std::vector<int32_t>* side = &prefix_;
    for (const Json& piece : component.value("single", Json::array())) {
      if (piece.contains("Sequence")) {
        side = &suffix_;
        continue;
      }
      const std::string name = Text(piece.value("SpecialToken", Json::object()), "id");
      const Json ids =
          component.value("special_tokens", Json::object()).value(name, Json::object()).value("ids", Json());
      if (!ids.is_array()) return InvalidArgument("post_processor: special token '{}' has no ids", name);
      for (const Json& id : ids) {
        if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= kMaxId) {
          return InvalidArgument("post_processor: special token '{}' has id {}", name, id.dump());
        }
        side->push_back(id.get<int32_t>());
      }
    }
    return absl::OkStatus();
  }

  absl::Status ParseDecoder(const Json& component) {
    const std::string type = TypeOf(component);
    if (type == "Sequence") {
      for (const Json& part : component.value("decoders", Json::array())) RETURN_IF_ERROR(ParseDecoder(part));
    } else if (type == "ByteLevel") {
      decode_byte_level_ = true;
    } else if (type == "ByteFallback") {
      decode_bytes_ = true;
    } else if (type == "Replace") {
      const Json pattern = component.value("pattern", Json::object());
      if (Text(pattern, "String").empty())
        return InvalidArgument("decoder Replace: only String patterns are supported");
      decode_replace_.push_back({Text(pattern, "String"), Text(component, "content")});
    } else if (type == "Strip") {
      if (Text(component, "content") != " " || component.value("start", 0) != 1 || component.value("stop", 0) != 0) {
        return InvalidArgument("decoder Strip: only one leading space is supported, found {}", component.dump());
      }
      strip_leading_space_ = true;
    } else if (type != "Fuse") {
      return InvalidArgument("decoder '{}' is not supported", type);
    }
    return absl::OkStatus();
  }

  void FillTokenBytes() {
    int32_t size = 0;
    for (const auto& [token, id] : model_.vocab) size = std::max(size, id + 1);
    for (const auto& [id, added] : added_) size = std::max(size, id + 1);
    bytes_.resize(size);
    for (const auto& [token, id] : model_.vocab) {
      std::string& bytes = bytes_[id] = token;
      for (const auto& [from, to] : decode_replace_) bytes = ReplaceAll(bytes, from, to);
      if (decode_byte_level_) bytes = FromByteLevel(bytes);
    }
    if (decode_bytes_) {
      for (int b = 0; b < 256; ++b) {
        if (model_.byte_ids[b] >= 0) bytes_[model_.byte_ids[b]] = std::string(1, static_cast<char>(b));
      }
    }
    for (const auto& [id, added] : added_) bytes_[id] = added.content;
  }

  // The longest added token that `text` begins with, or -1.
  int32_t MatchAdded(std::string_view text, bool special_too) const {
    const auto it = by_first_.find(text[0]);
    if (it == by_first_.end()) return -1;
    for (const int32_t id : it->second) {
      const Added& added = added_.at(id);
      if ((special_too || !added.special) && text.starts_with(added.content)) return id;
    }
    return -1;
  }

  void EncodePlain(std::string_view text, std::vector<int32_t>& ids) const {
    if (text.empty()) return;
    std::string normal(text);
    for (const Normalizer& n : normalizers_) {
      normal = n.kind == Normalizer::kNfc       ? Nfc(normal)
               : n.kind == Normalizer::kPrepend ? n.to + normal
                                                : ReplaceAll(normal, n.from, n.to);
    }
    if (byte_level_ && add_prefix_space_ && normal[0] != ' ') normal.insert(0, 1, ' ');
    SplitFrom(0, normal, ids);
  }

  void SplitFrom(size_t splitter, std::string_view text, std::vector<int32_t>& ids) const {
    if (splitter < splitters_.size()) {
      splitters_[splitter].Split(text, [&](std::string_view word) { SplitFrom(splitter + 1, word, ids); });
    } else if (byte_level_) {
      model_.Encode(ToByteLevel(text), ids);
    } else {
      model_.Encode(text, ids);
    }
  }

  BpeModel model_;
  std::unordered_map<int32_t, Added> added_;
  std::unordered_map<char, std::vector<int32_t>> by_first_;  // ids, longest first
  std::vector<Normalizer> normalizers_;
  std::vector<Splitter> splitters_;
  bool byte_level_ = false;
  bool add_prefix_space_ = false;
  std::vector<int32_t> prefix_, suffix_;  // what add_special_tokens puts around the text
  bool decode_byte_level_ = false, decode_bytes_ = false, strip_leading_space_ = false;
  std::vector<std::pair<std::string, std::string>> decode_replace_;
  std::vector<std::string> bytes_;  // [vocab_size]
  std::optional<int32_t> bos_, eos_;
  std::string chat_template_;
};

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("{}: cannot be opened", path);
  std::ostringstream text;
  text << file.rdbuf();
  return std::move(text).str();
}

}  // namespace

absl::StatusOr<std::unique_ptr<const Tokenizer>> Tokenizer::FromJson(std::string_view tokenizer_json,
                                                                     std::string_view tokenizer_config_json) {
  const Json root = Json::parse(tokenizer_json, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) return InvalidArgument("tokenizer.json: not a JSON object");
  auto tokenizer = std::make_unique<BpeTokenizer>();
  if (absl::Status status = tokenizer->Parse(root); !status.ok()) return Annotate(status, "tokenizer.json");
  if (!tokenizer_config_json.empty()) {
    const Json config = Json::parse(tokenizer_config_json, nullptr, /*allow_exceptions=*/false);
    if (!config.is_object()) return InvalidArgument("tokenizer_config.json: not a JSON object");
    RETURN_IF_ERROR(tokenizer->ParseConfig(config));
  }
  return tokenizer;
}

absl::StatusOr<std::unique_ptr<const Tokenizer>> Tokenizer::Load(const std::string& model_dir) {
  ASSIGN_OR_RETURN(const std::string json, ReadFile(model_dir + "/tokenizer.json"));
  const auto config = ReadFile(model_dir + "/tokenizer_config.json");
  auto tokenizer = FromJson(json, config.ok() ? *config : "");
  if (!tokenizer.ok()) return Annotate(tokenizer.status(), model_dir);
  return tokenizer;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  IncrementalDecoder decoder(*this, skip_special_tokens);
  std::string text;
  for (const int32_t id : ids) text += decoder.Push(id);
  return text + decoder.Flush();
}

std::string IncrementalDecoder::Push(int32_t id) {
  if (skip_special_tokens_ && tokenizer_.IsSpecial(id)) return "";
  std::string_view bytes = tokenizer_.TokenBytes(id);
  if (at_start_ && tokenizer_.strips_leading_space() && bytes.starts_with(' ')) bytes.remove_prefix(1);
  at_start_ = false;
  pending_ += bytes;
  std::string out;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Step step = NextUtf8(rest);
    if (step.kind == Utf8Step::kIncomplete) break;
    out += step.kind == Utf8Step::kCharacter ? rest.substr(0, step.bytes) : kReplacement;
    rest.remove_prefix(step.bytes);
  }
  pending_ = std::string(rest);
  return out;
}

std::string IncrementalDecoder::Flush() { return RepairUtf8(std::exchange(pending_, "")); }

}  // namespace soloist
