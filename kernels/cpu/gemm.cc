// y = x w^T. Weights stay as they are, [n, k] row-major bf16. A tile of up to kTileRows rows of x, small enough for the
// first-level cache, sweeps a block of rows of w that fits the second-level cache; with one row, w streams through
// once. bytes: 2 n k; FLOPs: 2 m n k.
#include <algorithm>
#include <atomic>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"

namespace soloist {
namespace {

std::atomic<bool> native_bf16_disabled{false};

}  // namespace

void DisableNativeBf16ForTest(bool disable) { native_bf16_disabled = disable; }

int64_t GemmBlock(int64_t m, int64_t n, int threads) {
  // Wide blocks spread the cost of reading (and splitting) x; with few rows there must be enough blocks to balance the
  // threads.
  const int64_t most = m >= 32 ? 128 : 256;
  const int64_t balanced = (n / (int64_t{4} * threads) + 7) / 8 * 8;
  return std::clamp<int64_t>(balanced, 16, most);
}

void GemmColumns(const RowSet& x, const RowSet& out, int64_t m, const Tensor& w, int64_t begin, int64_t end) {
  const bool native = HasNativeBf16() && !native_bf16_disabled.load(std::memory_order_relaxed);
  GemmTile tile;
  tile.w = w.row<const BFloat16>(begin);
  tile.w_stride = w.stride;
  tile.n = end - begin;
  tile.k = w.cols;
  for (int64_t i = 0; i < m; i += kTileRows) {
    tile.m = static_cast<int>(std::min<int64_t>(kTileRows, m - i));
    for (int a = 0; a < tile.m; ++a) {
      tile.x[a] = x[i + a];
      tile.out[a] = out[i + a] + begin;
    }
    native ? GemmTileBf16(tile) : GemmTileFma(tile);
  }
}

}  // namespace soloist
