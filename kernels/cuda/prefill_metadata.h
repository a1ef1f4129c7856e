// What cuDNN's attention over ragged chunks reads from device memory besides q, keys and values, and the copy of an FP8
// cache that it can read. Two small kernels in front of each call.
#ifndef SOLOIST_KERNELS_CUDA_PREFILL_METADATA_H_
#define SOLOIST_KERNELS_CUDA_PREFILL_METADATA_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/tensor.h"

namespace soloist::cuda {

// Sequence s has rows [query_starts[s], query_starts[s + 1]) of q, the last of seq_lens[s] positions.
struct PrefillMetadataArgs {
  // Device memory, as in AttentionArgs, from the first sequence on.
  const int32_t* query_starts = nullptr;  // [num_sequences + 1]
  const int32_t* seq_lens = nullptr;      // [num_sequences] 0: padding
  const int32_t* block_tables = nullptr;  // [num_sequences, max_blocks]
  int num_sequences = 0;
  int max_blocks = 0;
  int block_size = 0;
  int row_elements = 0;        // num_heads * head_dim
  int table_width = 0;         // of `table`; >= blocks of the longest sequence
  int pitch = 0;               // 0: the block ids of block_tables; else table[i, j] = i * pitch + j, as GatherKv writes
  int slots = 0;               // batch of the plan, >= num_sequences
  // Written, device memory. Slots without a sequence get no rows and no keys; table entries behind a sequence's keys
  // are 0.
  int32_t* rows = nullptr;        // [slots]
  int32_t* keys = nullptr;        // [slots]
  int64_t* row_offsets = nullptr; // [slots + 1] elements from the start of q (and of out)
  int32_t* table = nullptr;       // [slots, table_width]
};

// One block of 256 threads per slot. bytes: the used table entries once, the whole of `table` written. Errors:
// cudaErrorInvalidValue for num_sequences > slots.
cudaError_t WritePrefillMetadata(const PrefillMetadataArgs& args, cudaStream_t stream);

struct GatherKvArgs {
  const void* keys = nullptr;    // F8E4M3 [num_blocks, block_elements]
  const void* values = nullptr;  // the same
  BFloat16* keys_out = nullptr;    // [num_sequences * pitch, block_elements]
  BFloat16* values_out = nullptr;  // the same
  int64_t block_elements = 0;      // num_kv_heads * block_size * head_dim, a multiple of 16
  const int32_t* seq_lens = nullptr;
  const int32_t* block_tables = nullptr;  // [num_sequences, max_blocks]
  int num_sequences = 0;
  int max_blocks = 0;
  int block_size = 0;
  int pitch = 0;  // >= blocks of the longest sequence
};

// Block j of sequence i, for each block that has keys, to block i * pitch + j of the copy, exactly. bytes: 3 per
// element. Grid [pitch, num_sequences, 2] of 256 threads.
cudaError_t GatherKv(const GatherKvArgs& args, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_PREFILL_METADATA_H_
