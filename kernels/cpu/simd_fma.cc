// Products by F32 fused multiply-adds on widened weights, for every instruction set that Highway has. An output element
// is the sum over lanes, each of which adds up its columns in their order.
#include <algorithm>

#include "kernels/cpu/simd.h"
#include "kernels/cpu/thread_buffer.h"

// The order matters: foreach_target.h compiles this file once per instruction set.
// clang-format off
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd_fma.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/cache_control.h"
#include "kernels/cpu/vector-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace soloist {
namespace HWY_NAMESPACE {

// Sums of the lanes of v[0..kCount) (a power of two, at most as many as lanes) in the first lanes of one vector: each
// by the tree of neighbours, whatever kCount is.
template <int kCount>
HWY_INLINE V Merge(F d, const V* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    const V low = Merge<kCount / 2>(d, v), high = Merge<kCount / 2>(d, v + kCount / 2);
    return hn::Add(hn::ConcatEven(d, high, low), hn::ConcatOdd(d, high, low));
  }
}
template <int kCount>
HWY_INLINE V ReduceEach(F d, const V* v) {
  V all = Merge<kCount>(d, v);
  for (int groups = HWY_LANES(float) / kCount; groups > 1; groups /= 2) {
    all = hn::Add(hn::ConcatEven(d, all, all), hn::ConcatOdd(d, all, all));
  }
  return all;
}

// A tile of more than kFewRows rows of x widens kWidened rows of w together, kPanel columns of them at a time, which
// stay in the first-level cache while all rows of x pass. Of these kAtOnce are in work.
constexpr int kFewRows = 4, kWidened = 8, kAtOnce = HWY_LANES(float) >= 16 ? 4 : 2;
constexpr int64_t kPanel = 528;  // no power of two: the rows would share a few sets of the cache
// Rows of w ahead of those in work that are fetched, where w streams through once. Measured on a Xeon with 2 cores,
// 1024 columns: 21 GB/s without, 28 GB/s with, a plain read 33.
constexpr int64_t kPrefetchRows = 8;

// Sums of kM rows of x times kN of w.
template <int kM, int kN>
struct Sums {
  V v[kM * kN];

  HWY_INLINE void Clear() {
    for (V& s : v) s = hn::Zero(F());
  }
  // Those of a panel before.
  HWY_INLINE void Load(const float* from) {
    for (int s = 0; s < kM * kN; ++s) v[s] = hn::LoadU(F(), from + s * HWY_LANES(float));
  }
  HWY_INLINE void Store(float* to) const {
    for (int s = 0; s < kM * kN; ++s) hn::StoreU(v[s], F(), to + s * HWY_LANES(float));
  }
  // Columns [i, end).
  template <typename T>
  HWY_INLINE void Add(const float* const* x, const T* w, int64_t w_stride, int64_t i, int64_t end) {
    const F d;
    const int64_t lanes = hn::Lanes(d);
    for (; i + lanes <= end; i += lanes, w += lanes) {
      V vx[kM];
      for (int a = 0; a < kM; ++a) {
        vx[a] = hn::LoadU(d, x[a] + i);
#if HWY_ARCH_X86 && HWY_COMPILER_GCC_ACTUAL
        // Keeps it in a register: GCC would load it again for each row of w.
        if (kM > 1) asm("" : "+x"(vx[a].raw));
#endif
      }
      for (int b = 0; b < kN; ++b) {
        if (kM == 1) hwy::Prefetch(w + (b + kPrefetchRows) * w_stride);
        const V wide = LoadWide(d, w + b * w_stride);
        for (int a = 0; a < kM; ++a) v[a * kN + b] = hn::MulAdd(vx[a], wide, v[a * kN + b]);
      }
    }
    if (i < end) {
      for (int b = 0; b < kN; ++b) {
        const V wide = LoadTail(d, w + b * w_stride, end - i);
        for (int a = 0; a < kM; ++a) {
          v[a * kN + b] = hn::MulAdd(LoadTail(d, x[a] + i, end - i), wide, v[a * kN + b]);
        }
      }
    }
  }
  // out[a][j + b].
  HWY_INLINE void Reduce(float* const* out, int64_t j) const {
    // As many together as there are lanes, of one row of x at least.
    constexpr int kLanes = HWY_LANES(float), kAll = kM * kN;
    constexpr int kTogether = kM != 3 && kAll <= kLanes ? kAll : kN < kLanes ? kN : kLanes;
    float sums[kAll + kLanes];  // a store reaches over what was summed up
    for (int s = 0; s < kAll; s += kTogether) hn::StoreU(ReduceEach<kTogether>(F(), v + s), F(), sums + s);
    for (int a = 0; a < kM; ++a) std::copy_n(sums + a * kN, kN, out[a] + j);
  }
};

// Few rows of x: w streams through once, kN rows at a time.
template <int kM, int kN>
HWY_INLINE void Stream(const GemmTile& t) {
  int64_t j = 0;
  for (; j + kN <= t.n; j += kN) {
    Sums<kM, kN> sums;
    sums.Clear();
    sums.Add(t.x, t.w + j * t.w_stride, t.w_stride, 0, t.k);
    sums.Reduce(t.out, j);
  }
  for (; j < t.n; ++j) {
    Sums<kM, 1> sums;
    sums.Clear();
    sums.Add(t.x, t.w + j * t.w_stride, t.w_stride, 0, t.k);
    sums.Reduce(t.out, j);
  }
}

// kM rows of x against `rows` widened ones (of w's rows from j on), columns [begin, end). `carried` has the sums from
// panel to panel.
template <int kM, int kN>
HWY_INLINE void PanelPart(const GemmTile& t, int a, int64_t j, int b, const float* wide, int64_t begin, int64_t end,
                          float* carried) {
  Sums<kM, kN> sums;
  begin == 0 ? sums.Clear() : sums.Load(carried);
  sums.Add(t.x + a, wide + b * kPanel, kPanel, begin, end);
  end == t.k ? sums.Reduce(t.out + a, j + b) : sums.Store(carried);
}
template <int kM>
HWY_INLINE void PanelRows(const GemmTile& t, int a, int64_t j, int rows, const float* wide, int64_t begin, int64_t end,
                          float* carried) {
  constexpr int64_t kFloats = kM * HWY_LANES(float);  // of the sums with one row of w
  int b = 0;
  for (; b + kAtOnce <= rows; b += kAtOnce) {
    PanelPart<kM, kAtOnce>(t, a, j, b, wide, begin, end, carried + b * kFloats);
  }
  for (; b < rows; ++b) PanelPart<kM, 1>(t, a, j, b, wide, begin, end, carried + b * kFloats);
}

void GemmTileF(const GemmTile& t) {
  switch (t.m) {
    case 1:
      return Stream<1, 8>(t);
    case 2:
      return Stream<2, 4>(t);
    case 3:
      return Stream<3, kAtOnce>(t);
    case kFewRows:
      return Stream<kFewRows, kAtOnce>(t);
    default:
      break;
  }
  constexpr int64_t kCarried = kWidened * HWY_LANES(float);  // floats for a row of x
  thread_local ThreadBuffer buffer;
  float* const wide = buffer.Get<float>(kWidened * kPanel + kCarried * kMaxTileRows);
  float* const carried = wide + kWidened * kPanel;
  for (int64_t j = 0; j < t.n; j += kWidened) {
    const int rows = static_cast<int>(std::min<int64_t>(kWidened, t.n - j));
    for (int64_t begin = 0; begin < t.k; begin += kPanel) {
      const int64_t end = std::min(begin + kPanel, t.k);
      for (int b = 0; b < rows; ++b) {
        Widen(t.w + (j + b) * t.w_stride + begin, wide + b * kPanel, end - begin);
      }
      int a = 0;
      for (; a + kFewRows <= t.m; a += kFewRows) {
        PanelRows<kFewRows>(t, a, j, rows, wide, begin, end, carried + a * kCarried);
      }
      for (; a < t.m; ++a) PanelRows<1>(t, a, j, rows, wide, begin, end, carried + a * kCarried);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace soloist
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace soloist {

HWY_EXPORT(GemmTileF);

const GemmKernel& FmaKernel() {
  static const GemmKernel kernel = {
      .name = "fma", .rows = kMaxTileRows, .columns = 128, .run = [](const GemmTile& tile) {
        HWY_DYNAMIC_DISPATCH(GemmTileF)(tile);
      }};
  return kernel;
}

}  // namespace soloist
#endif  // HWY_ONCE
