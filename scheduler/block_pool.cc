#include "scheduler/block_pool.h"

#include <algorithm>

#include "base/check.h"
#include "base/status.h"

namespace soloist {
namespace {

// Finalizer of splitmix64 (Steele et al., 2014).
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

BlockPool::BlockPool(int32_t num_blocks, int32_t block_size, bool prefix_cache)
    : block_size_(block_size), prefix_cache_(prefix_cache), blocks_(num_blocks) {
  CHECK_GT(num_blocks, 0);
  CHECK_GT(block_size, 0);
  if (prefix_cache) tokens_.resize(static_cast<size_t>(num_blocks) * block_size);
  free_.reserve(num_blocks);
  Clear();
}

void BlockPool::Clear() {
  std::ranges::fill(blocks_, Block());
  free_.clear();
  for (int32_t b = total() - 1; b >= 0; --b) free_.push_back(b);
  newest_ = oldest_ = -1;
  num_cached_ = 0;
  index_.clear();
}

uint64_t BlockPool::Hash(ChainId parent, std::span<const int32_t> tokens, std::string_view salt) const {
  uint64_t hash = Mix(parent);
  for (const int32_t token : tokens) hash = Mix(hash ^ static_cast<uint32_t>(token));
  if (parent == 0) {
    for (const char c : salt) hash = Mix(hash ^ static_cast<uint8_t>(c));
  }
  return hash;
}

std::span<const int32_t> BlockPool::TokensOf(int32_t block) const {
  return std::span<const int32_t>(tokens_).subspan(static_cast<size_t>(block) * block_size_, block_size_);
}

int32_t BlockPool::Find(uint64_t hash, ChainId parent, std::span<const int32_t> tokens, std::string_view salt) const {
  const auto [first, last] = index_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    const Block& block = blocks_[it->second];
    if (block.parent == parent && (parent != 0 || block.salt == salt) &&
        std::ranges::equal(TokensOf(it->second), tokens)) {
      return it->second;
    }
  }
  return -1;
}

int32_t BlockPool::CountCached(std::span<const int32_t> tokens, std::string_view salt, int32_t max_blocks) const {
  if (!prefix_cache_) return 0;
  ChainId chain = 0;
  const int32_t limit = std::min<int32_t>(max_blocks, tokens.size() / block_size_);
  for (int32_t i = 0; i < limit; ++i) {
    const auto part = tokens.subspan(static_cast<size_t>(i) * block_size_, block_size_);
    const int32_t block = Find(Hash(chain, part, salt), chain, part, salt);
    if (block < 0) return i;
    chain = blocks_[block].chain;
  }
  return limit;
}

ChainId BlockPool::Match(std::span<const int32_t> tokens, std::string_view salt, int32_t max_blocks,
                         std::vector<int32_t>& blocks) {
  if (!prefix_cache_) return 0;
  ChainId chain = 0;
  const int32_t limit = std::min<int32_t>(max_blocks, tokens.size() / block_size_);
  for (int32_t i = 0; i < limit; ++i) {
    const auto part = tokens.subspan(static_cast<size_t>(i) * block_size_, block_size_);
    const int32_t block = Find(Hash(chain, part, salt), chain, part, salt);
    if (block < 0) break;
    if (blocks_[block].refs++ == 0) UnlinkCached(block);
    blocks.push_back(block);
    chain = blocks_[block].chain;
  }
  return chain;
}

bool BlockPool::Allocate(int32_t count, std::vector<int32_t>& blocks) {
  if (available() < count) return false;
  for (int32_t i = 0; i < count; ++i) {
    int32_t block = oldest_;
    if (!free_.empty()) {
      block = free_.back();
      free_.pop_back();
    } else {
      UnlinkCached(block);
      Forget(block);
    }
    blocks_[block].refs = 1;
    blocks.push_back(block);
  }
  return true;
}

void BlockPool::Release(std::vector<int32_t>& blocks) {
  for (auto it = blocks.rbegin(); it != blocks.rend(); ++it) {
    Block& block = blocks_[*it];
    CHECK_GT(block.refs, 0);
    if (--block.refs > 0) continue;
    if (block.chain != 0) {
      PushCached(*it);
    } else {
      free_.push_back(*it);
    }
  }
  blocks.clear();
}

ChainId BlockPool::Register(ChainId parent, std::span<const int32_t> tokens, std::string_view salt, int32_t block) {
  if (!prefix_cache_) return 0;
  CHECK_EQ(tokens.size(), static_cast<size_t>(block_size_));
  Block& b = blocks_[block];
  CHECK_GT(b.refs, 0);
  CHECK_EQ(b.chain, 0u);
  const uint64_t hash = Hash(parent, tokens, salt);
  if (const int32_t same = Find(hash, parent, tokens, salt); same >= 0) return blocks_[same].chain;
  b.hash = hash;
  b.parent = parent;
  b.chain = next_chain_++;
  if (parent == 0) b.salt = salt;
  std::ranges::copy(tokens, tokens_.begin() + static_cast<size_t>(block) * block_size_);
  index_.emplace(hash, block);
  return b.chain;
}

void BlockPool::Unregister(std::span<const int32_t> blocks) {
  for (const int32_t block : blocks) {
    if (blocks_[block].chain == 0) continue;
    Forget(block);
    if (blocks_[block].refs > 0) continue;
    UnlinkCached(block);
    free_.push_back(block);
  }
}

void BlockPool::PushCached(int32_t block) {
  Block& b = blocks_[block];
  b.older = newest_;
  b.newer = -1;
  (newest_ >= 0 ? blocks_[newest_].newer : oldest_) = block;
  newest_ = block;
  ++num_cached_;
}

void BlockPool::UnlinkCached(int32_t block) {
  Block& b = blocks_[block];
  (b.newer >= 0 ? blocks_[b.newer].older : newest_) = b.older;
  (b.older >= 0 ? blocks_[b.older].newer : oldest_) = b.newer;
  b.newer = b.older = -1;
  --num_cached_;
}

void BlockPool::Forget(int32_t block) {
  Block& b = blocks_[block];
  const auto [first, last] = index_.equal_range(b.hash);
  index_.erase(std::find_if(first, last, [block](const auto& entry) { return entry.second == block; }));
  b.hash = b.parent = b.chain = 0;
  b.salt.clear();
}

absl::Status BlockPool::CheckIntegrity(std::span<const std::vector<int32_t>* const> tables) const {
  std::vector<int32_t> refs(blocks_.size()), states(blocks_.size());
  for (const std::vector<int32_t>* table : tables) {
    for (const int32_t block : *table) {
      if (block < 0 || block >= total()) return Internal("block pool: a table names block {} of {}", block, total());
      ++refs[block];
    }
  }
  for (const int32_t block : free_) {
    ++states[block];
    if (blocks_[block].chain != 0) return Internal("block pool: free block {} is still registered", block);
  }
  int32_t count = 0;
  for (int32_t block = oldest_, older = -1; block >= 0; older = block, block = blocks_[block].newer) {
    if (++count > num_cached_) return Internal("block pool: more cached blocks than the {} counted", num_cached_);
    if (blocks_[block].older != older) return Internal("block pool: broken list at block {}", block);
    if (blocks_[block].chain == 0) return Internal("block pool: cached block {} is not registered", block);
    ++states[block];
  }
  if (count != num_cached_) return Internal("block pool: {} cached blocks, {} counted", count, num_cached_);
  size_t registered = 0;
  for (int32_t b = 0; b < total(); ++b) {
    const Block& block = blocks_[b];
    if (block.refs != refs[b]) {
      return Internal("block pool: block {} has {} references, {} tables name it", b, block.refs, refs[b]);
    }
    if (states[b] + (block.refs > 0 ? 1 : 0) != 1) {
      return Internal("block pool: block {} with {} references is {} times free or cached", b, block.refs, states[b]);
    }
    if (block.chain == 0) continue;
    ++registered;
    if (Find(block.hash, block.parent, TokensOf(b), block.salt) != b) {
      return Internal("block pool: block {} is registered and not found", b);
    }
  }
  if (registered != index_.size()) {
    return Internal("block pool: {} registered blocks, {} in the index", registered, index_.size());
  }
  return absl::OkStatus();
}

}  // namespace soloist
