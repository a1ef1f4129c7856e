#include "kernels/cpu/simd.h"

#include <algorithm>
#include <cmath>
#include <limits>

// The order matters: foreach_target.h compiles this file once per instruction set.
// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
#include "kernels/cpu/vector-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace soloist {
namespace HWY_NAMESPACE {

float DotF(const float* x, const float* y, int64_t n) {
  const F d;
  const int64_t lanes = hn::Lanes(d);
  V sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sum = hn::MulAdd(hn::LoadU(d, x + i), hn::LoadU(d, y + i), sum);
  if (i < n) sum = hn::MulAdd(LoadTail(d, x + i, n - i), LoadTail(d, y + i, n - i), sum);
  return Reduce(d, sum);
}

// Dot of x with each of kRows rows; every row in the same order of summation.
template <int kRows, typename T>
HWY_INLINE void DotSome(const float* x, const T* const* rows, int64_t n, float scale, float* out) {
  const F d;
  const int64_t lanes = hn::Lanes(d);
  V sum[kRows];
  for (V& s : sum) s = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const V vx = hn::LoadU(d, x + i);
    for (int r = 0; r < kRows; ++r) sum[r] = hn::MulAdd(vx, LoadWide(d, rows[r] + i), sum[r]);
  }
  if (i < n) {
    const V vx = LoadTail(d, x + i, n - i);
    for (int r = 0; r < kRows; ++r) sum[r] = hn::MulAdd(vx, LoadTail(d, rows[r] + i, n - i), sum[r]);
  }
  for (int r = 0; r < kRows; ++r) out[r] = Reduce(d, sum[r]) * scale;
}
template <typename T>
HWY_INLINE void DotRowsT(const float* x, const T* const* rows, int count, int64_t n, float scale, float* out) {
  int r = 0;
  for (; r + 4 <= count; r += 4) DotSome<4>(x, rows + r, n, scale, out + r);
  for (; r < count; ++r) DotSome<1>(x, rows + r, n, scale, out + r);
}
void DotRowsF(const float* x, const float* const* rows, int count, int64_t n, float scale, float* out) {
  DotRowsT(x, rows, count, n, scale, out);
}
void DotRowsB(const float* x, const BFloat16* const* rows, int count, int64_t n, float scale, float* out) {
  DotRowsT(x, rows, count, n, scale, out);
}

// kVectors of y stay in registers while all rows are added, in order.
template <int kVectors, typename T>
HWY_INLINE void AddRowsTo(const float* a, const T* const* rows, int count, int64_t at, float* y) {
  const F d;
  const int64_t lanes = hn::Lanes(d);
  V sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = hn::LoadU(d, y + at + v * lanes);
  for (int r = 0; r < count; ++r) {
    const V va = hn::Set(d, a[r]);
    for (int v = 0; v < kVectors; ++v) sum[v] = hn::MulAdd(va, LoadWide(d, rows[r] + at + v * lanes), sum[v]);
  }
  for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[v], d, y + at + v * lanes);
}
template <typename T>
HWY_INLINE void AxpyRowsT(const float* a, const T* const* rows, int count, int64_t n, float* y) {
  const F d;
  const int64_t lanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) AddRowsTo<4>(a, rows, count, i, y);
  for (; i + lanes <= n; i += lanes) AddRowsTo<1>(a, rows, count, i, y);
  if (i == n) return;
  V sum = LoadTail(d, y + i, n - i);
  for (int r = 0; r < count; ++r) sum = hn::MulAdd(hn::Set(d, a[r]), LoadTail(d, rows[r] + i, n - i), sum);
  StoreTail(sum, d, y + i, n - i);
}
void AxpyRowsF(const float* a, const float* const* rows, int count, int64_t n, float* y) {
  AxpyRowsT(a, rows, count, n, y);
}
void AxpyRowsB(const float* a, const BFloat16* const* rows, int count, int64_t n, float* y) {
  AxpyRowsT(a, rows, count, n, y);
}

// y = f(y, x) elementwise.
template <typename T, typename Function>
HWY_INLINE void Map(float* y, const T* x, int64_t n, const Function& function) {
  const F d;
  const int64_t lanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(function(d, hn::LoadU(d, y + i), LoadWide(d, x + i)), d, y + i);
  if (i < n) StoreTail(function(d, LoadTail(d, y + i, n - i), LoadTail(d, x + i, n - i)), d, y + i, n - i);
}
void AxpyF(float a, const float* x, float* y, int64_t n) {
  Map(y, x, n, [a](F d, V vy, V vx) HWY_ATTR { return hn::MulAdd(hn::Set(d, a), vx, vy); });
}
void ScaleF(float a, float* y, int64_t n) {
  Map(y, y, n, [a](F d, V vy, V) HWY_ATTR { return hn::Mul(hn::Set(d, a), vy); });
}
void WidenB(const BFloat16* x, float* out, int64_t n) {
  const F d;
  const int64_t lanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(LoadWide(d, x + i), d, out + i);
  if (i < n) StoreTail(LoadTail(d, x + i, n - i), d, out + i, n - i);
}
void SiluGateF(float* gate, const float* up, int64_t n) {
  Map(gate, up, n, [](F d, V g, V u) HWY_ATTR {
    const V one = hn::Set(d, 1.0f);
    return hn::Mul(hn::Div(g, hn::Add(one, hn::Exp(d, hn::Neg(g)))), u);
  });
}
float MaxF(const float* x, int64_t n) {
  const F d;
  const int64_t lanes = hn::Lanes(d);
  V best = hn::Set(d, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) best = hn::Max(best, hn::LoadU(d, x + i));
  float result = hn::GetLane(hn::MaxOfLanes(d, best));
  for (; i < n; ++i) result = std::max(result, x[i]);
  return result;
}
float SumExpF(const float* x, float shift, float* out, int64_t n) {
  const F d;
  const int64_t lanes = hn::Lanes(d);
  const V vshift = hn::Set(d, shift);
  V sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const V e = hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), vshift));
    if (out != nullptr) hn::StoreU(e, d, out + i);
    sum = hn::Add(sum, e);
  }
  if (i < n) {
    HWY_ALIGN float buffer[HWY_LANES(float)];
    std::fill(buffer, buffer + lanes, -std::numeric_limits<float>::infinity());
    std::copy(x + i, x + n, buffer);
    // Highway's Exp gives 0 far below zero; shift keeps -inf out of it.
    const V e = hn::Exp(d, hn::Max(hn::Sub(hn::Load(d, buffer), vshift), hn::Set(d, -1000.0f)));
    if (out != nullptr) StoreTail(e, d, out + i, n - i);
    sum = hn::Add(sum, e);
  }
  return Reduce(d, sum);
}

FmaLoop FmaLoopF(int64_t iterations) {
  const F d;
  V sum[10];
  for (int i = 0; i < 10; ++i) sum[i] = hn::Set(d, static_cast<float>(i));
  const V a = hn::Set(d, 0.999f), b = hn::Set(d, 0.001f);
  for (int64_t n = 0; n < iterations; ++n) {
    for (int i = 0; i < 10; ++i) sum[i] = hn::MulAdd(sum[i], a, b);
  }
  V all = sum[0];
  for (int i = 1; i < 10; ++i) all = hn::Add(all, sum[i]);
  return {.flops = static_cast<double>(iterations) * 20.0 * static_cast<double>(hn::Lanes(d)), .sum = Reduce(d, all)};
}

float ReadLoopF(const float* x, int64_t n) {
  const F d;
  const int64_t lanes = hn::Lanes(d);
  V sum[8];
  for (V& s : sum) s = hn::Zero(d);
  for (int64_t i = 0; i < n; i += 8 * lanes) {
    for (int j = 0; j < 8; ++j) sum[j] = hn::Add(sum[j], hn::LoadU(d, x + i + j * lanes));
  }
  V all = sum[0];
  for (int i = 1; i < 8; ++i) all = hn::Add(all, sum[i]);
  return Reduce(d, all);
}

}  // namespace HWY_NAMESPACE
}  // namespace soloist
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace soloist {

HWY_EXPORT(DotF);
HWY_EXPORT(DotRowsF);
HWY_EXPORT(DotRowsB);
HWY_EXPORT(AxpyRowsF);
HWY_EXPORT(AxpyRowsB);
HWY_EXPORT(AxpyF);
HWY_EXPORT(ScaleF);
HWY_EXPORT(WidenB);
HWY_EXPORT(SiluGateF);
HWY_EXPORT(MaxF);
HWY_EXPORT(SumExpF);
HWY_EXPORT(FmaLoopF);
HWY_EXPORT(ReadLoopF);

float Dot(const float* x, const float* y, int64_t n) { return HWY_DYNAMIC_DISPATCH(DotF)(x, y, n); }
void Axpy(float a, const float* x, float* y, int64_t n) { HWY_DYNAMIC_DISPATCH(AxpyF)(a, x, y, n); }
void DotRows(const float* x, const float* const* rows, int count, int64_t n, float scale, float* out) {
  HWY_DYNAMIC_DISPATCH(DotRowsF)(x, rows, count, n, scale, out);
}
void DotRows(const float* x, const BFloat16* const* rows, int count, int64_t n, float scale, float* out) {
  HWY_DYNAMIC_DISPATCH(DotRowsB)(x, rows, count, n, scale, out);
}
void AxpyRows(const float* a, const float* const* rows, int count, int64_t n, float* y) {
  HWY_DYNAMIC_DISPATCH(AxpyRowsF)(a, rows, count, n, y);
}
void AxpyRows(const float* a, const BFloat16* const* rows, int count, int64_t n, float* y) {
  HWY_DYNAMIC_DISPATCH(AxpyRowsB)(a, rows, count, n, y);
}
void Scale(float a, float* y, int64_t n) { HWY_DYNAMIC_DISPATCH(ScaleF)(a, y, n); }
void Widen(const BFloat16* x, float* out, int64_t n) { HWY_DYNAMIC_DISPATCH(WidenB)(x, out, n); }
void SiluGate(float* gate, const float* up, int64_t n) { HWY_DYNAMIC_DISPATCH(SiluGateF)(gate, up, n); }
float Max(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(MaxF)(x, n); }
float SumExp(const float* x, float shift, float* out, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(SumExpF)(x, shift, out, n);
}
FmaLoop RunFmaLoop(int64_t iterations) { return HWY_DYNAMIC_DISPATCH(FmaLoopF)(iterations); }
float ReadLoop(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(ReadLoopF)(x, n); }

void Narrow(const float* x, BFloat16* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    out[i].bits = (bits & 0x7fffffff) > 0x7f800000 ? static_cast<uint16_t>((bits >> 16) | 0x40)
                                                   : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

void Gelu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
}

}  // namespace soloist
#endif  // HWY_ONCE
