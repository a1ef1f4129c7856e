// Route: residual += delta; normed = RMSNorm(residual); logits = normed * gate^T; top-k and softmax over the chosen.
//
//   x = residual + delta, v = x * weight, scale = 1 / sqrt(mean(x^2) + eps)
//   normed = bf16(v * scale), logit[e] = scale * sum over columns of v * gate[e]
//
// The sum does not wait for the scale, so that one exchange between the blocks serves both. It runs on tensor cores
// with v split in two bf16 (v = high + low within 2^-17), gate as it is, sums in float32: mma.m16n8k16 with 16 experts
// as A's rows and up to 8 tokens as B's columns. A column's bits do not depend on the other columns.
//
// Launch: clusters of kRanks blocks; a cluster takes tiles of `tile_rows` (1..8) rows, a block a quarter of the
// columns, a warp kChunks chunks of 64 columns of it. Of each 32 columns a lane (g = lane / 4, q = lane % 4) holds
// columns 8 q .. 8 q + 7 of token g and of the experts g and g + 8: 16-byte loads that already are the fragments, since
// the sum may take its columns in any order as long as A and B agree. Warps' sums meet in shared memory, blocks' sums
// in that of the block that chooses the row's experts (row % kRanks). The order of all sums depends on hidden alone.
// Bytes per row: 4 + 2 read and 4 + 2 written, times hidden; the gate (2 * experts * hidden) once per tile, from
// registers, L1 or L2.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/router_parts.cuh"
#include "kernels/cuda/token_ops.h"
#include "kernels/cuda/token_vectors.cuh"

namespace soloist::cuda {
namespace router {
namespace {

// kBlocks16: blocks of 16 experts that are multiplied at a time. kHold: the norm weights, and the gate if it is one
// block of 16, stay in registers (few rows: they are there before PdlWait; many rows: two blocks per multiprocessor are
// worth more).
template <int kChunks, int kBlocks16, bool kHold>
__global__ __launch_bounds__(32 * kMaxWarps, kHold || kChunks > 1 ? 1 : 2) void RouteKernel(const RouteParams params) {
  constexpr int kGroup = 16 * kBlocks16;  // experts of one pass
  constexpr int kPitch = kGroup + 1;      // sums of a row in a pass, and the sum of squares
  constexpr bool kHoldGate = kHold && kBlocks16 == 1;
  extern __shared__ float shared[];
  __shared__ uint64_t received[2];  // barriers of the two buffers
  const int rank = static_cast<int>(blockIdx.x % kRanks);
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int warps = threads / 32;
  const int lane = thread % 32;
  const int g = lane / 4;
  const int tile_rows = params.tile_rows;
  // Rows whose experts this block chooses, of a tile.
  const int chosen_rows = (tile_rows + kRanks - 1) / kRanks;
  float* partials = shared;                                 // [warps][tile_rows][kPitch]
  float* squares = partials + warps * tile_rows * kPitch;   // [2][kRanks][kMaxTileRows]
  float* logit_sums = squares + 2 * kRanks * kMaxTileRows;  // [2][kRanks][chosen_rows][num_experts]
  const int rank_logits = chosen_rows * params.num_experts;
  const int end = min(params.hidden, (rank + 1) * params.rank_columns);
  const int first_column = rank * params.rank_columns + (thread / 32) * (kChunks * kChunk) + lane % 4 * kVector;

  PdlTrigger();
  if (thread < 2) InitBarrier(&received[thread]);
  ArriveAtCluster();
  Floats held_weight[kHold ? kChunks : 1][kSteps];
  GatePart held_gate[kHoldGate ? kChunks : 1][kSteps];
  const auto column = [&](int chunk, int step) { return first_column + chunk * kChunk + step * 32; };
  if constexpr (kHold) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        held_weight[c][s] = {};
        if (column(c, s) < end) held_weight[c][s] = LoadConstants(params.weight + column(c, s));
        if constexpr (kHoldGate)
          held_gate[c][s] = LoadGate(params, g, column(c, s) < end ? column(c, s) : params.hidden);
      }
    }
  }
  if constexpr (!kHoldGate) {
    // 128 bytes a line; a rank's columns are whole lines.
    const int lines = params.rank_columns / kChunk;
    for (int i = thread; i < lines * params.num_experts; i += threads) {
      const int at = rank * params.rank_columns + i % lines * kChunk;
      if (at < params.hidden) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(params.gate + i / lines * params.gate_stride + at));
      }
    }
  }
  PdlWait();
  const int64_t valid = params.num_rows != nullptr ? LoadInt(params.num_rows) : params.n;

  const int64_t tiles = (params.n + tile_rows - 1) / tile_rows;
  // What a block receives for a tile: logits of the rows that it chooses for, all rows' sums of squares.
  const int receives = kRanks * ((tile_rows - rank + kRanks - 1) / kRanks * params.num_experts + tile_rows);
  bool first = true;
  int turn = 0;
  for (int64_t tile = blockIdx.x / kRanks; tile < tiles; tile += gridDim.x / kRanks, ++turn) {
    const int buffer = turn % 2;
    if (thread == 0) ExpectBytes(&received[buffer], static_cast<uint32_t>(receives) * sizeof(float));
    const int64_t row = tile * tile_rows + g;
    const bool active = g < tile_rows && row < params.n;
    Floats v[kChunks][kSteps];
    float square = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint4 words[kSteps][3];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        words[s][0] = words[s][1] = words[s][2] = uint4{};
        if (!active || column(c, s) >= end) continue;
        const float* residual = params.residual + row * params.residual_stride + column(c, s);
        words[s][0] = Load16(residual);
        words[s][1] = Load16(residual + 4);
        if (params.delta != nullptr) words[s][2] = Load16(params.delta + row * params.delta_stride + column(c, s));
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        Floats x = FromWords(words[s][0], words[s][1]);
        const Floats delta = WidenBf16(words[s][2]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          x[i] += delta[i];
          square = fmaf(x[i], x[i], square);
        }
        const bool exists = active && column(c, s) < end;
        if (exists && params.delta != nullptr) {
          StoreFloats(params.residual + row * params.residual_stride + column(c, s), x);
        }
        Floats weight = {};
        if constexpr (kHold) {
          weight = held_weight[c][s];
        } else if (exists) {
          weight = LoadConstants(params.weight + column(c, s));
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[c][s][i] = x[i] * weight[i];
      }
    }
    square += __shfl_xor_sync(kFullWarp, square, 1);
    square += __shfl_xor_sync(kFullWarp, square, 2);

    for (int group = 0; group < params.num_experts; group += kGroup) {
      if (group > 0) __syncthreads();  // partials have been read
      float* of_warp = partials + thread / 32 * tile_rows * kPitch;
#pragma unroll
      for (int b = 0; b < kBlocks16; ++b) {
        const int expert = group + 16 * b;
        if (expert >= params.num_experts) break;
        float high[4] = {};
        float low[4] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            if constexpr (kHoldGate) {
              Multiply(held_gate[c][s], v[c][s], high, low);
            } else {
              Multiply(LoadGate(params, expert + g, column(c, s) < end ? column(c, s) : params.hidden), v[c][s], high,
                       low);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int of_tile = lane % 4 * 2 + i % 2;
          if (of_tile < tile_rows) of_warp[of_tile * kPitch + 16 * b + g + i / 2 * 8] = high[i] + low[i];
        }
      }
      if (lane % 4 == 0 && g < tile_rows) of_warp[g * kPitch + kGroup] = square;
      __syncthreads();
      if (first) WaitForCluster();  // all blocks have started
      first = false;
      for (int i = thread; i < tile_rows * kPitch; i += threads) {
        const int of_tile = i / kPitch;
        const int e = i % kPitch;
        if (e < kGroup ? group + e >= params.num_experts : group > 0) continue;
        float sum[4] = {};
#pragma unroll
        for (int w = 0; w < kMaxWarps; ++w) {
          if (w < warps) sum[w % 4] += partials[w * tile_rows * kPitch + i];
        }
        const float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        if (e < kGroup) {
          float* to =
              logit_sums + (buffer * kRanks + rank) * rank_logits + of_tile / kRanks * params.num_experts + group + e;
          Send(to, &received[buffer], of_tile % kRanks, total);
        } else {
#pragma unroll
          for (int r = 0; r < kRanks; ++r) {
            Send(squares + (buffer * kRanks + rank) * kMaxTileRows + of_tile, &received[buffer], r, total);
          }
        }
      }
    }
    AwaitPhase(&received[buffer], turn / 2 % 2);

    const auto scale_of = [&](int of_tile) {
      const float* at = squares + buffer * kRanks * kMaxTileRows + of_tile;
      const float sum = (at[0] + at[kMaxTileRows]) + (at[2 * kMaxTileRows] + at[3 * kMaxTileRows]);
      return rsqrtf(sum / static_cast<float>(params.hidden) + params.eps);
    };
    const int of_tile = thread / 32 * kRanks + rank;  // this warp's, if it chooses
    if (of_tile < tile_rows && tile * tile_rows + of_tile < params.n) {
      ChooseExperts<kBlocks16 == 1 ? 1 : kMaxExperts / 32>(
          params, tile * tile_rows + of_tile, tile * tile_rows + of_tile >= valid,
          logit_sums + buffer * kRanks * rank_logits + thread / 32 * params.num_experts, rank_logits,
          scale_of(of_tile));
    }
    if (!active) continue;
    const float scale = scale_of(g);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (column(c, s) >= end) continue;
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[c][s][i] *= scale;
        Store16(params.normed + row * params.normed_stride + column(c, s), NarrowBf16(v[c][s]));
      }
    }
  }
}

template <int kChunks, int kBlocks16, bool kHold>
cudaError_t LaunchRoute(RouteParams params, int tile_rows, int rank_chunks, int multiprocessors, cudaStream_t stream) {
  const auto kernel = RouteKernel<kChunks, kBlocks16, kHold>;
  const int warps = std::clamp((rank_chunks + kChunks - 1) / kChunks, kMinWarps, kMaxWarps);
  params.tile_rows = tile_rows;
  const int chosen_rows = (tile_rows + kRanks - 1) / kRanks;
  const int floats = warps * tile_rows * (16 * kBlocks16 + 1) + 2 * kRanks * kMaxTileRows +
                     2 * kRanks * chosen_rows * params.num_experts;
  const size_t shared_bytes = static_cast<size_t>(floats) * sizeof(float);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const int64_t tiles = (params.n + tile_rows - 1) / tile_rows;
  const int64_t clusters = std::min<int64_t>(tiles, kClustersPerFour * std::max(1, multiprocessors / kRanks));
  return Launch(kernel, dim3(static_cast<unsigned>(clusters * kRanks)), dim3(static_cast<unsigned>(32 * warps)),
                shared_bytes, stream, kRanks, params);
}

}  // namespace
}  // namespace router

cudaError_t Route(const RouteArgs& args, cudaStream_t stream) {
  using namespace router;
  const int64_t n = args.residual.rows;
  const int64_t hidden = args.residual.cols;
  const int64_t num_experts = args.gate.rows;
  const int64_t top_k = args.experts.cols;
  if (n == 0) return cudaSuccess;
  if (hidden > kMaxHidden || !IsVectors(args.residual, DType::kF32, hidden) ||
      !IsVectors(args.norm_weight, DType::kF32, hidden) || !IsVectors(args.normed, DType::kBF16, hidden) ||
      args.normed.rows < n || !IsVectors(args.gate, DType::kBF16, hidden) || num_experts < 1 ||
      num_experts > kMaxExperts || top_k < 1 || top_k > std::min<int64_t>(kMaxTopK, num_experts) ||
      !IsPlain(args.experts, DType::kI32, n, top_k) || !IsPlain(args.weights, DType::kF32, n, top_k) ||
      (args.delta.data != nullptr && !(IsVectors(args.delta, DType::kBF16, hidden) && args.delta.rows >= n))) {
    return cudaErrorInvalidValue;
  }
  const int chunks = static_cast<int>((hidden + kChunk - 1) / kChunk);
  const int rank_chunks = (chunks + kRanks - 1) / kRanks;
  const RouteParams params{.residual = static_cast<float*>(args.residual.data),
                           .residual_stride = args.residual.stride,
                           .delta = static_cast<const BFloat16*>(args.delta.data),
                           .delta_stride = args.delta.stride,
                           .weight = static_cast<const float*>(args.norm_weight.data),
                           .eps = args.eps,
                           .normed = static_cast<BFloat16*>(args.normed.data),
                           .normed_stride = args.normed.stride,
                           .gate = static_cast<const BFloat16*>(args.gate.data),
                           .gate_stride = args.gate.stride,
                           .num_rows = args.num_rows,
                           .experts = static_cast<int32_t*>(args.experts.data),
                           .experts_stride = args.experts.stride,
                           .weights = static_cast<float*>(args.weights.data),
                           .weights_stride = args.weights.stride,
                           .n = n,
                           .hidden = static_cast<int>(hidden),
                           .rank_columns = rank_chunks * kChunk,
                           .num_experts = static_cast<int>(num_experts),
                           .top_k = static_cast<int>(top_k),
                           .tile_rows = 0};
  // As few rows in a tile as the device has clusters for.
  const int multiprocessors = MultiprocessorCount();
  const int64_t at_once = std::max(1, multiprocessors / kRanks);
  const int tile_rows = static_cast<int>(std::clamp<int64_t>((n + at_once - 1) / at_once, 1, kMaxTileRows));
  const bool one_wave = n <= at_once * tile_rows;
  const bool few_experts = num_experts <= 16;
  const auto launch = [&](auto route) { return route(params, tile_rows, rank_chunks, multiprocessors, stream); };
  if (rank_chunks <= kMaxWarps) {
    if (one_wave) return launch(few_experts ? LaunchRoute<1, 1, true> : LaunchRoute<1, 4, true>);
    return launch(few_experts ? LaunchRoute<1, 1, false> : LaunchRoute<1, 4, false>);
  }
  if (rank_chunks <= 2 * kMaxWarps) return launch(few_experts ? LaunchRoute<2, 1, false> : LaunchRoute<2, 4, false>);
  return launch(few_experts ? LaunchRoute<4, 1, false> : LaunchRoute<4, 4, false>);
}

}  // namespace soloist::cuda
