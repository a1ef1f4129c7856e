// What the Highway files share: F32 vectors, and loads of F32 and bf16 as such. Included once per instruction set.
#if defined(SOLOIST_KERNELS_CPU_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SOLOIST_KERNELS_CPU_VECTOR_INL_H_
#undef SOLOIST_KERNELS_CPU_VECTOR_INL_H_
#else
#define SOLOIST_KERNELS_CPU_VECTOR_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "kernels/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace soloist {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::ScalableTag<float>;
using B = hn::Rebind<hwy::bfloat16_t, F>;
using V = hn::Vec<F>;

HWY_INLINE V LoadWide(F d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE V LoadWide(F d, const BFloat16* p) {
  return hn::PromoteTo(d, hn::LoadU(B(), reinterpret_cast<const hwy::bfloat16_t*>(p)));
}
// The last n < Lanes elements, zero-filled.
template <typename T>
HWY_INLINE V LoadTail(F d, const T* p, int64_t n) {
  HWY_ALIGN T buffer[HWY_LANES(float)] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return LoadWide(d, buffer);
}
HWY_INLINE void StoreTail(V v, F d, float* p, int64_t n) {
  HWY_ALIGN float buffer[HWY_LANES(float)];
  hn::Store(v, d, buffer);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
HWY_INLINE float Reduce(F d, V v) { return hn::GetLane(hn::SumOfLanes(d, v)); }

}  // namespace HWY_NAMESPACE
}  // namespace soloist
HWY_AFTER_NAMESPACE();

#endif  // SOLOIST_KERNELS_CPU_VECTOR_INL_H_
