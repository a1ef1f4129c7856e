// The only file that is compiled for AVX512_BF16; nothing in it runs without the cpuid check.
#include <immintrin.h>

#include <cstring>

#include "kernels/cpu/simd.h"
#include "kernels/cpu/thread_buffer.h"

namespace soloist {
namespace {

constexpr int64_t kStep = 32;
constexpr int kRows = 4;

// Rows of x as two bf16 parts, zero-filled to a multiple of kStep.
struct Split {
  uint16_t* high[kRows];
  uint16_t* low[kRows];
};

__m512i Bits(const uint16_t* p) { return _mm512_loadu_si512(p); }

// high = bf16(x), low = bf16(x - high), both rounded to nearest: x = high + low up to 2^-18 |x|.
void SplitRow(const float* x, int64_t k, uint16_t* high, uint16_t* low) {
  int64_t i = 0;
  for (; i < k; i += 16) {
    const __mmask16 lanes = k - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (k - i)) - 1);
    const __m512 value = _mm512_maskz_loadu_ps(lanes, x + i);
    const __m256i top_bits = (__m256i)_mm512_cvtneps_pbh(value);
    const __m512 top = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(top_bits), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i), top_bits);
    const __m256bh rest = _mm512_cvtneps_pbh(_mm512_sub_ps(value, top));
    std::memcpy(low + i, &rest, 32);
  }
  for (; i % kStep != 0; i += 16) {
    std::memset(high + i, 0, 32);
    std::memset(low + i, 0, 32);
  }
}

// Sums of the lanes of 16 vectors, [a][b] in lane 4 a + b: each by the tree i + (i + 8), + 4, + 2, + 1, as
// _mm512_reduce_add_ps does, with a third of its instructions.
[[gnu::always_inline]] inline __m512 ReduceAll(const __m512 (&v)[4][4]) {
  const auto halves = [](__m512 p, __m512 q) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xee));
  };
  const auto quarters = [](__m512 p, __m512 q) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
  };
  __m512 column[4];  // 4 partial sums of each row
  for (int b = 0; b < 4; ++b) column[b] = quarters(halves(v[0][b], v[1][b]), halves(v[2][b], v[3][b]));
  const auto pairs = [](__m512 p, __m512 q) {
    return _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
  };
  const __m512 p = pairs(column[0], column[1]), q = pairs(column[2], column[3]);
  return _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x88), _mm512_shuffle_ps(p, q, 0xdd));
}

// Rows of w ahead of those in work that are fetched into the second-level cache. Measured on an EPYC with 2 cores, 1024
// columns: 28 GB/s without, 33 GB/s with, as a plain read; into the first-level cache it does not help.
constexpr int64_t kPrefetchRows = 8;

template <int M, int N>
void Micro(const GemmTile& t, const Split& x, int64_t j) {
  __m512 sum[M][N];
  for (int a = 0; a < M; ++a) {
    for (int b = 0; b < N; ++b) sum[a][b] = _mm512_setzero_ps();
  }
  const BFloat16* w = t.w + j * t.w_stride;
  const auto step = [&](int64_t i, auto load) {
    for (int b = 0; b < N; ++b) {
      if (M == 1) _mm_prefetch(w + (b + kPrefetchRows) * t.w_stride + i, _MM_HINT_T1);
      const __m512i bits = load(w + b * t.w_stride + i);
      for (int a = 0; a < M; ++a) {
        sum[a][b] = _mm512_dpbf16_ps(sum[a][b], (__m512bh)Bits(x.high[a] + i), (__m512bh)bits);
        sum[a][b] = _mm512_dpbf16_ps(sum[a][b], (__m512bh)Bits(x.low[a] + i), (__m512bh)bits);
      }
    }
  };
  int64_t i = 0;
  for (; i + kStep <= t.k; i += kStep) {
    step(i, [](const BFloat16* p) { return _mm512_loadu_si512(p); });
  }
  if (i < t.k) {
    const __mmask32 lanes = (1u << (t.k - i)) - 1;
    step(i, [lanes](const BFloat16* p) { return _mm512_maskz_loadu_epi16(lanes, p); });
  }
  if constexpr (N == 1) {
    for (int a = 0; a < M; ++a) t.out[a][j] = _mm512_reduce_add_ps(sum[a][0]);
  } else {
    // One row's N columns, or M rows' 4.
    constexpr int kGroups = N / 4;
    __m512 all[4][4] = {};
    for (int a = 0; a < M; ++a) {
      for (int b = 0; b < N; ++b) all[a * kGroups + b / 4][b % 4] = sum[a][b];
    }
    alignas(64) float sums[4][4];
    _mm512_store_ps(sums, ReduceAll(all));
    for (int a = 0; a < M; ++a) std::memcpy(t.out[a] + j, sums[a * kGroups], N * sizeof(float));
  }
}

template <int M, int N>
void Sweep(const GemmTile& t, const Split& x) {
  int64_t j = 0;
  for (; j + N <= t.n; j += N) Micro<M, N>(t, x, j);
  for (; j < t.n; ++j) Micro<M, 1>(t, x, j);
}

void RunBf16(const GemmTile& t) {
  const int64_t stride = (t.k + kStep - 1) / kStep * kStep;
  thread_local ThreadBuffer buffer;
  auto* part = buffer.Get<uint16_t>(2 * t.m * stride);
  Split split;
  for (int a = 0; a < t.m; ++a, part += 2 * stride) {
    split.high[a] = part;
    split.low[a] = part + stride;
    SplitRow(t.x[a], t.k, split.high[a], split.low[a]);
  }
  switch (t.m) {
    case 1:
      return Sweep<1, 8>(t, split);
    case 2:
      return Sweep<2, 4>(t, split);
    case 3:
      return Sweep<3, 4>(t, split);
    default:
      return Sweep<4, 4>(t, split);
  }
}

}  // namespace

const GemmKernel* Bf16Kernel() {
  static const GemmKernel kernel = {.name = "avx512_bf16", .rows = kRows, .columns = 128, .run = RunBf16};
  static const bool has =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return has ? &kernel : nullptr;
}

}  // namespace soloist
