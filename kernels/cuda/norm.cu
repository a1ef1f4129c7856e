// AddRmsNorm and CombineRows: both add something to rows of the residual stream and normalise the result.
//
//   x = residual + source;  residual = x;  out = x / sqrt(mean(x^2) + eps) * weight
//
// Launch: one block per row, up to 512 threads of kVectors vectors; with many rows as many blocks as the device holds,
// each of which walks over rows with the norm weights in registers. A row lives in registers: it is read once and
// written once. The sum's order depends on hidden alone.
// Bytes per row: 8 * hidden (residual) + 2 * hidden (out) + the source's: 2 * hidden (delta), or 2 * top_k * hidden.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/token_ops.h"
#include "kernels/cuda/token_vectors.cuh"

namespace soloist::cuda {
namespace {

constexpr int kMaxThreads = 512;

struct Target {
  float* residual;
  int64_t residual_stride;
  const float* weight;
  float eps;
  BFloat16* out;
  int64_t out_stride;
};

// source = delta[row, :].
struct Delta {
  const BFloat16* delta;  // null: zeros
  int64_t stride;

  // Blocks of kMaxThreads that a multiprocessor shall hold, as far as registers allow it.
  static constexpr int Residents(int vectors) { return vectors == 1 ? 3 : vectors == 2 ? 2 : 1; }

  template <int kVectors>
  __device__ __forceinline__ void Load(int64_t row, int hidden, Floats (&sum)[kVectors]) const {
    if (delta == nullptr) return;
    uint4 packed[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVector;
      packed[v] = column < hidden ? Load16(delta + row * stride + column) : uint4{};
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) sum[v] = WidenBf16(packed[v]);
  }
};

// source = sum over j of weights[row, j] * y[slots[row, j], :]; also written to `delta` unless that is null.
struct Combine {
  const BFloat16* y;
  int64_t y_stride;
  const int32_t* slots;
  int64_t slots_stride;
  const float* weights;
  int64_t weights_stride;
  int top_k;
  BFloat16* delta;
  int64_t delta_stride;

  static constexpr int Residents(int vectors) { return vectors == 1 ? 2 : 1; }

  template <int kVectors>
  __device__ __forceinline__ void Load(int64_t row, int hidden, Floats (&sum)[kVectors]) const {
    constexpr int kBatch = 4 / kVectors;  // choices whose loads are in flight together
    for (int begin = 0; begin < top_k; begin += kBatch) {
      int32_t slot[kBatch];
      float weight[kBatch];
      uint4 packed[kBatch][kVectors];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const bool given = begin + j < top_k;
        slot[j] = given ? LoadInt(slots + row * slots_stride + begin + j) : -1;
        weight[j] = given ? LoadFloat(weights + row * weights_stride + begin + j) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int column = (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVector;
          packed[j][v] = slot[j] >= 0 && column < hidden ? Load16(y + slot[j] * y_stride + column) : uint4{};
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (slot[j] < 0) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const Floats row_of_y = WidenBf16(packed[j][v]);
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum[v][i] = fmaf(weight[j], row_of_y[i], sum[v][i]);
        }
      }
    }
    if (delta == nullptr) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVector;
      if (column < hidden) Store16(delta + row * delta_stride + column, NarrowBf16(sum[v]));
    }
  }
};

// kNorm: whether there is a residual at all; if not, only the source's own output is written.
template <int kVectors, bool kNorm, typename Source>
__global__ __launch_bounds__(kMaxThreads, Source::Residents(kVectors)) void AddRowsKernel(Target target, Source source,
                                                                                          int64_t n, int hidden) {
  __shared__ BlockSums sums;
  PdlTrigger();
  int column[kVectors];
  Floats weight[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    column[v] = (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVector;
    if constexpr (kNorm) {
      weight[v] = LoadConstants(target.weight + column[v], column[v] < hidden);
    }
  }
  if constexpr (kNorm) sums.Init();
  const float inverse_hidden = 1.0f / static_cast<float>(hidden);
  PdlWait();

  int set = 0;
  for (int64_t row = blockIdx.x; row < n; row += gridDim.x, set ^= 1) {
    Floats sum[kVectors] = {};
    if constexpr (!kNorm) {
      source.Load(row, hidden, sum);
    } else {
      float* residual = target.residual + row * target.residual_stride;
      Floats x[kVectors] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (column[v] < hidden) x[v] = LoadFloats(residual + column[v]);
      }
      source.Load(row, hidden, sum);
      float squares = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          x[v][i] += sum[v][i];
          squares = fmaf(x[v][i], x[v][i], squares);
        }
        if (column[v] < hidden) StoreFloats(residual + column[v], x[v]);
      }
      const float scale = rsqrtf(sums.Sum(squares, set) * inverse_hidden + target.eps);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (column[v] >= hidden) continue;
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[v][i] = x[v][i] * scale * weight[v][i];
        Store16(target.out + row * target.out_stride + column[v], NarrowBf16(x[v]));
      }
    }
  }
}

template <int kVectors, bool kNorm, typename Source>
cudaError_t LaunchVectors(const Target& target, const Source& source, int64_t n, int hidden, cudaStream_t stream) {
  const int vectors = hidden / kVector;
  const int threads = ((vectors + kVectors - 1) / kVectors + 31) / 32 * 32;
  const int64_t resident =
      static_cast<int64_t>(MultiprocessorCount()) * Source::Residents(kVectors) * (kMaxThreads / threads);
  const unsigned blocks = static_cast<unsigned>(std::max<int64_t>(1, std::min(n, resident)));
  return Launch(AddRowsKernel<kVectors, kNorm, Source>, dim3(blocks), dim3(threads), 0, stream, 1, target, source, n,
                hidden);
}

template <bool kNorm, typename Source>
cudaError_t LaunchRows(const Target& target, const Source& source, int64_t n, int64_t hidden, cudaStream_t stream) {
  const int columns = static_cast<int>(hidden);
  if (columns <= kMaxThreads * kVector) return LaunchVectors<1, kNorm>(target, source, n, columns, stream);
  if (columns <= 2 * kMaxThreads * kVector) return LaunchVectors<2, kNorm>(target, source, n, columns, stream);
  return LaunchVectors<4, kNorm>(target, source, n, columns, stream);
}

bool IsNorm(const Tensor& residual, const Tensor& weight, const Tensor& out) {
  const int64_t hidden = residual.cols;
  return hidden <= kMaxHidden && IsVectors(residual, DType::kF32, hidden) && IsVectors(weight, DType::kF32, hidden) &&
         IsVectors(out, DType::kBF16, hidden) && out.rows >= residual.rows;
}

Target MakeTarget(const Tensor& residual, const Tensor& weight, float eps, const Tensor& out) {
  return {static_cast<float*>(residual.data), residual.stride, static_cast<const float*>(weight.data), eps,
          static_cast<BFloat16*>(out.data),   out.stride};
}

}  // namespace

cudaError_t AddRmsNorm(const Tensor& residual, const Tensor& delta, const Tensor& weight, float eps, const Tensor& out,
                       cudaStream_t stream) {
  if (residual.rows == 0) return cudaSuccess;
  if (!IsNorm(residual, weight, out)) return cudaErrorInvalidValue;
  if (delta.data != nullptr && !(IsVectors(delta, DType::kBF16, residual.cols) && delta.rows >= residual.rows)) {
    return cudaErrorInvalidValue;
  }
  return LaunchRows<true>(MakeTarget(residual, weight, eps, out),
                          Delta{static_cast<const BFloat16*>(delta.data), delta.stride}, residual.rows, residual.cols,
                          stream);
}

cudaError_t CombineRows(const CombineRowsArgs& args, cudaStream_t stream) {
  const int64_t n = args.slots.rows;
  const int64_t hidden = args.y.cols;
  if (n == 0) return cudaSuccess;
  if (hidden > kMaxHidden || !IsVectors(args.y, DType::kBF16, hidden) ||
      !IsPlain(args.slots, DType::kI32, n, args.slots.cols) ||
      !IsPlain(args.weights, DType::kF32, n, args.slots.cols)) {
    return cudaErrorInvalidValue;
  }
  if (args.delta.data != nullptr && !(IsVectors(args.delta, DType::kBF16, hidden) && args.delta.rows >= n)) {
    return cudaErrorInvalidValue;
  }
  const Combine source{static_cast<const BFloat16*>(args.y.data),
                       args.y.stride,
                       static_cast<const int32_t*>(args.slots.data),
                       args.slots.stride,
                       static_cast<const float*>(args.weights.data),
                       args.weights.stride,
                       static_cast<int>(args.slots.cols),
                       static_cast<BFloat16*>(args.delta.data),
                       args.delta.stride};
  if (args.residual.data == nullptr) {
    return args.delta.data == nullptr ? cudaErrorInvalidValue : LaunchRows<false>(Target{}, source, n, hidden, stream);
  }
  if (args.residual.rows < n || args.residual.cols != hidden ||
      !IsNorm(args.residual.Rows(0, n), args.norm_weight, args.normed)) {
    return cudaErrorInvalidValue;
  }
  return LaunchRows<true>(MakeTarget(args.residual, args.norm_weight, args.eps, args.normed), source, n, hidden,
                          stream);
}

}  // namespace soloist::cuda
