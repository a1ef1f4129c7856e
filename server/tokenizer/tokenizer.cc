#include "server/tokenizer/tokenizer.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <utility>

#include "base/status.h"
#include "server/tokenizer/added_tokens.h"
#include "server/tokenizer/bpe.h"
#include "server/tokenizer/byte_level.h"
#include "server/tokenizer/json_access.h"
#include "server/tokenizer/normalizer.h"
#include "server/tokenizer/pre_tokenizer.h"
#include "server/tokenizer/utf8.h"

namespace soloist {
namespace {

// The segments of a text, by their places in it.
class Layout {
 public:
  explicit Layout(std::span<const Tokenizer::Segment> segments) {
    for (const Tokenizer::Segment& segment : segments) Append(RepairUtf8(segment.text), segment.parse_special_tokens);
  }
  const std::string& text() const { return text_; }

  // Whether all segments that text[begin, end) touches parse special tokens.
  bool Special(size_t begin, size_t end) const {
    for (auto run = RunAt(begin); run != runs_.end() && run->begin < end; ++run) {
      if (!run->special) return false;
    }
    return true;
  }

  // The layout of text[begin, end) after `normalizer` has made `normal` of it: borders between segments lie where the
  // segments' normalized texts have them. Where those do not add up, nothing is special.
  Layout Normalized(size_t begin, size_t end, const Normalizer& normalizer, const std::string& normal) const {
    Layout whole;
    whole.text_ = normal;
    whole.runs_ = {{0, Special(begin, end)}};
    if (whole.runs_[0].special) return whole;
    std::vector<Run> runs;
    size_t at = 0;
    for (auto run = RunAt(begin); run != runs_.end() && run->begin < end; ++run) {
      const auto next = std::next(run);
      const size_t from = std::max(begin, run->begin), to = next == runs_.end() ? end : std::min(end, next->begin);
      runs.push_back({at, run->special});
      at += normalizer.Apply(text_.substr(from, to - from)).size();
    }
    // What a normalizer prepends is prepended to each of them, and should be to the first.
    const size_t borders = runs.size() - 1;
    if (borders == 0 || at < normal.size() || (at - normal.size()) % borders != 0) return whole;
    const size_t prepended = (at - normal.size()) / borders;
    for (size_t i = 1; i <= borders; ++i) runs[i].begin -= std::min(runs[i].begin, prepended * (i - 1));
    whole.runs_ = std::move(runs);
    return whole;
  }

 private:
  // Segments in a row that are alike.
  struct Run {
    size_t begin;
    bool special;
  };
  Layout() = default;

  void Append(const std::string& text, bool special) {
    if (text.empty()) return;
    if (runs_.empty() || runs_.back().special != special) runs_.push_back({text_.size(), special});
    text_ += text;
  }
  std::vector<Run>::const_iterator RunAt(size_t at) const {
    const auto after = std::ranges::upper_bound(runs_, at, {}, &Run::begin);
    return after == runs_.begin() ? after : std::prev(after);
  }

  std::string text_;
  std::vector<Run> runs_;
};

class BpeTokenizer final : public Tokenizer {
 public:
  absl::Status Parse(const Json& root) {
    if (IsSet(root, "truncation")) {
      return InvalidArgument("truncation is set: not supported (the server limits prompts)");
    }
    if (IsSet(root, "padding")) return InvalidArgument("padding is set: not supported");
    RETURN_IF_ERROR(model_.Parse(Member(root, "model")));
    if (IsSet(root, "normalizer")) RETURN_IF_ERROR(normalizer_.Add(root["normalizer"]));
    RETURN_IF_ERROR(added_.Parse(List(root, "added_tokens"), normalizer_));
    if (IsSet(root, "pre_tokenizer")) RETURN_IF_ERROR(pre_tokenizer_.Add(root["pre_tokenizer"]));
    if (IsSet(root, "post_processor")) RETURN_IF_ERROR(ParsePostProcessor(root["post_processor"]));
    if (IsSet(root, "decoder")) RETURN_IF_ERROR(ParseDecoder(root["decoder"]));
    FillTokenBytes();
    return absl::OkStatus();
  }

  void ParseConfig(const Json& config) {
    const auto id_of = [&](const char* name) {
      const Json& token = Member(config, name);
      return TokenId(token.is_object() ? Text(token, "content") : Text(config, name));
    };
    bos_ = id_of("bos_token");
    eos_ = id_of("eos_token");
    chat_template_ = Text(config, "chat_template");
  }

  std::vector<int32_t> EncodeSegments(std::span<const Segment> segments, bool add_special_tokens) const override {
    std::vector<int32_t> ids;
    if (add_special_tokens) ids = prefix_;
    const Layout layout(segments);
    const auto token = [&](int32_t id) { ids.push_back(id); };
    const auto word = [&](std::string_view w) { model_.Encode(w, ids); };
    added_.Split(
        layout.text(), /*normalized=*/false, [&](size_t begin, size_t end) { return layout.Special(begin, end); },
        [&](std::string_view raw) {
          const size_t at = raw.data() - layout.text().data();
          const std::string normal = normalizer_.Apply(std::string(raw));
          std::optional<Layout> normalized;  // made where it is asked for: few tokenizers have such special tokens
          added_.Split(
              normal, /*normalized=*/true,
              [&](size_t begin, size_t end) {
                if (!normalized) normalized = layout.Normalized(at, at + raw.size(), normalizer_, normal);
                return normalized->Special(begin, end);
              },
              [&](std::string_view plain) {
                pre_tokenizer_.Split(plain, at == 0 && plain.data() == normal.data(), word);
              },
              token);
        },
        token);
    if (add_special_tokens) ids.insert(ids.end(), suffix_.begin(), suffix_.end());
    return ids;
  }

  int32_t vocab_size() const override { return static_cast<int32_t>(bytes_.size()); }
  std::optional<int32_t> TokenId(std::string_view token) const override {
    for (const auto& [id, added] : added_.tokens()) {
      if (added.content == token) return id;
    }
    const auto it = model_.vocab.find(std::string(token));
    if (it == model_.vocab.end()) return std::nullopt;
    return it->second;
  }
  std::string_view TokenBytes(int32_t id) const override {
    return id >= 0 && id < vocab_size() ? std::string_view(bytes_[id]) : std::string_view();
  }
  bool IsSpecial(int32_t id) const override { return added_.IsSpecial(id); }
  bool strips_leading_space() const override { return strip_leading_space_; }
  std::optional<int32_t> bos_id() const override { return bos_; }
  std::optional<int32_t> eos_id() const override { return eos_; }
  const std::string& chat_template() const override { return chat_template_; }

 private:
  absl::Status ParsePostProcessor(const Json& component) {
    const std::string type = TypeOf(component);
    if (type == "ByteLevel") return absl::OkStatus();  // trims offsets only
    if (type == "Sequence") {
      for (const Json& part : List(component, "processors")) RETURN_IF_ERROR(ParsePostProcessor(part));
      return absl::OkStatus();
    }
    if (type != "TemplateProcessing") return InvalidArgument("post_processor '{}' is not supported", type);
    std::vector<int32_t>* side = &prefix_;
    for (const Json& piece : List(component, "single")) {
      if (IsSet(piece, "Sequence")) {
        side = &suffix_;
        continue;
      }
      const std::string name = Text(Member(piece, "SpecialToken"), "id");
      const Json& ids = Member(Member(Member(component, "special_tokens"), name.c_str()), "ids");
      if (!ids.is_array()) return InvalidArgument("post_processor: special token '{}' has no ids", name);
      for (const Json& id : ids) {
        ASSIGN_OR_RETURN(const int32_t value,
                         ToTokenId(id, fmt::format("post_processor: id of special token '{}'", name)));
        side->push_back(value);
      }
    }
    return absl::OkStatus();
  }

  absl::Status ParseDecoder(const Json& component) {
    const std::string type = TypeOf(component);
    if (type == "Sequence") {
      for (const Json& part : List(component, "decoders")) RETURN_IF_ERROR(ParseDecoder(part));
    } else if (type == "ByteLevel") {
      decode_byte_level_ = true;
    } else if (type == "ByteFallback") {
      decode_bytes_ = true;
    } else if (type == "Replace") {
      const std::string from = Text(Member(component, "pattern"), "String");
      if (from.empty()) return InvalidArgument("decoder Replace: only String patterns are supported");
      decode_replace_.emplace_back(from, Text(component, "content"));
    } else if (type == "Metaspace") {
      decode_replace_.emplace_back(IsSet(component, "replacement") ? Text(component, "replacement") : "▁", " ");
      if (decode_replace_.back().first.empty()) return InvalidArgument("decoder Metaspace: replacement is empty");
      const std::string scheme = Text(component, "prepend_scheme");
      strip_leading_space_ = scheme.empty() ? Flag(component, "add_prefix_space", true) : scheme != "never";
    } else if (type == "Strip") {
      if (Text(component, "content") != " " || Member(component, "start") != 1 || Member(component, "stop") != 0) {
        return InvalidArgument("decoder Strip: only one leading space is supported, found {}",
                               component.dump(-1, ' ', false, Json::error_handler_t::replace));
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
    for (const auto& [id, added] : added_.tokens()) size = std::max(size, id + 1);
    bytes_.resize(size);
    // As the tokenizers library spells a token before it decodes it: normalized, if it is looked for so.
    for (const auto& [token, id] : model_.vocab) bytes_[id] = token;
    for (const auto& [id, added] : added_.tokens()) bytes_[id] = added.pattern;
    for (std::string& bytes : bytes_) {
      for (const auto& [from, to] : decode_replace_) bytes = ReplaceAll(bytes, from, to);
      if (decode_byte_level_) bytes = FromByteLevel(bytes);
    }
    if (decode_bytes_) {
      for (int b = 0; b < 256; ++b) {
        if (model_.byte_ids[b] >= 0) bytes_[model_.byte_ids[b]] = std::string(1, static_cast<char>(b));
      }
    }
  }

  BpeModel model_;
  Normalizer normalizer_;
  AddedTokens added_;
  PreTokenizer pre_tokenizer_;
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
    tokenizer->ParseConfig(config);
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
  if (!bytes.empty() && at_start_) {
    if (tokenizer_.strips_leading_space() && bytes.starts_with(' ')) bytes.remove_prefix(1);
    at_start_ = false;
  }
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
