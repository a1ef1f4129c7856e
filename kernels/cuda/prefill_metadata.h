// What cuDNN's attention over ragged chunks reads from device memory besides q, keys and values, and the copy of an FP8
// cache that it can read. Small kernels in front of each call.
#ifndef SOLOIST_KERNELS_CUDA_PREFILL_METADATA_H_
#define SOLOIST_KERNELS_CUDA_PREFILL_METADATA_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/tensor.h"

namespace soloist::cuda {

// Most slots (the batch of a plan), and sequences, of one call.
inline constexpr int kMaxPrefillSlots = 64;
// Chunks are cut into pieces of so many rows, each of which is a sequence of its own to cuDNN, so that one plan serves
// chunks of all lengths. It costs nothing that can be measured. (Longest keys first instead of in the order of the rows
// took 4 to 7% less time for 8192 rows, but cuDNN is not documented to take offsets that are not ascending.)
inline constexpr int kPrefillPieceRows = 2048;

// Sequence s has rows [query_starts[s], query_starts[s + 1]) of q, the last of seq_lens[s] positions.
struct PrefillMetadataArgs {
  // Device memory, as in AttentionArgs, from the first sequence on.
  const int32_t* query_starts = nullptr;  // [num_sequences + 1]
  const int32_t* seq_lens = nullptr;      // [num_sequences] 0: padding
  const int32_t* block_tables = nullptr;  // [num_sequences, max_blocks]
  int num_sequences = 0;
  int max_blocks = 0;
  int block_size = 0;
  int row_elements = 0;  // num_heads * head_dim
  int table_width = 0;   // of `table`; >= blocks of the longest sequence
  int pitch = 0;  // 0: the block ids of block_tables; else block j of sequence i is i * pitch + j, as in GatherKv
  // Written, device memory. Slots without a piece get no rows and no keys. Table entries behind a piece's keys repeat
  // the last block, as far as cuDNN reads them.
  int slots = 0;                   // >= the number of pieces
  int32_t* rows = nullptr;         // [slots]
  int32_t* keys = nullptr;         // [slots]
  int64_t* row_offsets = nullptr;  // [slots + 1] elements from the start of q (and of out)
  int32_t* table = nullptr;        // [slots, table_width]
  // Not null: the slots of a sequence's last block behind its keys are zeroed, [num_blocks, num_kv_heads, block_size,
  // head_dim]. cuDNN multiplies what is there by 0, which is NaN if an earlier owner of the block left one.
  BFloat16* values = nullptr;
  int num_kv_heads = 0;
  int head_dim = 0;  // a multiple of 8
};

// Grid [slots, 1 + num_kv_heads] (the latter without `values`: 1) of 256 threads. bytes: the used table entries once,
// per piece, and the zeros. Errors: cudaErrorInvalidValue beyond kMaxPrefillSlots.
cudaError_t WritePrefillMetadata(const PrefillMetadataArgs& args, cudaStream_t stream);

struct GatherKvArgs {
  const void* keys = nullptr;      // F8E4M3 [num_blocks, num_kv_heads, block_size, head_dim]
  const void* values = nullptr;    // the same
  BFloat16* keys_out = nullptr;    // [num_sequences * pitch, num_kv_heads, block_size, head_dim]
  BFloat16* values_out = nullptr;  // the same
  int num_kv_heads = 0;
  int block_size = 0;
  int head_dim = 0;  // a multiple of 8
  const int32_t* seq_lens = nullptr;
  const int32_t* block_tables = nullptr;  // [num_sequences, max_blocks]
  int num_sequences = 0;
  int max_blocks = 0;
  int pitch = 0;  // >= blocks of the longest sequence
};

// Block j of sequence i, for each block that has keys, to block i * pitch + j of the copy, exactly; zeros behind the
// last key. bytes: 3 per element. Grid [pitch, num_sequences, 2] of 256 threads.
cudaError_t GatherKv(const GatherKvArgs& args, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_PREFILL_METADATA_H_
