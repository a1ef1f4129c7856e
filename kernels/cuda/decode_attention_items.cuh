// How decode attention cuts its work: rows into chunks of keys, chunks into items, shared memory into parts.
#ifndef SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_ITEMS_CUH_
#define SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_ITEMS_CUH_

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace soloist::cuda::decode {

constexpr int kConsumerWarps = 4;  // take 16 or 32 keys of a tile each
constexpr int kFinisherWarps = 2;  // make results of the consumers' sums
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kFinishers = 32 * kFinisherWarps;
constexpr int kThreads = kConsumers + kFinishers + 32;  // and one warp that feeds the pipeline
constexpr int kChunkKeys = 512;                         // of a row that needs no more than kMaxChunks of them; and
constexpr int kManyChunkKeys = 1024;                    // where the pairs alone fill the device
constexpr int kFewChunkKeys = 256;                      // where they leave most of it idle
constexpr int kMaxChunks = 64;                          // of one row
constexpr int kMaxGroup = 16;                           // heads per kv head
constexpr int kMaxPairs = 1 << 16;                      // rows * kv heads

// Keys of one pipeline stage: its keys, and its values, take up to 16 KB each.
__host__ __device__ constexpr int TileKeys(int head_dim, int element_bytes) {
  return head_dim * element_bytes > 128 ? 64 : 128;
}

// Chunk size of a row that sees `keys` keys; they then touch at most kMaxChunks chunks, wherever they begin.
__host__ __device__ inline int64_t ChunkKeys(int64_t keys, int64_t chunk_keys) {
  while (keys > chunk_keys * (kMaxChunks - 1)) chunk_keys *= 2;
  return chunk_keys;
}
// Chunks of a row of `len` keys of which those from `begin` on are seen. A last one that would have no more than a
// quarter of a chunk belongs to the one before it.
__device__ __forceinline__ int NumChunks(int begin, int len, int chunk_keys) {
  const int first = begin / chunk_keys, last = (len - 1) / chunk_keys;
  const bool short_last = last > first && len - last * chunk_keys <= chunk_keys / 4;
  return last - first + (short_last ? 0 : 1);
}
// Bound of the chunks of any row of up to max_len keys.
inline int MaxChunks(int64_t max_len, int chunk_keys) {
  const int64_t chunks = (max_len + chunk_keys - 1) / chunk_keys + 1;
  return static_cast<int>(chunks < kMaxChunks ? chunks : kMaxChunks);
}

// What a kernel is told. Lives in constant memory.
struct Params {
  CUtensorMap keys;  // [num_blocks * kv_heads * block_size, head_dim]; boxes of one tile or block, 128 bytes wide
  CUtensorMap values;
  const __nv_bfloat16* q;
  int64_t q_stride;
  const int32_t* kv_lens;
  const int32_t* block_tables;
  __nv_bfloat16* out;
  int64_t out_stride;
  int32_t* next_item;  // [2] items drawn; blocks that are done. Zero between launches
  int32_t* tickets;    // [num_rows * kv_heads] chunks finished. Zero between launches
  float* partial_o;    // [num_rows * kv_heads, max_chunks, group, head_dim] sums of a chunk, relative to its max
  float2* partial_ml;  // [num_rows * kv_heads, max_chunks, group] max and sum of a chunk
  uint64_t policy;     // L2 policy for keys and values
  int max_blocks;
  int max_len;
  int num_rows;
  int kv_heads;
  int group;  // heads per kv head
  int block_shift;
  int window;
  int chunk_keys;
  int max_chunks;
  int stages;
  bool early_tables;
  bool prefetch;     // with early_tables
  float scale_log2;  // scale * log2(e)
};

// One chunk of one (row, kv head): keys [begin, end). row < 0: no more items.
struct alignas(32) Item {
  int row, head;
  int chunk, num_chunks;
  int begin, end;
};

// The barriers of a stage: keys have arrived, and at these distances from it, the others.
constexpr int kFullValues = 8;
constexpr int kEmptyKeys = 16;
constexpr int kEmptyValues = 24;
constexpr int kStageBarriers = 32;
// The barriers of a result buffer: the consumers' sums are there, and the finishers have taken them.
constexpr int kEmptyResult = 8;
constexpr int kResultBarriers = 16;

// Byte offsets within shared memory. The tiles need 1024-byte alignment.
struct SharedLayout {
  int tile_bytes;  // of keys or values
  int q_bytes;
  int results;   // buffers of results, each [kConsumerWarps, group, o_stride] and [kConsumerWarps, kMaxGroup]
  int o_stride;  // floats
  int o_bytes;   // of a result
  int q, o, ml, items, result_items, stage_barriers, result_barriers, flags, entries, rows, total;

  __host__ __device__ SharedLayout(int stages, int group, int head_dim, int element_bytes, int num_rows) {
    tile_bytes = TileKeys(head_dim, element_bytes) * head_dim * element_bytes;
    q_bytes = group * head_dim * 2;
    results = group <= 4 ? 2 : 1;
    o_stride = head_dim + 4;  // heads two apart meet different banks
    o_bytes = kConsumerWarps * group * o_stride * 4;
    q = stages * 2 * tile_bytes;
    o = q + stages * q_bytes;
    ml = o + results * o_bytes;
    items = ml + results * kConsumerWarps * kMaxGroup * 8;
    result_items = items + stages * static_cast<int>(sizeof(Item));
    stage_barriers = result_items + results * static_cast<int>(sizeof(Item));
    result_barriers = stage_barriers + stages * kStageBarriers;
    flags = result_barriers + results * kResultBarriers;
    entries = flags + 16;
    rows = entries + 32 * 4;
    total = rows + (2 * num_rows + 1) * 4;
  }
};

}  // namespace soloist::cuda::decode

#endif  // SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_ITEMS_CUH_
