// The only file that is compiled for AMX; nothing in it runs before AmxKernel has asked for the tile registers.
//
// x is split into three bf16 parts, which hold all 24 bits of its mantissa: x = high + middle + low, so that products
// are exact and only their sums are rounded, to F32. An output element is the sum over steps of 32 columns, within a
// step first of all high parts, then middle, then low, each in the order of the columns (Intel's TDPBF16PS): the same
// bits in whatever tile and place it is computed.
//
// Tiles: 16 rows of w as they lie (A) times 16 rows of x as columns of pairs (B) give 16 x 16 elements of y transposed.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "kernels/cpu/simd.h"
#include "kernels/cpu/thread_buffer.h"

namespace soloist {
namespace {

constexpr int kTile = 16;                       // rows of a tile
constexpr int64_t kStep = 32;                   // columns of w in a tile
constexpr int kParts = 3;                       // of x
constexpr int kArchRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, Linux 5.16
constexpr int kTileData = 18;                   // XFEATURE_XTILEDATA

// The operand of ldtilecfg: tiles 0 to 3 sum up, 4 and 5 hold w, 6 and 7 x. `rows` of w (at most kTile), of x
// `columns`.
struct alignas(64) TileConfig {
  TileConfig(int rows, int columns) {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 64 : 4 * columns);
      tile_rows[i] = static_cast<uint8_t>(i < 6 ? rows : kTile);
    }
  }
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t tile_rows[16] = {};
};

// v[i] lane j <-> v[j] lane i.
[[gnu::always_inline]] inline void Transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now quarter q of v[4 g + j] holds column 4 q + j of rows 4 g to 4 g + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), odd0 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// 4 rows of 16 lanes as 16 rows of 4.
[[gnu::always_inline]] inline void Transpose(__m512i (&v)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  // Quarter q of column[j]: the 4 rows at lane 4 q + j.
  const __m512i column[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                             _mm512_unpackhi_epi64(b, d)};
  const __m512i low01 = _mm512_shuffle_i32x4(column[0], column[1], 0x44);
  const __m512i low23 = _mm512_shuffle_i32x4(column[2], column[3], 0x44);
  const __m512i high01 = _mm512_shuffle_i32x4(column[0], column[1], 0xee);
  const __m512i high23 = _mm512_shuffle_i32x4(column[2], column[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
  v[1] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
  v[2] = _mm512_shuffle_i32x4(high01, high23, 0x88);
  v[3] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
}
// One row of 16 lanes is 16 rows of one.
[[gnu::always_inline]] inline void Transpose(__m512i (&)[1]) {}

// bf16(rest), which is taken from it: what is left is exact.
[[gnu::always_inline]] inline __m256i TakePart(__m512& rest) {
  const __m256i part = (__m256i)_mm512_cvtneps_pbh(rest);
  rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
  return part;
}

// Up to `columns` rows of x as B tiles: for each step its high, middle and low parts; row r of a tile holds columns 2 r
// and 2 r + 1 of every row of x.
struct Packed {
  const uint8_t* data;
  int columns;  // 1, 4 or kTile: few rows of x cost less to pack
  int64_t row_bytes() const { return int64_t{4} * columns; }
  int64_t part_bytes() const { return kTile * row_bytes(); }
};

// x[0..m) (m <= kColumns). Rows from m on and columns from k on are zero.
template <int kColumns>
void Pack(const float* const* x, int m, int64_t k, uint8_t* out) {
  __m512i parts[kParts][kColumns];
  for (auto& part : parts) std::fill_n(part, kColumns, _mm512_setzero_si512());
  for (int64_t i = 0; i < k; i += kStep) {
    const auto mask = [&](int64_t at) {
      return static_cast<__mmask16>(k - at >= 16 ? 0xffff : k > at ? (1u << (k - at)) - 1 : 0);
    };
    for (int a = 0; a < m; ++a) {
      __m512 rest[2] = {_mm512_maskz_loadu_ps(mask(i), x[a] + i), _mm512_maskz_loadu_ps(mask(i + 16), x[a] + i + 16)};
      for (auto& part : parts) {
        const __m256i left = TakePart(rest[0]), right = TakePart(rest[1]);
        part[a] = _mm512_inserti64x4(_mm512_castsi256_si512(left), right, 1);
      }
    }
    for (const auto& part : parts) {
      __m512i rows[kColumns];
      std::copy_n(part, kColumns, rows);
      Transpose(rows);
      for (int r = 0; r < kColumns; ++r, out += 64) _mm512_store_si512(out, rows[r]);
    }
  }
}

// Rows [j, j + rows) of w at column i, zero from column k on: where they lie, or a copy of the last step in `edge`.
struct Edge {
  alignas(64) BFloat16 rows[kTile][kStep];
};
struct Rows {
  const BFloat16* data;
  int64_t stride;  // bytes
};
[[gnu::always_inline]] inline Rows RowsAt(const GemmTile& t, int64_t j, int64_t i, int rows, Edge& edge) {
  const BFloat16* w = t.w + j * t.w_stride + i;
  if (t.k - i >= kStep) [[likely]]
    return {w, t.w_stride * 2};
  std::memset(edge.rows, 0, sizeof(edge.rows));
  for (int r = 0; r < rows; ++r) std::memcpy(edge.rows[r], w + r * t.w_stride, (t.k - i) * 2);
  return {edge.rows[0], sizeof(edge.rows[0])};
}

// Element [r][a] of a tile (row-major, `columns` wide) is out[a][j + r].
void StoreTransposed(const float* tile, int columns, float* const* out, int m, int64_t j, int rows) {
  const auto mask = static_cast<__mmask16>((1u << rows) - 1);
  if (columns == kTile) {
    __m512i v[kTile];
    for (int i = 0; i < kTile; ++i) v[i] = _mm512_load_si512(tile + i * kTile);
    Transpose(v);
    for (int a = 0; a < m; ++a) _mm512_mask_storeu_epi32(out[a] + j, mask, v[a]);
    return;
  }
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(columns));
  for (int a = 0; a < m; ++a) {
    _mm512_mask_storeu_ps(out[a] + j, mask, _mm512_i32gather_ps(index, tile + a, sizeof(float)));
  }
}

// Fetches the tile of w below the one at (j, i). Measured on a Xeon, one row of x, 1024 columns: 11.1 GB/s a core
// without, 14.0 GB/s with, a plain read 14.2 GB/s; into the second-level cache only, decode was slower by a tenth.
[[gnu::always_inline]] inline void PrefetchBelow(const GemmTile& t, int64_t j, int64_t i) {
  const BFloat16* w = t.w + (j + kTile) * t.w_stride + i;
  for (int r = 0; r < kTile; ++r) _mm_prefetch(w + r * t.w_stride, _MM_HINT_T0);
}

// Tile numbers must be literals.
#define SOLOIST_STORE_TILE(TILE, X, FIRST, M, J, ROWS)                     \
  do {                                                                     \
    alignas(64) float sums[kTile * kTile];                                 \
    _tile_stored(TILE, sums, (X).row_bytes());                             \
    StoreTransposed(sums, (X).columns, t.out + (FIRST), (M), (J), (ROWS)); \
  } while (false)

// Up to 16 rows of w against up to 16 of x, x[first..first + m).
void Block1x1(const GemmTile& t, const Packed& x, int first, int m, int64_t j, int rows) {
  Edge edge;
  _tile_zero(0);
  const uint8_t* from = x.data;
  const int64_t stride = x.row_bytes(), part = x.part_bytes();
  for (int64_t i = 0; i < t.k; i += kStep, from += kParts * part) {
    const Rows w = RowsAt(t, j, i, rows, edge);
    PrefetchBelow(t, j, i);
    _tile_loadd(4, w.data, w.stride);
    _tile_loadd(7, from, stride);
    _tile_dpbf16ps(0, 4, 7);
    _tile_loadd(7, from + part, stride);
    _tile_dpbf16ps(0, 4, 7);
    _tile_loadd(7, from + 2 * part, stride);
    _tile_dpbf16ps(0, 4, 7);
  }
  SOLOIST_STORE_TILE(0, x, first, m, j, rows);
}

// 32 rows of w against 17 to 32 of x, both halves kTile columns wide.
void Block2x2(const GemmTile& t, const Packed& x, const Packed& second, int64_t j) {
  Edge edge[2];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint8_t *from = x.data, *from_second = second.data;
  const int64_t stride = x.row_bytes(), part = x.part_bytes();
  for (int64_t i = 0; i < t.k; i += kStep) {
    const Rows w0 = RowsAt(t, j, i, kTile, edge[0]), w1 = RowsAt(t, j + kTile, i, kTile, edge[1]);
    _tile_loadd(4, w0.data, w0.stride);
    _tile_loadd(5, w1.data, w1.stride);
    for (int p = 0; p < kParts; ++p, from += part, from_second += part) {
      _tile_loadd(6, from, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(7, from_second, stride);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  SOLOIST_STORE_TILE(0, x, 0, kTile, j, kTile);
  SOLOIST_STORE_TILE(1, x, 0, kTile, j + kTile, kTile);
  SOLOIST_STORE_TILE(2, x, kTile, t.m - kTile, j, kTile);
  SOLOIST_STORE_TILE(3, x, kTile, t.m - kTile, j + kTile, kTile);
}
#undef SOLOIST_STORE_TILE

void RunAmx(const GemmTile& t) {
  const int first = std::min(t.m, kTile), rest = t.m - first;
  const int columns = t.m == 1 ? 1 : t.m <= 4 ? 4 : kTile;
  const int64_t bytes = (t.k + kStep - 1) / kStep * kParts * 64 * columns;
  thread_local ThreadBuffer buffer;
  uint8_t* packed = buffer.Get<uint8_t>(rest > 0 ? 2 * bytes : bytes);
  const auto pack = columns == 1 ? Pack<1> : columns == 4 ? Pack<4> : Pack<kTile>;
  pack(t.x, first, t.k, packed);
  if (rest > 0) pack(t.x + kTile, rest, t.k, packed + bytes);
  const Packed x{packed, columns}, second{packed + bytes, columns};
  const TileConfig whole(kTile, columns);
  _tile_loadconfig(&whole);
  int64_t j = 0;
  if (rest > 0) {
    for (; j + 2 * kTile <= t.n; j += 2 * kTile) Block2x2(t, x, second, j);
  }
  while (j < t.n) {
    const int rows = static_cast<int>(std::min<int64_t>(kTile, t.n - j));
    if (rows < kTile) {
      const TileConfig last(rows, columns);
      _tile_loadconfig(&last);
    }
    Block1x1(t, x, 0, first, j, rows);
    if (rest > 0) Block1x1(t, second, kTile, rest, j, rows);
    j += rows;
  }
  _tile_release();  // idle tile registers need not be saved when the thread is switched
}

bool HasAmx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  // Pack uses the conversions of AVX512_BF16.
  return Bf16Kernel() != nullptr && syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) == 0;
}

}  // namespace

const GemmKernel* AmxKernel() {
  static_assert(2 * kTile <= kMaxTileRows);
  static const GemmKernel kernel = {.name = "amx", .rows = 2 * kTile, .columns = 512, .run = RunAmx};
  static const bool has = HasAmx();
  return has ? &kernel : nullptr;
}

}  // namespace soloist
