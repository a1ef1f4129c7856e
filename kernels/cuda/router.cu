// Route: residual += delta; normed = RMSNorm(residual); logits = normed * gate^T; top-k and softmax over the chosen.
//
// Launch: a block of 512 threads per kRows rows (1 in decode; 4 with many rows, so that the gate is read once for
// four). Thread t holds columns 8 t .. 8 t + 7 (and those 4,096 further, and so on) of the block's rows in registers.
// Experts are taken 16 at a time: each thread's products, a shuffle tree within warps, one sum over warps in shared
// memory; logits then lie in shared memory, where a warp per row chooses. The order of all sums depends on hidden
// alone. Bytes per row: 4 + 2 read and 4 + 2 written, times hidden; the gate (2 * experts * hidden) once per block,
// from L2. In decode the first 16 experts' gate is in registers before PdlWait.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/token_ops.h"
#include "kernels/cuda/token_vectors.cuh"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPass = 16;  // experts of one pass
constexpr int kMaxRouteExperts = 512;
constexpr int kMaxRouteTopK = 16;

struct RouteParams {
  float* residual;
  int64_t residual_stride;
  const BFloat16* delta;  // null: nothing is added
  int64_t delta_stride;
  const float* norm_weight;
  float eps;
  BFloat16* normed;
  int64_t normed_stride;
  const BFloat16* gate;
  int64_t gate_stride;
  int num_experts;
  const int32_t* num_rows;
  int32_t* experts;
  int64_t experts_stride;
  float* weights;
  int64_t weights_stride;
  int top_k;
  int n;
  int hidden;
};

// Best logit first, the lower id on a tie.
struct Candidate {
  float logit;
  int expert;
};
__device__ __forceinline__ Candidate Better(Candidate a, Candidate b) {
  return b.logit > a.logit || (b.logit == a.logit && b.expert < a.expert) ? b : a;
}

// One warp chooses for one row; `logits` [num_experts] in shared memory.
__device__ void ChooseExperts(const RouteParams& p, int row, bool padding, const float* logits) {
  const int lane = threadIdx.x % 32;
  int32_t* experts = p.experts + row * p.experts_stride;
  float* weights = p.weights + row * p.weights_stride;
  if (padding) {
    if (lane < p.top_k) {
      experts[lane] = -1;
      weights[lane] = 0;
    }
    return;
  }
  float mine = 0;  // the logit of choice `lane`
  float max = 0, sum = 0;
  uint32_t taken = 0;  // bit i: expert lane + 32 i has been chosen
  for (int choice = 0; choice < p.top_k; ++choice) {
    Candidate best = {-INFINITY, 0x7fffffff};
    for (int e = lane; e < p.num_experts; e += 32) {
      if ((taken >> (e / 32) & 1) != 0) continue;
      // A NaN counts as the least of all.
      best = Better(best, {isnan(logits[e]) ? -INFINITY : logits[e], e});
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const Candidate other = {__shfl_xor_sync(kFullWarp, best.logit, offset),
                               __shfl_xor_sync(kFullWarp, best.expert, offset)};
      best = Better(best, other);
    }
    if (best.expert % 32 == lane) taken |= 1u << (best.expert / 32);
    if (choice == 0) max = best.logit;
    if (lane == choice) {
      experts[choice] = best.expert;
      mine = best.logit;
    }
  }
  for (int choice = 0; choice < p.top_k; ++choice) sum += expf(__shfl_sync(kFullWarp, mine, choice) - max);
  if (lane < p.top_k) weights[lane] = expf(mine - max) / sum;
}

template <int kRows, int kVectors>
__global__ __launch_bounds__(kThreads, 1) void RouteKernel(const RouteParams p) {
  extern __shared__ float logits[];  // [kRows][num_experts], then [kRows][kWarps][kPass + 1] partial sums
  float* partials = logits + kRows * p.num_experts;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  PdlTrigger();
  const auto column = [&](int v) { return (v * kThreads + thread) * kVector; };
  constexpr bool kHold = kRows == 1 && kVectors == 1;
  uint4 held[kHold ? kPass : 1];
  if constexpr (kHold) {
#pragma unroll
    for (int e = 0; e < kPass; ++e) {
      held[e] = LoadConstant16(p.gate + e * p.gate_stride + column(0), e < p.num_experts && column(0) < p.hidden);
    }
  }
  PdlWait();
  const int valid = p.num_rows != nullptr ? LoadInt(p.num_rows) : p.n;
  const int first_row = blockIdx.x * kRows;

  // x, then x * weight, of the block's rows.
  Floats x[kRows][kVectors];
  float squares[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    squares[r] = 0;
    const int row = first_row + r;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[r][v] = Floats{};
      if (row >= p.n || column(v) >= p.hidden) continue;
      float* residual = p.residual + row * p.residual_stride + column(v);
      x[r][v] = LoadFloats(residual);
      if (p.delta != nullptr) {
        const Floats delta = WidenBf16(Load16(p.delta + row * p.delta_stride + column(v)));
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[r][v][i] += delta[i];
        StoreFloats(residual, x[r][v]);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares[r] = fmaf(x[r][v][i], x[r][v][i], squares[r]);
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const Floats weight = LoadConstants(p.norm_weight + column(v), column(v) < p.hidden);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[r][v][i] *= weight[i];
    }
  }

  const auto warp_sum = [](float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
    return value;
  };
  constexpr int kPitch = kPass + 1;
  const auto partial = [&](int r, int w, int i) -> float& { return partials[(r * kWarps + w) * kPitch + i]; };
  float scale[kRows];
  for (int begin = 0; begin < p.num_experts; begin += kPass) {
#pragma unroll
    for (int e = 0; e < kPass; ++e) {
      float dot[kRows] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        uint4 packed;
        if constexpr (kHold) {
          packed = held[e];
        } else {
          packed = LoadConstant16(p.gate + (begin + e) * p.gate_stride + column(v),
                                  begin + e < p.num_experts && column(v) < p.hidden);
        }
        const Floats gate = WidenBf16(packed);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) dot[r] = fmaf(x[r][v][i], gate[i], dot[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float sum = warp_sum(dot[r]);
        if (lane == 0) partial(r, warp, e) = sum;
      }
      if constexpr (kHold) {
        // The next pass's gate is on its way while this one is added up.
        held[e] = LoadConstant16(p.gate + (begin + kPass + e) * p.gate_stride + column(0),
                                 begin + kPass + e < p.num_experts && column(0) < p.hidden);
      }
    }
    if (begin == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float sum = warp_sum(squares[r]);
        if (lane == 0) partial(r, warp, kPass) = sum;
      }
    }
    __syncthreads();
    if (begin == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += partial(r, w, kPass);
        scale[r] = rsqrtf(sum / static_cast<float>(p.hidden) + p.eps);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (thread < kPass && begin + thread < p.num_experts) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += partial(r, w, thread);
        logits[r * p.num_experts + begin + thread] = sum * scale[r];
      }
    }
    __syncthreads();
  }

  if (warp < kRows && first_row + warp < p.n) {
    ChooseExperts(p, first_row + warp, first_row + warp >= valid, logits + warp * p.num_experts);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (first_row + r >= p.n || column(v) >= p.hidden) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[r][v][i] *= scale[r];
      Store16(p.normed + (first_row + r) * p.normed_stride + column(v), NarrowBf16(x[r][v]));
    }
  }
}

template <int kRows, int kVectors>
cudaError_t LaunchRoute(const RouteParams& params, cudaStream_t stream) {
  const int shared = kRows * (params.num_experts + kWarps * (kPass + 1)) * static_cast<int>(sizeof(float));
  return Launch(RouteKernel<kRows, kVectors>, dim3((params.n + kRows - 1) / kRows), dim3(kThreads), shared, stream, 1,
                params);
}

}  // namespace

cudaError_t Route(const RouteArgs& args, cudaStream_t stream) {
  const int64_t n = args.residual.rows, hidden = args.residual.cols;
  const int64_t num_experts = args.gate.rows, top_k = args.experts.cols;
  if (n == 0) return cudaSuccess;
  if (n > INT32_MAX / 2 || hidden > kMaxHidden || !IsVectors(args.residual, DType::kF32, hidden) ||
      !IsVectors(args.norm_weight, DType::kF32, hidden) || !IsVectors(args.normed, DType::kBF16, hidden) ||
      args.normed.rows < n || !IsVectors(args.gate, DType::kBF16, hidden) || num_experts < 1 ||
      num_experts > kMaxRouteExperts || top_k < 1 || top_k > std::min<int64_t>(kMaxRouteTopK, num_experts) ||
      !IsPlain(args.experts, DType::kI32, n, top_k) || !IsPlain(args.weights, DType::kF32, n, top_k)) {
    return cudaErrorInvalidValue;
  }
  if (args.delta.data != nullptr && !(IsVectors(args.delta, DType::kBF16, hidden) && args.delta.rows >= n)) {
    return cudaErrorInvalidValue;
  }
  const RouteParams params = {.residual = static_cast<float*>(args.residual.data),
                              .residual_stride = args.residual.stride,
                              .delta = static_cast<const BFloat16*>(args.delta.data),
                              .delta_stride = args.delta.stride,
                              .norm_weight = static_cast<const float*>(args.norm_weight.data),
                              .eps = args.eps,
                              .normed = static_cast<BFloat16*>(args.normed.data),
                              .normed_stride = args.normed.stride,
                              .gate = static_cast<const BFloat16*>(args.gate.data),
                              .gate_stride = args.gate.stride,
                              .num_experts = static_cast<int>(num_experts),
                              .num_rows = args.num_rows,
                              .experts = static_cast<int32_t*>(args.experts.data),
                              .experts_stride = args.experts.stride,
                              .weights = static_cast<float*>(args.weights.data),
                              .weights_stride = args.weights.stride,
                              .top_k = static_cast<int>(top_k),
                              .n = static_cast<int>(n),
                              .hidden = static_cast<int>(hidden)};
  // Few rows: a block each. Many: four a block, while they fit in registers.
  const bool many = n >= 512;
  if (hidden <= kThreads * kVector) return many ? LaunchRoute<4, 1>(params, stream) : LaunchRoute<1, 1>(params, stream);
  if (hidden <= 2 * kThreads * kVector) {
    return many ? LaunchRoute<2, 2>(params, stream) : LaunchRoute<1, 2>(params, stream);
  }
  return LaunchRoute<1, 4>(params, stream);
}

}  // namespace soloist::cuda
