// Vector loops of the CPU backend, compiled for several instruction sets by Highway and chosen at run time. Every
// result is a function of its inputs in one fixed order of summation on a given machine: lanes over i in steps of the
// vector width, then one reduction.
#ifndef SOLOIST_KERNELS_CPU_SIMD_H_
#define SOLOIST_KERNELS_CPU_SIMD_H_

#include <cstdint>

#include "kernels/tensor.h"

namespace soloist {

// sum x[i] * y[i].
float Dot(const float* x, const float* y, int64_t n);
// out[r] = scale * sum x[i] * rows[r][i], for r in [0, count).
void DotRows(const float* x, const float* const* rows, int count, int64_t n, float scale, float* out);
void DotRows(const float* x, const BFloat16* const* rows, int count, int64_t n, float scale, float* out);
// y += a * x.
void Axpy(float a, const float* x, float* y, int64_t n);
// y += sum over r of a[r] * rows[r], in order of r.
void AxpyRows(const float* a, const float* const* rows, int count, int64_t n, float* y);
void AxpyRows(const float* a, const BFloat16* const* rows, int count, int64_t n, float* y);
// y *= a.
void Scale(float a, float* y, int64_t n);
// out = float(x).
void Widen(const BFloat16* x, float* out, int64_t n);
// Round to nearest even.
void Narrow(const float* x, BFloat16* out, int64_t n);
// gate[i] = silu(gate[i]) * up[i].
void SiluGate(float* gate, const float* up, int64_t n);
// x = 0.5 x (1 + erf(x / sqrt 2)).
void Gelu(float* x, int64_t n);
float Max(const float* x, int64_t n);
// sum exp(x[i] - shift); with out, also out[i] = exp(x[i] - shift).
float SumExp(const float* x, float shift, float* out, int64_t n);

// A tile of y = x w^T: `m` rows of x against rows [0, n) of w, k columns.
inline constexpr int kMaxTileRows = 64;
struct GemmTile {
  const float* x[kMaxTileRows];
  float* out[kMaxTileRows];  // out[i][j]: row i of x times row j of w
  int m = 0;
  const BFloat16* w = nullptr;
  int64_t w_stride = 0;
  int64_t n = 0;
  int64_t k = 0;
};

// A way to compute tiles of up to `rows` rows. An element has the same bits in whatever tile it is computed, but others
// by another kernel.
struct GemmKernel {
  const char* name;
  int rows;         // at most kMaxTileRows
  int64_t columns;  // of y that one task should compute where there are many rows
  void (*run)(const GemmTile& tile);
};
// F32 fused multiply-adds on widened weights.
const GemmKernel& FmaKernel();
// The bf16 dot product of AVX512_BF16: x is split into two bf16 parts, x = high + low + O(2^-18 x). 2 dot products per
// 32 weights and row of x. Null where the CPU has it not.
const GemmKernel* Bf16Kernel();
// The tile product of AMX_BF16: x is split into three bf16 parts, which hold all of it. 3 products per 16 x 32 weights
// and 16 rows of x. Null where the CPU has it not, or the kernel lets no process use it.
const GemmKernel* AmxKernel();

// F32 fused multiply-adds on registers: how many FLOPs a loop of `iterations` does; the sum keeps the compiler honest.
struct FmaLoop {
  double flops = 0;
  float sum = 0;
};
FmaLoop RunFmaLoop(int64_t iterations);
// Reads n floats (a multiple of 256).
float ReadLoop(const float* x, int64_t n);

}  // namespace soloist

#endif  // SOLOIST_KERNELS_CPU_SIMD_H_
