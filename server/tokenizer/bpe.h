// Byte-pair encoding (Sennrich et al. 2016) of one word, with a heap: O(n log n) in the word's length.
#ifndef SOLOIST_SERVER_TOKENIZER_BPE_H_
#define SOLOIST_SERVER_TOKENIZER_BPE_H_

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "server/tokenizer/json_access.h"

namespace soloist {

struct BpeModel {
  std::unordered_map<std::string, int32_t> vocab;  // as spelt in tokenizer.json
  struct Merge {
    int32_t rank;
    int32_t id;
  };
  std::unordered_map<uint64_t, Merge> merges;  // (left id << 32) | right id
  bool byte_fallback = false;                  // an unknown character becomes its bytes' tokens <0xXX>
  bool fuse_unk = false;                       // unknowns in a row become one
  bool ignore_merges = false;                  // a word that is in the vocabulary is that token
  int32_t unk_id = -1;                         // -1: unknown characters vanish
  std::array<int32_t, 256> byte_ids{};         // of <0xXX>; -1: none

  // tokenizer.json's "model". INVALID_ARGUMENT names what is missing, wrong or not supported.
  absl::Status Parse(const Json& model);
  // Appends the ids of `word`, well-formed UTF-8.
  void Encode(std::string_view word, std::vector<int32_t>& ids) const;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_TOKENIZER_BPE_H_
