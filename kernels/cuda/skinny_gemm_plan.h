// How a skinny product is cut over the device: chosen on the host, from the shape alone. Included by skinny_gemm*.cu
// and by benchmarks that compare choices. What is chosen here never changes the bits of a result.
#ifndef SOLOIST_KERNELS_CUDA_SKINNY_GEMM_PLAN_H_
#define SOLOIST_KERNELS_CUDA_SKINNY_GEMM_PLAN_H_

#include "kernels/cuda/skinny_gemm.h"

namespace soloist::cuda::skinny {

// Negative: chosen by the plan.
struct Tuning {
  int cluster = -1;       // blocks of a cluster, which share k: 1, 2, 4, 8
  int ring = -1;          // stages of the ring of a block
  int ahead = -1;         // tiles of a cluster prefetched to L2 before PdlWait, beyond the ring
  int trigger_left = -1;  // PdlTrigger when so many stages are left to fetch
  int blocks = -1;        // of the grid
  int evict_first = -1;   // L2 policy of weights
};

cudaError_t TunedGemm(const SkinnyGemmArgs& args, const Tuning& tuning, cudaStream_t stream);
cudaError_t TunedExperts(const SkinnyExpertsArgs& args, const Tuning& tuning, cudaStream_t stream);

}  // namespace soloist::cuda::skinny

#endif  // SOLOIST_KERNELS_CUDA_SKINNY_GEMM_PLAN_H_
