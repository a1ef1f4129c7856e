// The end of a decode attention item: the warps' sums become the chunk's, and the chunks' the row's.
#ifndef SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_FINISH_CUH_
#define SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_FINISH_CUH_

#include <cmath>

#include "kernels/cuda/decode_attention_items.cuh"
#include "kernels/cuda/decode_attention_ptx.cuh"

namespace soloist::cuda::decode {

// kWidth floats at once. kCached: through the L1 cache, not for what other blocks write.
template <bool kCached, int kWidth>
__device__ __forceinline__ void LoadFloats(float (&x)[kWidth], const float* from) {
  if constexpr (kWidth % 4 == 0) {
#pragma unroll
    for (int k = 0; k < kWidth; k += 4) {
      const float4* at = reinterpret_cast<const float4*>(from + k);
      const float4 y = kCached ? *at : __ldcg(at);
      x[k] = y.x, x[k + 1] = y.y, x[k + 2] = y.z, x[k + 3] = y.w;
    }
  } else if constexpr (kWidth == 2) {
    const float2* at = reinterpret_cast<const float2*>(from);
    const float2 y = kCached ? *at : __ldcg(at);
    x[0] = y.x, x[1] = y.y;
  } else {
    x[0] = kCached ? *from : __ldcg(from);
  }
}
template <int kWidth>
__device__ __forceinline__ void StoreFloats(float* to, const float (&x)[kWidth]) {
  if constexpr (kWidth % 4 == 0) {
#pragma unroll
    for (int k = 0; k < kWidth; k += 4) {
      *reinterpret_cast<float4*>(to + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
    }
  } else if constexpr (kWidth == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
  } else {
    *to = x[0];
  }
}
template <int kWidth>
__device__ __forceinline__ void StoreOut(__nv_bfloat16* to, const float (&x)[kWidth], float factor) {
  if constexpr (kWidth == 1) {
    *to = __float2bfloat16_rn(x[0] * factor);
  } else {
    uint32_t y[kWidth / 2];
#pragma unroll
    for (int k = 0; k < kWidth / 2; ++k) y[k] = Pack(x[2 * k] * factor, x[2 * k + 1] * factor, __nv_bfloat16());
    if constexpr (kWidth == 8) {
      *reinterpret_cast<uint4*>(to) = make_uint4(y[0], y[1], y[2], y[3]);
    } else if constexpr (kWidth == 4) {
      *reinterpret_cast<uint2*>(to) = make_uint2(y[0], y[1]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = y[0];
    }
  }
}

// Sums of a set of keys, relative to their max: o = sum 2^(s - m) v, l = sum 2^(s - m).
template <int kWidth>
struct Sums {
  float m = -INFINITY;
  float l = 0;
  float o[kWidth] = {};

  // Adds n others in order; those with m = -inf hold no keys. At least one of all does.
  template <int kCount>
  __device__ __forceinline__ void Add(const float (&ms)[kCount], const float (&ls)[kCount],
                                      const float (&os)[kCount][kWidth]) {
    float max = m;
#pragma unroll
    for (int i = 0; i < kCount; ++i) max = fmaxf(max, ms[i]);
    const float old = Exp2(m - max);
    l *= old;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) o[k] *= old;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float weight = Exp2(ms[i] - max);
      l += ls[i] * weight;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) o[k] += os[i][k] * weight;
    }
    m = max;
  }
};

// One warp group that takes the consumers' sums, so that these go on with the next item meanwhile. A row's only chunk
// goes to `out`; else it goes to the workspace, and the block that finds all chunks of the pair there merges them in
// order.
template <int kHeadDim>
class Finisher {
 public:
  __device__ __forceinline__ Finisher(const Params& p, const SharedLayout& layout, unsigned char* shared)
      : p_(p), layout_(layout), shared_(shared), thread_(threadIdx.x - kConsumers) {}

  // Rows without keys, which no item covers.
  __device__ __forceinline__ void ClearEmptyRows() const {
    const int columns = p_.kv_heads * p_.group * kHeadDim;
    for (int row = blockIdx.x; row < p_.num_rows; row += gridDim.x) {
      if (__ldcg(p_.kv_lens + row) > 0) continue;
      for (int c = thread_ * 8; c < columns; c += kFinishers * 8) {
        *reinterpret_cast<uint4*>(p_.out + row * p_.out_stride + c) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Tickets are answered while the next item is combined.
  __device__ __forceinline__ void Run() const {
    // [2] whether the item before is to be merged, in turns.
    volatile int* flags = reinterpret_cast<int*>(shared_ + layout_.flags);
    Item before;
    bool pending = false;  // whether it took a ticket
    int ticket = 0;
    uint32_t phase = 0;
    for (int result = 0, turn = 0;; turn ^= 1) {
      const uint32_t full = SharedAddress(shared_) + layout_.result_barriers + result * kResultBarriers;
      BarrierWait(full, phase);
      const Item item = reinterpret_cast<const Item*>(shared_ + layout_.result_items)[result];
      if (item.row >= 0) {
        if (p_.group >= 4) {
          Combine<kHeadDim / 16>(item, result);
        } else {
          Combine<kHeadDim / 64>(item, result);
        }
        __syncwarp();
        if (thread_ % 32 == 0) BarrierArrive(full + kEmptyResult);
      }
      if (pending && thread_ == 0) {
        const bool last = ticket == before.num_chunks - 1;
        if (last) p_.tickets[Pair(before)] = 0;
        flags[turn] = last;
      }
      GroupSync(kFinishers);
      const bool merge = pending && flags[turn] != 0;
      pending = item.row >= 0 && item.num_chunks > 1;
      if (pending && thread_ == 0) ticket = TakeTicket(p_.tickets + Pair(item));
      if (merge) {
        if (p_.group >= 4) {
          Merge<kHeadDim / 16>(before);
        } else {
          Merge<kHeadDim / 64>(before);
        }
      }
      if (item.row < 0) return;
      before = item;
      if (++result == layout_.results) {
        result = 0;
        phase ^= 1;
      }
    }
  }

 private:
  __device__ __forceinline__ int64_t Pair(const Item& item) const {
    return static_cast<int64_t>(item.row) * p_.kv_heads + item.head;
  }
  __device__ __forceinline__ __nv_bfloat16* Out(const Item& item) const {
    return p_.out + item.row * p_.out_stride + static_cast<int64_t>(item.head) * p_.group * kHeadDim;
  }

  // The four warps' sums to the chunk's.
  template <int kWidth>
  __device__ __forceinline__ void Combine(const Item& item, int result) const {
    const float* o = reinterpret_cast<const float*>(shared_ + layout_.o + result * layout_.o_bytes);
    const float2* ml = reinterpret_cast<const float2*>(shared_ + layout_.ml) + result * kConsumerWarps * kMaxGroup;
    const int columns = p_.group * kHeadDim;
    const int64_t slot = Pair(item) * p_.max_chunks + item.chunk;
    for (int column = thread_ * kWidth; column < columns; column += kFinishers * kWidth) {
      const int g = column / kHeadDim;
      const int d = column % kHeadDim;
      Sums<kWidth> sums;
      float ms[kConsumerWarps], ls[kConsumerWarps], os[kConsumerWarps][kWidth];
#pragma unroll
      for (int warp = 0; warp < kConsumerWarps; ++warp) {
        const float2 x = ml[warp * kMaxGroup + g];
        ms[warp] = x.x;
        ls[warp] = x.y;
        LoadFloats<true>(os[warp], o + (warp * p_.group + g) * layout_.o_stride + d);
      }
      sums.Add(ms, ls, os);
      if (item.num_chunks == 1) {
        StoreOut(Out(item) + column, sums.o, 1 / sums.l);
      } else {
        StoreFloats(p_.partial_o + slot * columns + column, sums.o);
        if (d == 0) p_.partial_ml[slot * p_.group + g] = make_float2(sums.m, sums.l);
      }
    }
  }

  // The chunks of the item's pair, which all are in the workspace, to the result.
  template <int kWidth>
  __device__ __forceinline__ void Merge(const Item& item) const {
    constexpr int kBatch = kWidth <= 2 ? 16 : 8;  // chunks on their way at a time
    const int columns = p_.group * kHeadDim;
    const int64_t slot = Pair(item) * p_.max_chunks;
    for (int column = thread_ * kWidth; column < columns; column += kFinishers * kWidth) {
      const int g = column / kHeadDim;
      Sums<kWidth> sums;
      for (int begin = 0; begin < item.num_chunks; begin += kBatch) {
        float ms[kBatch], ls[kBatch], os[kBatch][kWidth];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int chunk = min(begin + i, item.num_chunks - 1);
          const float2 x = __ldcg(p_.partial_ml + (slot + chunk) * p_.group + g);
          ms[i] = begin + i < item.num_chunks ? x.x : -INFINITY;
          ls[i] = x.y;
          LoadFloats<false>(os[i], p_.partial_o + (slot + chunk) * columns + column);
        }
        sums.Add(ms, ls, os);
      }
      StoreOut(Out(item) + column, sums.o, 1 / sums.l);
    }
  }

  const Params& p_;
  const SharedLayout& layout_;
  unsigned char* const shared_;
  const int thread_;
};

}  // namespace soloist::cuda::decode

#endif  // SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_FINISH_CUH_
