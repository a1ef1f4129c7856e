// BlockPool: hands out, shares and evicts the KV block ids of one home. Owns no memory and knows no sequence.
//
// A block is free (content unknown), used (referenced by at least one block table) or cached (not referenced, content
// known, evicted in least-recently-used order when the free ones run out). A full block whose token ids are known can
// be registered; its key is exact, not only a hash: (chain id of the block before it, its token ids; for the first
// block also the salt). So no collision can ever give the key and value rows of another prefix.
#ifndef SOLOIST_SCHEDULER_BLOCK_POOL_H_
#define SOLOIST_SCHEDULER_BLOCK_POOL_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"

namespace soloist {

// Names one exact prefix of full blocks within one pool: given once, never reused. 0: the empty prefix.
using ChainId = uint64_t;

// One thread at a time.
class BlockPool {
 public:
  // `prefix_cache` false: Match finds nothing and Register keeps nothing.
  BlockPool(int32_t num_blocks, int32_t block_size, bool prefix_cache);

  // How many leading blocks of `tokens` are known; takes no reference. O(tokens found).
  int32_t CountCached(std::span<const int32_t> tokens, std::string_view salt, int32_t max_blocks) const;
  // Appends the longest known run of leading blocks, at most `max_blocks`, to `blocks`, each referenced once more.
  // Returns the chain id after the last of them.
  ChainId Match(std::span<const int32_t> tokens, std::string_view salt, int32_t max_blocks,
                std::vector<int32_t>& blocks);
  // Appends `count` blocks with one reference each; false, and nothing taken, if available() < count.
  bool Allocate(int32_t count, std::vector<int32_t>& blocks);
  // Drops one reference of each and clears the vector. The last ones are evicted first later, so that a prefix never
  // loses its beginning before its end.
  void Release(std::vector<int32_t>& blocks);
  // Makes a referenced block findable: it holds `tokens` (block_size of them) after the prefix `parent`. Returns the
  // chain id after it. If an equal block is registered already, that one stays and its chain id is returned.
  ChainId Register(ChainId parent, std::span<const int32_t> tokens, std::string_view salt, int32_t block);
  // Takes registrations back: the blocks do not hold what was said. Those that are not registered are left alone.
  void Unregister(std::span<const int32_t> blocks);
  // The memory's content is gone: every block is free, nothing is known. All tables are void.
  void Clear();

  int32_t total() const { return static_cast<int32_t>(blocks_.size()); }
  int32_t cached() const { return num_cached_; }
  int32_t available() const { return static_cast<int32_t>(free_.size()) + num_cached_; }
  int32_t used() const { return total() - available(); }
  int32_t block_size() const { return block_size_; }

  // Every block in exactly one of the three states, lists and index consistent, references equal to the number of
  // times that a block stands in `tables`. INTERNAL names the first block that is wrong. O(blocks + tables).
  absl::Status CheckIntegrity(std::span<const std::vector<int32_t>* const> tables) const;

 private:
  struct Block {
    int32_t refs = 0;
    int32_t newer = -1, older = -1;  // neighbours in the list of cached blocks
    uint64_t hash = 0;
    ChainId parent = 0;
    ChainId chain = 0;  // 0: content unknown
    std::string salt;   // of the chain's first block only
  };

  uint64_t Hash(ChainId parent, std::span<const int32_t> tokens, std::string_view salt) const;
  int32_t Find(uint64_t hash, ChainId parent, std::span<const int32_t> tokens, std::string_view salt) const;
  std::span<const int32_t> TokensOf(int32_t block) const;
  void PushCached(int32_t block);
  void UnlinkCached(int32_t block);
  void Forget(int32_t block);

  const int32_t block_size_;
  const bool prefix_cache_;
  std::vector<Block> blocks_;
  std::vector<int32_t> tokens_;  // [num_blocks, block_size] of registered blocks
  std::vector<int32_t> free_;
  int32_t newest_ = -1, oldest_ = -1;  // cached blocks
  int32_t num_cached_ = 0;
  ChainId next_chain_ = 1;
  std::unordered_multimap<uint64_t, int32_t> index_;
};

}  // namespace soloist

#endif  // SOLOIST_SCHEDULER_BLOCK_POOL_H_
