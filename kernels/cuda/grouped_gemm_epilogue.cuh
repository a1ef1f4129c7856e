// From sums to out in grouped_gemm_kernel.cuh: activation, rounding, transposition through shared memory.
#ifndef SOLOIST_KERNELS_CUDA_GROUPED_GEMM_EPILOGUE_CUH_
#define SOLOIST_KERNELS_CUDA_GROUPED_GEMM_EPILOGUE_CUH_

#include <cuda_bf16.h>

#include "kernels/cuda/grouped_gemm_ptx.cuh"
#include "kernels/cuda/grouped_gemm_units.cuh"

namespace soloist::cuda {

// 0.5 x (1 + erf(x / sqrt 2)) = max(x, 0) - |x| exp(-x^2 / 2) q(|x|) with q(t) = exp(t^2 / 2) erfc(t / sqrt 2) / 2,
// here a polynomial on [0, 6]. Within 1e-4 of the value (of 1e-5 below x = -4.5), a twentieth of bf16's rounding; erff
// takes half as long again.
__device__ __forceinline__ float Gelu(float x) {
  const float t = fminf(fabsf(x), 6.0f);
  float q = -7.040954641e-7f;
  q = fmaf(q, t, 2.211341688e-5f);
  q = fmaf(q, t, -3.040807206e-4f);
  q = fmaf(q, t, 2.423126875e-3f);
  q = fmaf(q, t, -1.254093087e-2f);
  q = fmaf(q, t, 4.512734260e-2f);
  q = fmaf(q, t, -1.193526861e-1f);
  q = fmaf(q, t, 2.441356241e-1f);
  q = fmaf(q, t, -3.978910329e-1f);
  q = fmaf(q, t, 4.999661087e-1f);
  const float density = ptx::Exp2(x * -0.72134752f * x);
  return fmaf(-fabsf(x) * density, q, fmaxf(x, 0.0f));
}
__device__ __forceinline__ float SiluGate(float g, float u) { return __fdividef(g, 1.0f + __expf(-g)) * u; }

// What a consumer thread needs to know.
struct Consumer {
  uint32_t stages_at;  // shared memory
  uint32_t full_at;
  uint32_t empty_at;
  uint32_t staging_at;
  uint32_t stage_bytes;
  const CUtensorMap* out_map;
  int group;   // 0, 1
  int thread;  // of the group
  int warp;
  int lane;
};

// Puts 16 x rows (columns of the product; v: this thread's part) into place `slot` of a staging area. Its rows
// have 128 bytes (64 if gated) and the copy engine's swizzle of that width, which keeps 8 of them on distinct banks.
template <typename Variant>
__device__ __forceinline__ void StageRows(const Consumer& me, uint32_t staging_at, int slot, const float* v) {
  const int i = me.lane & 7;
  if constexpr (Variant::kGated) {
    const int row = slot * 16 + ((me.lane >> 3) & 1) * 8 + i;
    ptx::StoreTransposed2(staging_at + row * 64 + ((me.warp ^ (row >> 1)) & 3) * 16,
                          ptx::Pack(SiluGate(v[0], v[2]), SiluGate(v[1], v[3])),
                          ptx::Pack(SiluGate(v[4], v[6]), SiluGate(v[5], v[7])));
  } else {
    float y[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) y[c] = Variant::kActivation == GroupedActivation::kGelu ? Gelu(v[c]) : v[c];
    const int matrix = me.lane >> 3;
    const int row = slot * 16 + (matrix >> 1) * 8 + i;
    ptx::StoreTransposed4(staging_at + row * 128 + ((me.warp * 2 + (matrix & 1)) ^ i) * 16, ptx::Pack(y[0], y[1]),
                          ptx::Pack(y[2], y[3]), ptx::Pack(y[4], y[5]), ptx::Pack(y[6], y[7]));
  }
}

// Writes the staged rows, the first of which is x row `first` of the unit, to out, all but those past the unit's last
// and the columns past out's. `column`: the group's first. Between two GroupSync.
template <typename Variant>
__device__ __forceinline__ void StoreRows(const GroupedKernelParams& params, const Consumer& me, const UnitCursor& unit,
                                          uint32_t staging_at, int column, int first, int count) {
  constexpr bool kGated = Variant::kGated;
  constexpr int kPieces = kGated ? 4 : 8;  // of 16 bytes, in a row
  for (int index = me.thread; index < count * kPieces; index += 128) {
    const int row = index / kPieces;
    const int piece = index % kPieces;
    const int swizzled = kGated ? (piece ^ (row >> 1)) & 3 : piece ^ (row & 7);
    if (first + row < unit.rows && column + piece * 8 < params.columns) {
      const uint4 v = ptx::LoadShared16(staging_at + row * (kPieces * 16) + swizzled * 16);
      *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(params.out) +
                                (unit.row_begin + first + row) * params.out_stride + column + piece * 8) = v;
    }
  }
}

// Writes 16 x rows, the first of which is x row `first` of the unit, as f32: 8 lanes fill a sector of 32 bytes.
__device__ __forceinline__ void StoreFloats(const GroupedKernelParams& params, const Consumer& me,
                                            const UnitCursor& unit, int column, int first, const float* v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = first + (i / 4) * 8 + (me.lane % 4) * 2 + i % 2;
    const int at = column + me.warp * 16 + (i / 2 % 2) * 8 + me.lane / 4;
    if (row < unit.rows && at < params.columns) {
      static_cast<float*>(params.out)[(unit.row_begin + row) * params.out_stride + at] = v[i];
    }
  }
}

// Writes a whole product to out. bf16: some rows at a time, by the copy engine where all of them are the expert's.
template <typename Variant, int N>
__device__ __forceinline__ void StoreProduct(const GroupedKernelParams& params, const Consumer& me,
                                             const UnitCursor& unit, int column, const float (&acc)[128]) {
  if constexpr (Variant::kFloat) {
#pragma unroll
    for (int i = 0; i < N / 16; ++i) StoreFloats(params, me, unit, column, i * 16, acc + i * 8);
    return;
  }
  constexpr int kRows = kGroupedChunkRows;
#pragma unroll
  for (int chunk = 0; chunk < N / kRows; ++chunk) {
    const uint32_t at = me.staging_at + (params.staging_buffers == 2 ? (chunk & 1) * kGroupedStagingBytes : 0);
    if (me.thread == 0) {
      // The last store from this area has read it.
      if (params.staging_buffers == 2) {
        ptx::StoreWaitRead<1>();
      } else {
        ptx::StoreWaitRead<0>();
      }
    }
    ptx::GroupSync(1 + me.group, 128);
#pragma unroll
    for (int slot = 0; slot < kRows / 16; ++slot) {
      StageRows<Variant>(me, at, slot, acc + (chunk * (kRows / 16) + slot) * 8);
    }
    ptx::ProxyFence();
    ptx::GroupSync(1 + me.group, 128);
    const bool whole = (chunk + 1) * kRows <= unit.rows;
    if (me.thread == 0) {
      if (whole) ptx::Store2d(me.out_map, at, column, unit.row_begin + chunk * kRows);
      ptx::StoreCommit();
    }
    if (!whole) StoreRows<Variant>(params, me, unit, at, column, chunk * kRows, kRows);
  }
}

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_GROUPED_GEMM_EPILOGUE_CUH_
