#include "kernels/cuda/skinny_gemm.h"
#include "kernels/cuda/skinny_gemm_launch.cuh"

namespace soloist::cuda {
namespace skinny {
namespace {

template <int kGroups, int kRuns>
cudaError_t LaunchExperts(Shape& s, const SkinnyExpertsArgs& args, const Tuning& tuning, cudaStream_t stream) {
  using Jobs = ExpertJobs<kGroups, kRuns>;
  typename Jobs::Params params;
  params.num_groups = args.num_groups;
  params.num_runs = 0;
  params.counts_final = args.follows_same_groups;
  int64_t most_rows = 0;  // of one run
  int64_t run_rows = 0;
  int64_t all_passes = 0;
  for (int g = 0; g < args.num_groups; ++g) {
    const ExpertRows& group = args.groups[g];
    if (group.expert < 0 || group.expert >= args.num_experts || group.row_count == nullptr)
      return cudaErrorInvalidValue;
    params.groups[g].row_count = group.row_count;
    params.groups[g].begin = group.row_begin_on_device != nullptr
                                 ? reinterpret_cast<uint64_t>(group.row_begin_on_device) | Jobs::kOnDevice
                                 : static_cast<uint64_t>(group.row_begin);
    if (g == 0 || group.expert != args.groups[g - 1].expert) {
      if (params.num_runs == kRuns) return cudaErrorInvalidValue;
      const BFloat16* w = args.w[group.expert];
      if (!Aligned(w, 16)) return cudaErrorInvalidValue;
      params.runs[params.num_runs++] = {reinterpret_cast<const uint8_t*>(w), g};
      run_rows = 0;
    }
    run_rows += group.row_capacity;
    most_rows = std::max(most_rows, run_rows);
    all_passes += (group.row_capacity + 7) / 8;
  }
  params.runs[params.num_runs].first_group = args.num_groups;
  if (most_rows == 0) return cudaSuccess;
  const int rows = static_cast<int>(std::min<int64_t>(args.expected_rows > 0 ? args.expected_rows : 8, most_rows));
  return LaunchJobs<Jobs>(s, params, rows, static_cast<int>(std::min<int64_t>(all_passes, 1 << 20)), tuning, stream);
}

}  // namespace

cudaError_t TunedExperts(const SkinnyExpertsArgs& args, const Tuning& tuning, cudaStream_t stream) {
  if (args.num_groups == 0 || args.n == 0) return cudaSuccess;
  const bool gated = args.epilogue == SkinnyEpilogue::kSiluGated;
  if (args.num_groups < 0 || args.num_groups > kMaxSkinnyGroups || args.n < 0 || args.n % (gated ? 16 : 8) != 0 ||
      args.n >= 1 << 28 || args.k <= 0 || args.k % 8 != 0 || args.k >= 1 << 20 || args.x_stride % 8 != 0 ||
      args.out_stride % 2 != 0 || !Aligned(args.x, 16) || !Aligned(args.out, 4)) {
    return cudaErrorInvalidValue;
  }
  Shape s = {};
  s.x = reinterpret_cast<const uint8_t*>(args.x);
  s.x_stride = args.x_stride * 2;
  s.out = args.out;
  s.out_stride = args.out_stride;
  s.n = static_cast<int>(args.n);
  s.k = static_cast<int>(args.k);
  s.epilogue = args.epilogue;
  s.out_f32 = false;
  // Kernel parameters are sent with each launch: the short form wherever it is enough.
  if (args.num_groups <= 32) return LaunchExperts<32, 32>(s, args, tuning, stream);
  return LaunchExperts<kMaxSkinnyGroups, kMaxSkinnyExperts>(s, args, tuning, stream);
}

}  // namespace skinny

cudaError_t SkinnyExperts(const SkinnyExpertsArgs& args, cudaStream_t stream) {
  return skinny::TunedExperts(args, skinny::Tuning{}, stream);
}

}  // namespace soloist::cuda
