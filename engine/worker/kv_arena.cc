#include "engine/worker/kv_arena.h"

#include <utility>

#include "base/status.h"

namespace soloist {

absl::StatusOr<KvArena> KvArena::Create(const ModelConfig& config, const PlanLimits& limits, DType dtype,
                                        Device& device) {
  KvArena arena;
  const int64_t slots = static_cast<int64_t>(limits.num_blocks) * limits.block_size;
  const int64_t half = slots * config.num_kv_heads * config.head_dim * DTypeBytes(dtype);
  auto memory = device.Allocate(2 * half * config.num_layers);
  if (!memory.ok()) {
    return Annotate(memory.status(),
                    fmt::format("KV cache of {} blocks of {} tokens", limits.num_blocks, limits.block_size));
  }
  arena.memory_ = *std::move(memory);
  char* at = static_cast<char*>(arena.memory_.data());
  for (int64_t layer = 0; layer < config.num_layers; ++layer, at += 2 * half) {
    arena.layers_.push_back({.keys = at,
                             .values = at + half,
                             .dtype = dtype,
                             .num_blocks = limits.num_blocks,
                             .num_kv_heads = static_cast<int>(config.num_kv_heads),
                             .block_size = limits.block_size,
                             .head_dim = static_cast<int>(config.head_dim)});
  }
  return arena;
}

}  // namespace soloist
