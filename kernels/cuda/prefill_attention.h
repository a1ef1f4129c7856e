// PrefillAttention: causal attention of ragged chunks over the paged cache, by cuDNN where it can.
#ifndef SOLOIST_KERNELS_CUDA_PREFILL_ATTENTION_H_
#define SOLOIST_KERNELS_CUDA_PREFILL_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace soloist::cuda {

struct PrefillOptions {
  int64_t max_model_len = 0;  // longest sequence
  // Device memory for a BF16 copy of the keys and values that a call reads from an FP8 cache, in one layer: 4 *
  // num_kv_heads * head_dim bytes per key, blocks filled up. A call is cut into groups of sequences whose copies fit,
  // all taken to be as long as the longest; if not even one fits, or null: the slower kernel of our own. Used by this
  // object only.
  void* kv_scratch = nullptr;
  int64_t kv_scratch_bytes = 0;
  // Off: our own kernel for everything, 2.5 times slower. A row's bits then depend on its own query and keys only, not
  // on the other rows, the chunking, the block size or the tables: for deterministic mode, in which it has to do the
  // decode rows too (first_sequence 0), and for machines without cuDNN.
  bool use_cudnn = true;
  // Name or path of cuDNN, version 9.19 or newer. The first one opened serves the whole process.
  std::string cudnn_library = "libcudnn.so.9";
};

// One per device, which must be current in each call; used by one host thread at a time and on one stream at a time (it
// owns the metadata and the workspace that its kernels share).
class PrefillAttention {
 public:
  // Opens cuDNN. NOT_FOUND names the library if it, or what it needs, is missing; FAILED_PRECONDITION if it is too old.
  static absl::StatusOr<std::unique_ptr<PrefillAttention>> Create(const PrefillOptions& options);
  virtual ~PrefillAttention() = default;

  // Builds both plans that Run needs for calls that look like `like`: num_heads, sliding_window, scale, and kv but for
  // its pointers; the rest is ignored. 0.4 to 1.2 s for the first of a process, then some 50 ms each. Without it the
  // first Run of a kind builds its plan, and waits for the device.
  virtual absl::Status Warm(const AttentionArgs& like) = 0;

  // out = softmax(scale * q k^T, masked) v for the sequences from first_sequence on, whose rows follow each other.
  // q and out: BF16, rows consecutive in memory, head_dim a multiple of 8 up to 256; cache BF16 or F8E4M3. Rows of q
  // and out before those of first_sequence are neither read nor written, nor are those of sequences of length 0.
  // max_query_rows (up to 131072), max_seq_len and max_blocks must bound the sequences from first_sequence on, q.rows
  // their rows. Slots of a BF16 cache behind a sequence's last key, in the same block, are zeroed: a block that is not
  // full must not be shared.
  // Enqueues only (a metadata kernel, cuDNN's memset and two kernels; FP8: a copy), unless a plan has to be built, so
  // it can be captured after Warm. INVALID_ARGUMENT for shapes that no path takes.
  virtual absl::Status Run(const AttentionArgs& args, int first_sequence, cudaStream_t stream) = 0;

  // Why the last kind of call that cuDNN refused runs on our own kernel, in cuDNN's words (seen so far: a block size
  // that is no power of two). Empty: none.
  virtual std::string fallback_reason() const = 0;
};

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_PREFILL_ATTENTION_H_
