// Paged attention with a running softmax (Milakov and Gimelshein 2018; Dao et al. 2022). A query walks the keys in
// tiles of kTile absolute positions, so that its result does not depend on chunking, on the block size or on other
// queries. bytes: keys and values of the context once per task of up to kRows rows; FLOPs: 4 * head_dim per query head
// and key.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/simd.h"

namespace soloist {
namespace {

constexpr int kTile = 32;      // keys
constexpr int kRows = 8;       // query rows that share a pass over keys and values
constexpr int kMaxGroup = 64;  // query heads per kv head and row
constexpr int kMaxHeadDim = 4096;

// One (query row, head): max and sum of the softmax so far; the weighted values are in the output row.
struct Running {
  float max;
  float sum;
};

template <typename T>
void AttendTask(const AttentionArgs& args, int sequence, int row_begin, int row_end, int kv_head) {
  const KvLayer& kv = args.kv;
  const int group = args.num_heads / kv.num_kv_heads, dim = kv.head_dim;
  const int32_t* table = args.block_tables + static_cast<int64_t>(sequence) * args.max_blocks;
  const int first_row = args.query_starts[sequence];
  const int chunk = args.query_starts[sequence + 1] - first_row;
  const int first_position = args.seq_lens[sequence] - chunk;
  const int heads = (row_end - row_begin) * group;
  Running running[kRows * kMaxGroup];
  const auto query = [&](int h) {
    return args.q.row<const float>(first_row + row_begin + h / group) + (kv_head * group + h % group) * int64_t{dim};
  };
  const auto output = [&](int h) {
    return args.out.row<float>(first_row + row_begin + h / group) + (kv_head * group + h % group) * int64_t{dim};
  };
  for (int h = 0; h < heads; ++h) {
    running[h] = {-std::numeric_limits<float>::infinity(), 0};
    std::fill_n(output(h), dim, 0.0f);
  }
  if (args.seq_lens[sequence] == 0) return;
  const int last_key = first_position + row_end - 1;
  const int oldest = args.sliding_window > 0 ? std::max(0, first_position + row_begin - args.sliding_window + 1) : 0;
  for (int tile = oldest / kTile * kTile; tile <= last_key; tile += kTile) {
    // Each key of the tile is found once for all rows and heads.
    const T* keys[kTile];
    const T* values[kTile];
    const int tile_end = std::min(tile + kTile, last_key + 1);
    for (int p = tile; p < tile_end; ++p) {
      const int64_t at =
          ((int64_t{table[p / kv.block_size]} * kv.num_kv_heads + kv_head) * kv.block_size + p % kv.block_size) * dim;
      keys[p - tile] = static_cast<const T*>(kv.keys) + at;
      values[p - tile] = static_cast<const T*>(kv.values) + at;
    }
    for (int h = 0; h < heads; ++h) {
      const int position = first_position + row_begin + h / group;
      const int begin = args.sliding_window > 0 ? std::max(tile, position - args.sliding_window + 1) : tile;
      const int end = std::min(tile_end, position + 1);
      if (begin >= end) continue;
      float scores[kTile];
      DotRows(query(h), keys + (begin - tile), end - begin, dim, args.scale, scores);
      float max = running[h].max;
      for (int i = 0; i < end - begin; ++i) max = std::max(max, scores[i]);
      const float shrink = std::exp(running[h].max - max);
      running[h].sum = running[h].sum * shrink + SumExp(scores, max, scores, end - begin);
      running[h].max = max;
      float* out = output(h);
      if (shrink != 1.0f) Scale(shrink, out, dim);
      AxpyRows(scores, values + (begin - tile), end - begin, dim, out);
    }
  }
  for (int h = 0; h < heads; ++h) Scale(1.0f / running[h].sum, output(h), dim);
}

}  // namespace

void CpuPagedAttention(const AttentionArgs& args, ThreadPool& pool) {
  CHECK(args.num_heads % args.kv.num_kv_heads == 0);
  CHECK_LE(args.num_heads / args.kv.num_kv_heads, kMaxGroup);
  CHECK_LE(args.kv.head_dim, kMaxHeadDim);
  CHECK(args.kv.dtype == DType::kF32 || args.kv.dtype == DType::kBF16);
  int64_t blocks = 0;  // of kRows rows, over all sequences
  for (int s = 0; s < args.num_sequences; ++s) {
    blocks += (args.query_starts[s + 1] - args.query_starts[s] + kRows - 1) / kRows;
  }
  pool.ParallelFor(blocks * args.kv.num_kv_heads, [&](int64_t task) {
    const int kv_head = static_cast<int>(task % args.kv.num_kv_heads);
    int64_t block = task / args.kv.num_kv_heads;
    int sequence = 0, rows = 0;
    for (;; ++sequence) {
      rows = args.query_starts[sequence + 1] - args.query_starts[sequence];
      const int own = (rows + kRows - 1) / kRows;
      if (block < own) break;
      block -= own;
    }
    const int begin = static_cast<int>(block) * kRows, end = std::min(begin + kRows, rows);
    if (args.kv.dtype == DType::kF32) {
      AttendTask<float>(args, sequence, begin, end, kv_head);
    } else {
      AttendTask<BFloat16>(args, sequence, begin, end, kv_head);
    }
  });
}

}  // namespace soloist
