// The pieces of Route (router.cu): fragments of the gate, their products, messages within a cluster, the choice of
// experts. Included by router.cu only.
#ifndef SOLOIST_KERNELS_CUDA_ROUTER_PARTS_CUH_
#define SOLOIST_KERNELS_CUDA_ROUTER_PARTS_CUH_

#include "kernels/cuda/token_vectors.cuh"

namespace soloist::cuda::router {

constexpr int kRanks = 4;        // blocks of a cluster
constexpr int kMaxWarps = 16;    // of a block
constexpr int kMinWarps = 4;     // enough for the choice of experts
constexpr int kChunk = 64;       // columns
constexpr int kSteps = 2;        // of 32 columns, in a chunk
constexpr int kMaxTileRows = 8;  // columns of B
constexpr int kMaxExperts = 512;
constexpr int kMaxTopK = 16;
constexpr int kClustersPerFour = 8;  // most clusters per kRanks multiprocessors: 2 or so at a time, in turns

struct RouteParams {
  float* residual;
  int64_t residual_stride;
  const BFloat16* delta;
  int64_t delta_stride;
  const float* weight;
  float eps;
  BFloat16* normed;
  int64_t normed_stride;
  const BFloat16* gate;
  int64_t gate_stride;
  const int32_t* num_rows;
  int32_t* experts;
  int64_t experts_stride;
  float* weights;
  int64_t weights_stride;
  int64_t n;
  int hidden;
  int rank_columns;  // of a block; a multiple of kChunk
  int num_experts;
  int top_k;
  int tile_rows;
};

// d += a * b with a 16 x 16 (row-major), b 16 x 8.
__device__ __forceinline__ void Mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A lane's part of 16 experts over 32 columns.
struct GatePart {
  uint4 first;   // expert g
  uint4 second;  // expert g + 8
};

// `column`: the lane's first. Zero for experts and columns that do not exist.
__device__ __forceinline__ GatePart LoadGate(const RouteParams& params, int expert, int column) {
  GatePart part = {};
  if (column >= params.hidden) return part;
  const BFloat16* at = params.gate + expert * params.gate_stride + column;
  if (expert < params.num_experts) part.first = __ldg(reinterpret_cast<const uint4*>(at));
  if (expert + 8 < params.num_experts) {
    part.second = __ldg(reinterpret_cast<const uint4*>(at + 8 * params.gate_stride));
  }
  return part;
}

// sum += gate * v over 32 columns.
__device__ __forceinline__ void Multiply(const GatePart& gate, const Floats& v, float (&high)[4], float (&low)[4]) {
  uint32_t top[4];
  uint32_t rest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    top[i] = PackBf16(v[2 * i], v[2 * i + 1]);
    rest[i] = PackBf16(v[2 * i] - __uint_as_float(top[i] << 16), v[2 * i + 1] - __uint_as_float(top[i] & 0xffff0000u));
  }
  Mma(high, gate.first.x, gate.second.x, gate.first.y, gate.second.y, top[0], top[1]);
  Mma(low, gate.first.x, gate.second.x, gate.first.y, gate.second.y, rest[0], rest[1]);
  Mma(high, gate.first.z, gate.second.z, gate.first.w, gate.second.w, top[2], top[3]);
  Mma(low, gate.first.z, gate.second.z, gate.first.w, gate.second.w, rest[2], rest[3]);
}

// Floats as integers of the same order, all > 0; NaN is the least.
__device__ __forceinline__ uint32_t OrderOf(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 and +0 are a tie
  if (value != value) return 1;
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float OfOrder(uint32_t order) {
  return __uint_as_float((order >> 31) != 0 ? order & 0x7fffffffu : ~order);
}

// By one warp. sums: a row's logits, as kRanks sums `rank_stride` apart that are still to be scaled. At most
// 32 * kPerLane experts.
template <int kPerLane>
__device__ __forceinline__ void ChooseExperts(const RouteParams& params, int64_t row, bool padding, const float* sums,
                                              int rank_stride, float scale) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t order[kPerLane];  // of experts lane, lane + 32, ..; 0: taken, or none
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane + 32 * i;
    order[i] = 0;
    if (e >= params.num_experts) continue;
    static_assert(kRanks == 4);
    order[i] =
        OrderOf(((sums[e] + sums[rank_stride + e]) + (sums[2 * rank_stride + e] + sums[3 * rank_stride + e])) * scale);
  }
  int32_t expert = 0;  // of the choice `lane`
  float logit = 0;
  for (int j = 0; j < params.top_k; ++j) {
    uint32_t best = order[0];
    int of_lane = 0;
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
      if (32 * i >= params.num_experts) break;
      if (order[i] > best) {
        best = order[i];
        of_lane = i;
      }
    }
    const uint32_t most = __reduce_max_sync(kFullWarp, best);
    const unsigned chosen =
        __reduce_min_sync(kFullWarp, best == most ? static_cast<unsigned>(lane + 32 * of_lane) : 0xffffffffu);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (static_cast<unsigned>(lane + 32 * i) == chosen) order[i] = 0;
    }
    if (lane == j) {
      expert = static_cast<int32_t>(chosen);
      logit = OfOrder(most);
    }
  }
  const float exponential = lane < params.top_k ? expf(logit - __shfl_sync(kFullWarp, logit, 0)) : 0.0f;
  float sum = exponential;
#pragma unroll
  for (int offset = kMaxTopK / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if (lane < params.top_k) {
    params.experts[row * params.experts_stride + lane] = padding ? -1 : expert;
    params.weights[row * params.weights_stride + lane] = padding ? 0.0f : exponential / sum;
  }
}

// What the blocks of a cluster send each other: float32 stores into another block's shared memory that report to a
// barrier there. Unlike barrier.cluster with its release, this does not wait for the block's stores to global memory.

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void InitBarrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
}
// All threads of all blocks, between InitBarrier and the first Send.
__device__ __forceinline__ void ArriveAtCluster() {
  asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void WaitForCluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// By one thread, once per phase: the phase ends when `bytes` have arrived.
__device__ __forceinline__ void ExpectBytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void AwaitPhase(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra retry;\n}" ::
          "r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}
// *to = value and 4 bytes of *barrier's phase, both in block `rank`'s shared memory at the places given in this
// block's.
__device__ __forceinline__ void Send(const float* to, const uint64_t* barrier, int rank, float value) {
  uint32_t address;
  uint32_t report;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(SharedAddress(to)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(report) : "r"(SharedAddress(barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
               "r"(__float_as_uint(value)), "r"(report)
               : "memory");
}

}  // namespace soloist::cuda::router

#endif  // SOLOIST_KERNELS_CUDA_ROUTER_PARTS_CUH_
