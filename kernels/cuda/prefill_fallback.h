// Attention of ragged chunks over the paged cache by a kernel of our own: for shapes that cuDNN refuses, for an FP8
// cache without scratch, and for deterministic mode.
#ifndef SOLOIST_KERNELS_CUDA_PREFILL_FALLBACK_H_
#define SOLOIST_KERNELS_CUDA_PREFILL_FALLBACK_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/tensor.h"

namespace soloist::cuda {

// As AttentionArgs, with the pointers of the sequences that take part.
struct PrefillFallbackArgs {
  const BFloat16* q = nullptr;   // [rows, num_heads, head_dim]
  BFloat16* out = nullptr;       // the same
  const void* keys = nullptr;    // BF16 or F8E4M3 [num_blocks, num_kv_heads, block_size, head_dim]
  const void* values = nullptr;  // the same
  bool fp8 = false;
  const int32_t* query_starts = nullptr;  // [num_sequences + 1] rows of q
  const int32_t* seq_lens = nullptr;      // [num_sequences] 0: padding
  const int32_t* block_tables = nullptr;  // [num_sequences, max_blocks]
  int num_sequences = 0;
  int max_query_rows = 0;
  int max_blocks = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;  // a multiple of 8 up to 256
  int block_size = 0;
  int sliding_window = 0;  // 0: none
  float scale = 0;
};

// out = softmax(scale * q k^T, masked as in AttentionArgs) v for every row of a sequence of non-zero length. One block
// of 128 threads per 64 rows of a sequence and head; each reads the keys and values that its rows see, once. Errors:
// cudaErrorInvalidValue for a head_dim, block size or heads that it does not take.
cudaError_t RunPrefillFallback(const PrefillFallbackArgs& args, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_PREFILL_FALLBACK_H_
