#include "server/tokenizer/bpe.h"

#include <queue>
#include <tuple>

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
