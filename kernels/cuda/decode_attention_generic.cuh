// Decode attention for any head dimension that is a multiple of 8 up to 256.
#ifndef SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_GENERIC_CUH_
#define SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_GENERIC_CUH_

#include "kernels/cuda/decode_attention.h"

namespace soloist::cuda::decode {

// The arguments are valid. Uses no workspace.
cudaError_t LaunchGeneric(const DecodeAttentionArgs& args, cudaStream_t stream);

}  // namespace soloist::cuda::decode

#endif  // SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_GENERIC_CUH_
