#include "server/tokenizer/bpe.h"

#include <queue>
#include <tuple>

#include "base/status.h"
#include "server/tokenizer/utf8.h"

namespace soloist {
namespace {

constexpr uint64_t Pair(int32_t left, int32_t right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

struct Symbol {
  int32_t id;  // -1: merged away
  int32_t previous;
  int32_t next;
};

// The lowest rank first, then the leftmost.
struct Candidate {
  int32_t rank;
  int32_t left;
  int32_t left_id;
  int32_t right_id;
  bool operator>(const Candidate& other) const { return std::tie(rank, left) > std::tie(other.rank, other.left); }
};

}  // namespace

absl::Status BpeModel::Parse(const Json& model) {
  if (!model.is_object()) return InvalidArgument("model is missing");
  const std::string type = IsSet(model, "type") ? TypeOf(model) : "BPE";
  if (type != "BPE") return InvalidArgument("model type '{}' is not supported, only BPE", type);
  for (const char* name : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json& value = Member(model, name);
    const bool off = value.is_null() || value == 0 || (value.is_string() && value.get<std::string>().empty());
    if (!off) {
      return InvalidArgument("model.{} is {}: not supported", name,
                             value.dump(-1, ' ', false, Json::error_handler_t::replace));
    }
  }
  if (!IsSet(model, "vocab") || !model["vocab"].is_object()) return InvalidArgument("model.vocab is missing");
  for (const auto& [token, id] : model["vocab"].items()) {
    ASSIGN_OR_RETURN(vocab[token], ToTokenId(id, fmt::format("model.vocab['{}']", token)));
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
    const auto a = vocab.find(left), b = vocab.find(right), merged = vocab.find(left + right);
    if (a == vocab.end() || b == vocab.end() || merged == vocab.end()) {
      return InvalidArgument("model.merges[{}]: '{}' + '{}' is not in the vocabulary", rank, left, right);
    }
    merges.try_emplace(Pair(a->second, b->second), Merge{rank, merged->second});
    ++rank;
  }
  byte_fallback = Flag(model, "byte_fallback", false);
  fuse_unk = Flag(model, "fuse_unk", false);
  ignore_merges = Flag(model, "ignore_merges", false);
  if (IsSet(model, "unk_token")) {
    const auto it = vocab.find(Text(model, "unk_token"));
    if (it == vocab.end())
      return InvalidArgument("model.unk_token {} is not in the vocabulary", model["unk_token"].dump());
    unk_id = it->second;
  }
  for (int b = 0; b < 256; ++b) {
    const auto it = vocab.find(fmt::format("<0x{:02X}>", b));
    byte_ids[b] = it == vocab.end() ? -1 : it->second;
  }
  return absl::OkStatus();
}

void BpeModel::Encode(std::string_view word, std::vector<int32_t>& ids) const {
  if (ignore_merges) {
    if (const auto it = vocab.find(std::string(word)); it != vocab.end()) {
      ids.push_back(it->second);
      return;
    }
  }
  std::vector<Symbol> symbols;
  const auto push = [&](int32_t id) {
    const auto at = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  };
  bool after_unknown = false;
  for (std::string_view rest = word; !rest.empty();) {
    const size_t length = NextUtf8(rest).bytes;
    const std::string character(rest.substr(0, length));
    rest.remove_prefix(length);
    if (const auto it = vocab.find(character); it != vocab.end()) {
      push(it->second);
      after_unknown = false;
      continue;
    }
    bool has_bytes = byte_fallback;
    for (const char c : character) has_bytes = has_bytes && byte_ids[static_cast<unsigned char>(c)] >= 0;
    if (has_bytes) {
      for (const char c : character) push(byte_ids[static_cast<unsigned char>(c)]);
      after_unknown = false;
    } else if (unk_id >= 0 && !(fuse_unk && after_unknown)) {
      push(unk_id);
      after_unknown = true;
    }
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto consider = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    const int32_t a = symbols[left].id, b = symbols[symbols[left].next].id;
    if (const auto it = merges.find(Pair(a, b)); it != merges.end()) queue.push({it->second.rank, left, a, b});
  };
  for (int32_t i = 0; i + 1 < static_cast<int32_t>(symbols.size()); ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.left];
    // Stale if either side has been merged since.
    if (left.id != best.left_id || left.next < 0 || symbols[left.next].id != best.right_id) continue;
    Symbol& right = symbols[left.next];
    left.id = merges.at(Pair(best.left_id, best.right_id)).id;
    right.id = -1;
    left.next = right.next;
    if (right.next >= 0) symbols[right.next].previous = best.left;
    consider(left.previous);
    consider(best.left);
  }
  for (int32_t i = 0; i >= 0; i = symbols[i].next) ids.push_back(symbols[i].id);
}

}  // namespace soloist
