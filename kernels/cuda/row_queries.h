// Deterministic attention: every row of a step as a query of its own, so that prefill and decode run the same kernel.
#ifndef SOLOIST_KERNELS_CUDA_ROW_QUERIES_H_
#define SOLOIST_KERNELS_CUDA_ROW_QUERIES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace soloist::cuda {

// For each row i in [0, num_rows) of the sequences that query_starts [num_sequences + 1] and seq_lens describe (device
// memory): table_rows[i] = its sequence, kv_lens[i] = keys that it sees = seq_len - (rows of its sequence after it). A
// sequence with seq_len 0 gives 0. One thread a row; sequences are found by binary search.
cudaError_t WriteRowQueries(const int32_t* query_starts, const int32_t* seq_lens, int num_sequences, int num_rows,
                            int32_t* table_rows, int32_t* kv_lens, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_ROW_QUERIES_H_
