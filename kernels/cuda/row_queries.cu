#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/row_queries.h"

namespace soloist::cuda {
namespace {

// Launch: a thread per row, blocks of 256. Moves 8 bytes a row.
__global__ void RowQueriesKernel(const int32_t* query_starts, const int32_t* seq_lens, int num_sequences, int num_rows,
                                 int32_t* table_rows, int32_t* kv_lens) {
  PdlTrigger();
  PdlWait();
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= num_rows) return;
  // The last sequence that begins at or before the row and is not empty.
  int low = 0, high = num_sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (query_starts[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  table_rows[row] = low;
  const int after = query_starts[low + 1] - 1 - row;
  kv_lens[row] = max(0, seq_lens[low] - after);
}

}  // namespace

cudaError_t WriteRowQueries(const int32_t* query_starts, const int32_t* seq_lens, int num_sequences, int num_rows,
                            int32_t* table_rows, int32_t* kv_lens, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  return Launch(RowQueriesKernel, dim3((num_rows + 255) / 256), dim3(256), 0, stream, 1, query_starts, seq_lens,
                num_sequences, num_rows, table_rows, kv_lens);
}

}  // namespace soloist::cuda
