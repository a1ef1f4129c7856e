#include "kernels/cuda/skinny_gemm.h"
#include "kernels/cuda/skinny_gemm_launch.cuh"

namespace soloist::cuda {

cudaError_t skinny::TunedGemm(const SkinnyGemmArgs& args, const Tuning& tuning, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  const bool f32 = args.out_dtype == DType::kF32;
  if (args.m < 0 || args.m > kMaxSkinnyRows || args.n < 0 || args.n % 8 != 0 || args.n >= 1 << 28 || args.k <= 0 ||
      args.k % 8 != 0 || args.k >= 1 << 20 || args.x_stride % 8 != 0 || args.out_stride % 2 != 0 ||
      (!f32 && args.out_dtype != DType::kBF16) || !Aligned(args.x, 16) || !Aligned(args.w, 16) ||
      !Aligned(args.out, f32 ? 8 : 4)) {
    return cudaErrorInvalidValue;
  }
  Shape s = {};
  s.x = reinterpret_cast<const uint8_t*>(args.x);
  s.x_stride = args.x_stride * 2;
  s.out = args.out;
  s.out_stride = args.out_stride;
  s.n = static_cast<int>(args.n);
  s.k = static_cast<int>(args.k);
  s.epilogue = SkinnyEpilogue::kNone;
  s.out_f32 = f32;
  return LaunchJobs<DenseJobs>(s, {reinterpret_cast<const uint8_t*>(args.w), args.m}, args.m, 1, tuning, stream);
}

cudaError_t SkinnyGemm(const SkinnyGemmArgs& args, cudaStream_t stream) {
  return skinny::TunedGemm(args, skinny::Tuning{}, stream);
}

}  // namespace soloist::cuda
