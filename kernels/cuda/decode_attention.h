// Paged attention for rows that are one query each: decode. In deterministic mode prefill_attention.h does decode.
//
//   out[i, h, :] = sum over keys j of softmax_j(scale * q[i, h, :] . k[j, kv(h), :]) * v[j, kv(h), :]
//
// with kv(h) = h / (num_heads / num_kv_heads) and j in [max(0, kv_lens[i] - window), kv_lens[i]). Sums in float32; the
// probabilities are rounded to bfloat16 (FP8 cache: to half) before they meet the values.
//
// A row's keys are cut into chunks at multiples of a chunk size that depends on the number of keys that it sees and on
// whether the rows of the call are few, some or many for the device (not on which they are).
// A work item is one chunk of one (row, kv head); the items of all rows are dealt out to a grid that fills the device
// once, so that uneven lengths balance. Chunks of one pair meet in the workspace and are merged in order by whichever
// block finishes the pair. Hence a row's bits depend on its own q, keys, length, window, scale and the number of rows
// of the call, never on the other rows' contents or the grid.
#ifndef SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_H_
#define SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops.h"

namespace soloist::cuda {

// Most rows of one call.
constexpr int kDecodeAttentionMaxRows = 1024;

struct DecodeAttentionArgs {
  const BFloat16* q = nullptr;  // [num_rows, num_heads * head_dim], 16-byte aligned
  int64_t q_stride = 0;         // elements from row to row, a multiple of 8
  KvLayer kv;                   // BF16 or F8E4M3 (plain values, no scale)
  // Device memory, read by the kernel when it runs, so that a captured graph may be replayed with other contents:
  const int32_t* kv_lens = nullptr;       // [num_rows] keys of the row before the window is applied; 0: out row = 0
  const int32_t* block_tables = nullptr;  // [num_rows, max_blocks] block ids; only those of visible keys are read
  // Whether no kernel writes kv_lens and block_tables, but a copy in front of the step's kernels. They are
  // then read, and the first keys prefetched, while the kernels before this one still run.
  bool early_tables = false;
  int max_blocks = 0;
  int64_t max_len = 0;     // bound of kv_lens, at most max_blocks * block_size; a longer row is cut off there
  int num_rows = 0;        // at most kDecodeAttentionMaxRows
  int num_heads = 0;       // a multiple of kv.num_kv_heads
  int sliding_window = 0;  // 0: none
  float scale = 0;
  BFloat16* out = nullptr;  // [num_rows, num_heads * head_dim], 16-byte aligned
  int64_t out_stride = 0;   // a multiple of 8
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// Workspace that is enough for any call with num_rows <= max_rows and max_len <= this max_len. The caller zeroes it
// once; calls leave its counters zero. Calls that share one must run one after the other.
int64_t DecodeAttentionWorkspaceBytes(int max_rows, int64_t max_len, int num_heads, int head_dim);

// Head dimensions 64 and 128 with up to 16 heads per kv head run on tensor cores at memory speed; all others (multiples
// of 8 up to 256, any group) in a simple kernel that uses no workspace. Block size: a power of two >= 16.
// num_rows * num_kv_heads: at most 65,536.
// cudaErrorInvalidValue for anything else, for misaligned arguments and for a workspace that is too small.
cudaError_t DecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_H_
