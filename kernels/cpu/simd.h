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

// A tile of y = x w^T: `m` (1 to kTileRows) rows of x against rows [0, n) of w, k columns. out[i][j] -> out[i *
// out_stride + j].
inline constexpr int kTileRows = 4;
struct GemmTile {
  const float* x[kTileRows];
  float* out[kTileRows];
  int m = 0;
  const BFloat16* w = nullptr;
  int64_t w_stride = 0;
  int64_t n = 0;
  int64_t k = 0;
};
// F32 fused multiply-adds on widened weights.
void GemmTileFma(const GemmTile& tile);

// The same by the native bf16 dot product (AVX512_BF16): x is split into two bf16 parts, x = high + low + O(2^-17 x),
// so that nothing else is rounded. bytes: k * 2 per weight row; 2 dot products per 32 weights and row of x.
bool HasNativeBf16();
void GemmTileBf16(const GemmTile& tile);

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
