// Sampling on the GPU: one token for each row of logits, with the semantics of kernels/sampling.h.
#ifndef SOLOIST_KERNELS_CUDA_SAMPLE_H_
#define SOLOIST_KERNELS_CUDA_SAMPLE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/sampling.h"

namespace soloist::cuda {

// Largest vocabulary: a row lies in the shared memory of one cluster of thread blocks.
inline constexpr int64_t kMaxSampleVocab = 400'000;

// Samples args.logits.rows rows in one launch. Everything that a row asks for is read from device memory when the
// kernel runs, so that a captured launch serves any mix of greedy, filtered, penalised and log-probability rows; a row
// pays only for what it asks. A row's results are the same bits whatever the other rows are. args.logits is not
// changed. Rows are read 16 bytes at a time if args.logits.data is 16-byte aligned and its stride a multiple of 4 (the
// same holds for the writes to args.raw_logits), else 4 bytes at a time.
//
// Against the CPU backend: the same tokens, except where two candidates (or a sum of probabilities and top_p) are
// closer than the rounding of exp and log. A log-probability of raw logits that are all -inf is NaN.
//
// Reads rows * vocab * 4 bytes once. Needs no scratch memory. cudaErrorInvalidValue: logits that are not F32, or a
// vocabulary that is empty or larger than kMaxSampleVocab.
cudaError_t Sample(const SampleArgs& args, cudaStream_t stream);

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_SAMPLE_H_
