#include "server/tokenizer/added_tokens.h"

#include <algorithm>
#include <utility>

#include "server/tokenizer/utf8.h"

namespace soloist {

absl::Status AddedTokens::Parse(const Json& list, const Normalizer& normalizer) {
  for (const Json& entry : list) {
    Token token{.content = Text(entry, "content"),
                .pattern = "",
                .special = Flag(entry, "special", false),
                .single_word = Flag(entry, "single_word", false),
                .lstrip = Flag(entry, "lstrip", false),
                .rstrip = Flag(entry, "rstrip", false)};
    token.normalized = Flag(entry, "normalized", !token.special);
    if (token.content.empty()) return InvalidArgument("added_tokens holds an entry without content");
    ASSIGN_OR_RETURN(const int32_t id,
                     ToTokenId(Member(entry, "id"), fmt::format("id of added token '{}'", token.content)));
    token.pattern = token.normalized ? normalizer.Apply(token.content) : token.content;
    tokens_[id] = std::move(token);
  }
  for (const auto& [id, token] : tokens_) {
    if (!token.pattern.empty()) by_first_[token.normalized][token.pattern[0]].push_back(id);
  }
  for (auto& by_first : by_first_) {
    for (auto& [first, ids] : by_first) {
      std::ranges::sort(ids, [this](int32_t a, int32_t b) {
        const size_t a_size = tokens_.at(a).pattern.size(), b_size = tokens_.at(b).pattern.size();
        return a_size != b_size ? a_size > b_size : a < b;
      });
    }
  }
  return absl::OkStatus();
}

// The longest token that stands at text[at], or -1.
int32_t AddedTokens::Match(std::string_view text, size_t at, bool normalized, const SpecialAt& special) const {
  const auto it = by_first_[normalized].find(text[at]);
  if (it == by_first_[normalized].end()) return -1;
  for (const int32_t id : it->second) {
    const Token& token = tokens_.at(id);
    if (!text.substr(at).starts_with(token.pattern)) continue;
    // The longest decides, also where it does not count: then its text is plain.
    if (token.special && !special(at, at + token.pattern.size())) return -1;
    const bool inside = EndsWithWord(text.substr(0, at)) || BeginsWithWord(text.substr(at + token.pattern.size()));
    return token.single_word && inside ? -1 : id;
  }
  return -1;
}

void AddedTokens::Split(std::string_view text, bool normalized, const SpecialAt& special,
                        const std::function<void(std::string_view)>& plain,
                        const std::function<void(int32_t)>& token) const {
  size_t done = 0;
  for (size_t at = 0; at < text.size() && !by_first_[normalized].empty();) {
    const int32_t id = Match(text, at, normalized, special);
    if (id < 0) {
      at += NextUtf8(text.substr(at)).bytes;
      continue;
    }
    const Token& found = tokens_.at(id);
    size_t begin = at, end = at + found.pattern.size();
    if (found.lstrip) begin -= TrailingSpace(text.substr(done, at - done));
    if (found.rstrip) end += LeadingSpace(text.substr(end));
    if (begin > done) plain(text.substr(done, begin - done));
    token(id);
    done = at = end;
  }
  if (done < text.size()) plain(text.substr(done));
}

}  // namespace soloist
