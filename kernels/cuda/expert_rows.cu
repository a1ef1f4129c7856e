// GeluRows, SiluGateRows, CompactRows, ExpandRows: work on those rows of an expert tensor that are valid. Which ones
// they are is known on the device only: every block reads the groups' counts and makes the list of rows by itself.
//
// Launch: blocks of 128 threads walk over (row, part of a row); no more blocks than the device holds, nor than the rows
// that can be valid need. Bytes per valid row: read once and written once.
#include "kernels/cuda/expert_rows.cuh"
#include "kernels/cuda/launch.cuh"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kUnroll = 2;  // vectors of a thread per part
constexpr int kPart = kThreads * kUnroll * kVector;
constexpr int kResidents = 16;  // blocks of a multiprocessor

struct Rows {
  BFloat16* data;
  int64_t stride;
};

// 0.5 x (1 + erf(x / sqrt 2)) = max(x, 0) - |x| * erfc(|x| / sqrt 2) / 2. erfc(z) = t p(t) exp(-z^2), t = 1 / (1 + z /
// 2): the form of Abramowitz and Stegun 7.1.26 with two more terms, fitted for the least relative error over the floats
// whose result is not 0 in bf16: 1.2e-6. (In float32, 1 + erff loses all digits of the tail.)
__device__ __forceinline__ float Gelu(float x) {
  const float t = __fdividef(1.0f, fmaf(fabsf(x), 0.353553391f, 1.0f));
  float p = 0.044751169f;
  p = fmaf(p, t, -0.1806596595f);
  p = fmaf(p, t, 0.1978286965f);
  p = fmaf(p, t, 0.0166593745f);
  p = fmaf(p, t, 0.1416136505f);
  p = fmaf(p, t, 0.1386286885f);
  p = fmaf(p, t, 0.141177596f);
  float gauss;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(gauss) : "f"(x * x * -0.721347520f));
  return fmaf(-fabsf(x), p * t * gauss, fmaxf(x, 0.0f));
}

__device__ __forceinline__ float Silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

template <bool kGated, int kCapacity>
__global__ __launch_bounds__(kThreads,
                             kResidents) void ActivateRowsKernel(const __grid_constant__ RowGroups<kCapacity> groups,
                                                                 Rows in, Rows out, int hidden) {
  __shared__ RowList<kCapacity> list;
  PdlTrigger();
  PdlWait();
  list.Read(groups);
  const int parts = (hidden + kPart - 1) / kPart;
  const int64_t items = static_cast<int64_t>(list.Total(groups)) * parts;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t row = list.Row(groups, static_cast<int32_t>(item / parts));
    const int begin = static_cast<int>(item % parts) * kPart + static_cast<int>(threadIdx.x) * kVector;
    const BFloat16* from = in.data + row * in.stride;
    uint4 packed[kUnroll];
    uint4 up[kUnroll];
#pragma unroll
    for (int v = 0; v < kUnroll; ++v) {
      const int column = begin + v * kThreads * kVector;
      if (column >= hidden) continue;
      packed[v] = Load16(from + column);
      if constexpr (kGated) up[v] = Load16(from + hidden + column);
    }
#pragma unroll
    for (int v = 0; v < kUnroll; ++v) {
      const int column = begin + v * kThreads * kVector;
      if (column >= hidden) continue;
      Floats x = WidenBf16(packed[v]);
      if constexpr (kGated) {
        const Floats u = WidenBf16(up[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] = Silu(x[i]) * u[i];
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] = Gelu(x[i]);
      }
      Store16(out.data + row * out.stride + column, NarrowBf16(x));
    }
  }
}

struct ExpertCounts {
  int32_t* row_offsets;
  int32_t* row_counts;
  int num_experts;
};

// kExpand: from dense to sparse.
template <bool kExpand, int kCapacity>
__global__ __launch_bounds__(kThreads,
                             kResidents) void MoveRowsKernel(const __grid_constant__ RowGroups<kCapacity> groups,
                                                             Rows sparse, Rows dense, int cols, int32_t dense_rows,
                                                             ExpertCounts counts) {
  __shared__ RowList<kCapacity> list;
  PdlTrigger();
  PdlWait();
  list.Read(groups);
  const int32_t total = min(list.Total(groups), dense_rows);
  if (!kExpand && blockIdx.x == 0) {
    // starts[first group of expert >= e].
    const auto offset = [&](int e) {
      int low = -1, high = groups.num_groups;  // experts[low] < e <= experts[high]
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (groups.experts[middle] < e ? low : high) = middle;
      }
      return list.starts[high];
    };
    for (int e = static_cast<int>(threadIdx.x); e <= counts.num_experts; e += kThreads) {
      const int32_t first = offset(e);
      if (counts.row_offsets != nullptr) counts.row_offsets[e] = first;
      if (counts.row_counts != nullptr && e < counts.num_experts) counts.row_counts[e] = offset(e + 1) - first;
    }
  }
  const int parts = (cols + kPart - 1) / kPart;
  const int64_t items = static_cast<int64_t>(total) * parts;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t dense_row = item / parts;
    const int64_t row = list.Row(groups, static_cast<int32_t>(dense_row));
    const int begin = static_cast<int>(item % parts) * kPart + static_cast<int>(threadIdx.x) * kVector;
    BFloat16* at_sparse = sparse.data + row * sparse.stride;
    BFloat16* at_dense = dense.data + dense_row * dense.stride;
    const BFloat16* from = kExpand ? at_dense : at_sparse;
    BFloat16* to = kExpand ? at_sparse : at_dense;
    uint4 packed[kUnroll];
#pragma unroll
    for (int v = 0; v < kUnroll; ++v) {
      const int column = begin + v * kThreads * kVector;
      if (column < cols) packed[v] = Load16(from + column);
    }
#pragma unroll
    for (int v = 0; v < kUnroll; ++v) {
      const int column = begin + v * kThreads * kVector;
      if (column < cols) Store16(to + column, packed[v]);
    }
  }
}

Rows RowsOf(const Tensor& t) { return {static_cast<BFloat16*>(t.data), t.stride}; }

dim3 Grid(int64_t rows, int64_t cols) {
  const int64_t items = rows * ((cols + kPart - 1) / kPart);
  return dim3(static_cast<unsigned>(
      std::max<int64_t>(1, std::min<int64_t>(items, static_cast<int64_t>(MultiprocessorCount()) * kResidents))));
}

template <bool kGated>
cudaError_t ActivateRows(const Tensor& in, const ValidRows& valid, const Tensor& out, cudaStream_t stream) {
  const int64_t hidden = out.cols;
  const int64_t rows = std::min(in.rows, out.rows);
  if (rows == 0) return cudaSuccess;
  if (!IsVectors(in, DType::kBF16, kGated ? 2 * hidden : hidden) || !IsVectors(out, DType::kBF16, hidden) ||
      rows > std::numeric_limits<int32_t>::max() || hidden > std::numeric_limits<int32_t>::max() / 2) {
    return cudaErrorInvalidValue;
  }
  const auto run = [&]<int kCapacity>(const RowGroups<kCapacity>& groups, int64_t most) {
    return Launch(ActivateRowsKernel<kGated, kCapacity>, Grid(most, hidden), dim3(kThreads), 0, stream, 1, groups,
                  RowsOf(in), RowsOf(out), static_cast<int>(hidden));
  };
  if (valid.num_groups > 0) return WithGroups(valid.groups, valid.num_groups, rows, run);
  return run(RowGroups<0>{valid.total, static_cast<int32_t>(rows)}, rows);
}

template <bool kExpand>
cudaError_t MoveRows(const CompactRowsArgs& args, cudaStream_t stream) {
  const Tensor& sparse = args.sparse;
  const Tensor& dense = args.dense;
  if (!IsVectors(sparse, DType::kBF16, dense.cols) || !IsVectors(dense, DType::kBF16, dense.cols) ||
      args.num_experts < 1 || dense.cols > std::numeric_limits<int32_t>::max() / 2 ||
      dense.rows > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  return WithGroups(args.groups, args.num_groups, sparse.rows,
                    [&]<int kCapacity>(const RowGroups<kCapacity>& groups, int64_t most) {
                      return Launch(MoveRowsKernel<kExpand, kCapacity>, Grid(std::min(most, dense.rows), dense.cols),
                                    dim3(kThreads), 0, stream, 1, groups, RowsOf(sparse), RowsOf(dense),
                                    static_cast<int>(dense.cols), static_cast<int32_t>(dense.rows),
                                    ExpertCounts{args.row_offsets, args.row_counts, args.num_experts});
                    });
}

}  // namespace

cudaError_t GeluRows(const Tensor& in, const ValidRows& valid, const Tensor& out, cudaStream_t stream) {
  return ActivateRows<false>(in, valid, out, stream);
}

cudaError_t SiluGateRows(const Tensor& in, const ValidRows& valid, const Tensor& out, cudaStream_t stream) {
  return ActivateRows<true>(in, valid, out, stream);
}

cudaError_t CompactRows(const CompactRowsArgs& args, cudaStream_t stream) { return MoveRows<false>(args, stream); }

cudaError_t ExpandRows(const CompactRowsArgs& args, cudaStream_t stream) { return MoveRows<true>(args, stream); }

}  // namespace soloist::cuda
