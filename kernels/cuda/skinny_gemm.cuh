// The kernel behind skinny_gemm.h: out[row, n] = epilogue(x[row, k] * w[n, k]^T), few rows, w streamed once.
//
// Layout. A tile is 16 rows of w (of a gated matrix: 8 gate rows and the 8 up rows that belong to them), the M side of
// mma.m16n8k16; rows of x are its N side, 8 at a time. k is cut into `slices` of slice_k = 512 * slice_stages elements,
// by k alone. An item is one slice of one tile; one warp sums it. A stage is 16 rows x 512 elements of an item, one
// slot of a ring in shared memory.
//
// A cluster of 1 to 8 blocks shares k: block r has `block_slices` slices of each of the cluster's tiles, and only that
// part of x, which it keeps in shared memory. Tile number q of the cluster is finished by block q % cluster: all warps
// that sum a slice of it send their sums there (st.async), and that block's last warp adds them in order of k.
//
// Warps of a block: kConsumers that multiply; one that fills the ring (bulk copies, one per row of a stage, and
// prefetches to L2 further ahead); one that loads x; one that adds slices and writes out.
//
// Before PdlWait the ring is filled and the L2 prefetched: weights do not depend on earlier kernels. PdlTrigger comes
// when few stages are left to fetch, so that the next kernel's prefetches begin as this one's end.
#ifndef SOLOIST_KERNELS_CUDA_SKINNY_GEMM_CUH_
#define SOLOIST_KERNELS_CUDA_SKINNY_GEMM_CUH_

#include <cuda_bf16.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/skinny_gemm.h"
#include "kernels/cuda/skinny_gemm_jobs.cuh"
#include "kernels/cuda/skinny_gemm_ptx.cuh"

namespace soloist::cuda::skinny {

inline constexpr int kConsumers = 5;
inline constexpr int kThreads = (kConsumers + 3) * 32;
inline constexpr int kTileRows = 16;
inline constexpr int kStageK = 512;
inline constexpr int kStagePitch = kStageK * 2 + 16;  // bytes; odd multiple of 16: ldmatrix without bank conflicts
inline constexpr int kStageBytes = kTileRows * kStagePitch;
inline constexpr int kInterleave = 4;  // items whose stages alternate in the ring, so that as many warps are busy
inline constexpr int kMaxSlices = 8;
inline constexpr int kMaxRing = 16;
inline constexpr int kMaxDepth = 4;
inline constexpr int kPartBytes = 512;  // sums of 16 x 8 elements

struct Shape {
  const uint8_t* x;
  int64_t x_stride;  // bytes
  void* out;
  int64_t out_stride;  // elements
  int n, k;
  int tiles;
  int slices, slice_stages;
  int block_slices;  // of each tile, this many in each block of a cluster
  int row_tile;      // rows of x that are kept at once: 8, 16, 32, 64
  int x_pitch;       // bytes
  int ring;          // stages
  int depth;         // tiles whose sums a block can take at once
  int ahead;         // stages that are prefetched to L2 beyond the ring
  int trigger_left;  // PdlTrigger when as many stages are left to fetch
  SkinnyEpilogue epilogue;
  bool out_f32;
};

// Shared memory: barriers, tables of the jobs, ring, x, sums.
struct Barriers {
  uint64_t full[kMaxRing];
  uint64_t empty[kMaxRing];
  uint64_t x_full, x_empty;
  uint64_t sums_full[kMaxDepth];
  uint64_t sums_free[kMaxSlices][kMaxDepth];  // of each block of the cluster
};
template <class Jobs>
inline constexpr int kRingOffset =
    (static_cast<int>(sizeof(Barriers) + sizeof(typename Jobs::Tables)) + 127) / 128 * 128;
template <class Jobs>
int SharedBytes(const Shape& s) {
  return kRingOffset<Jobs> + s.ring * kStageBytes + s.row_tile * s.x_pitch +
         s.depth * s.slices * s.row_tile / 8 * kPartBytes;
}

// What one block knows of its place.
struct Place {
  int rank, cluster_size;
  uint32_t ring, x, sums;  // shared addresses
  uint32_t bars;           // of Barriers

  __device__ uint32_t full(int i) const { return bars + offsetof(Barriers, full) + i * 8; }
  __device__ uint32_t empty(int i) const { return bars + offsetof(Barriers, empty) + i * 8; }
  __device__ uint32_t x_full() const { return bars + offsetof(Barriers, x_full); }
  __device__ uint32_t x_empty() const { return bars + offsetof(Barriers, x_empty); }
  __device__ uint32_t sums_full(int i) const { return bars + offsetof(Barriers, sums_full) + i * 8; }
  __device__ uint32_t sums_free(int rank, int i) const {
    return bars + offsetof(Barriers, sums_free) + (rank * kMaxDepth + i) * 8;
  }
};

// The tiles of the cluster: units first, first + step, ... < end, where unit = job * tiles + tile.
struct Units {
  int next, step, end, tiles;
};
struct Batch {  // those of one job: tile, tile + step, ...
  int job, tile, count;
};
__device__ inline bool NextBatch(Units& units, Batch& batch) {
  if (units.next >= units.end) return false;
  batch.job = units.next / units.tiles;
  batch.tile = units.next - batch.job * units.tiles;
  const int limit = min(units.end, (batch.job + 1) * units.tiles);
  batch.count = (limit - units.next + units.step - 1) / units.step;
  units.next += batch.count * units.step;
  return true;
}

// Slices of a tile that the block has.
__device__ inline int OwnSlices(const Shape& s, const Place& at) {
  return max(0, min(s.block_slices, s.slices - at.rank * s.block_slices));
}

// ---- The warp that fills the ring

// Calls copy(row of w, byte offset in the row, bytes, row of the tile) for this lane's part of stage `index` of the
// batch; returns the bytes of all lanes' parts.
template <class Copy>
__device__ int StageParts(const Shape& s, const Place& at, int own_slices, const Batch& batch, int step, int index,
                          Copy copy) {
  const int items = batch.count * own_slices;
  const int group = index / (kInterleave * s.slice_stages);
  const int width = min(kInterleave, items - group * kInterleave);
  const int in_group = index - group * kInterleave * s.slice_stages;
  const int stage = in_group / width;
  const int item = group * kInterleave + in_group - stage * width;
  const int tile = batch.tile + item / own_slices * step;
  const int slice = at.rank * s.block_slices + item % own_slices;
  const int k0 = (slice * s.slice_stages + stage) * kStageK;
  const int bytes = min(kStageK, s.k - k0) * 2;
  if (bytes <= 0) return 0;
  const int lane = threadIdx.x % 32;
  int row, rows;
  if (s.epilogue == SkinnyEpilogue::kSiluGated) {
    const int half = s.n / 2;
    rows = 2 * min(8, half - tile * 8);
    const int r = tile * 8 + lane % 8;
    row = r < half && lane < 16 ? r + lane / 8 * half : -1;
  } else {
    rows = min(kTileRows, s.n - tile * kTileRows);
    row = lane < rows ? tile * kTileRows + lane : -1;
  }
  if (row >= 0) copy(row, int64_t{k0} * 2, bytes, lane);
  return rows * bytes;
}

struct Producer {
  const Shape& s;
  const Place& at;
  int own_slices, step;
  uint64_t policy;
  int filled = 0;  // stages so far

  __device__ void Load(const uint8_t* w, const Batch& batch, int index) {
    const int slot = filled % s.ring;
    if (filled >= s.ring) BarrierWait(at.empty(slot), (filled / s.ring - 1) & 1);
    ++filled;
    const int bytes = StageParts(s, at, own_slices, batch, step, index, [](int, int64_t, int, int) {});
    if (threadIdx.x % 32 == 0) BarrierArriveExpect(at.full(slot), bytes);
    __syncwarp();
    StageParts(s, at, own_slices, batch, step, index, [&](int row, int64_t offset, int part, int r) {
      BulkLoad(at.ring + slot * kStageBytes + r * kStagePitch, w + int64_t{row} * s.k * 2 + offset, part, at.full(slot),
               policy);
    });
  }
  __device__ void Prefetch(const uint8_t* w, const Batch& batch, int index) {
    StageParts(s, at, own_slices, batch, step, index, [&](int row, int64_t offset, int part, int) {
      BulkPrefetch(w + int64_t{row} * s.k * 2 + offset, part, policy);
    });
  }
};

// ---- The warps that multiply

// sums[0] and sums[1] += even and odd steps of a stage. a: fragments of w, b: of x, both at the lane's own row.
template <int kNt>
__device__ __forceinline__ void MultiplyStage(float (&sums)[2][kNt][4], uint32_t a, uint32_t b, int x_pitch, int k) {
  const auto step = [&](int offset, int valid) {
    uint32_t a0[4], a1[4];
    LoadMatrices(a0, a + offset);
    LoadMatrices(a1, a + offset + 32);
    if (valid < 32) {  // zeroes for what lies beyond k, in both operands since shared memory may hold NaN
      if (valid <= 8) a0[2] = a0[3] = 0;
      if (valid <= 16) a1[0] = a1[1] = 0;
      if (valid <= 24) a1[2] = a1[3] = 0;
    }
#pragma unroll
    for (int j = 0; j < kNt; ++j) {
      uint32_t b0[4];
      LoadMatrices(b0, b + j * 8 * x_pitch + offset);
      if (valid < 32) {
        if (valid <= 8) b0[1] = 0;
        if (valid <= 16) b0[2] = 0;
        if (valid <= 24) b0[3] = 0;
      }
      MultiplyAdd(sums[0][j], a0, b0[0], b0[1]);
      MultiplyAdd(sums[1][j], a1, b0[2], b0[3]);
    }
  };
  if (k == kStageK) {
#pragma unroll(kNt <= 2 ? 8 : kNt == 4 ? 4 : 2)
    for (int offset = 0; offset < kStageK * 2; offset += 64) step(offset, 32);
  } else {
    for (int done = 0; done < k; done += 32) step(done * 2, min(32, k - done));
  }
}

struct Consumer {
  const Shape& s;
  const Place& at;
  int warp, own_slices;
  int stages = 0, items = 0, tiles = 0;  // of earlier batches

  template <int kNt>
  __device__ __forceinline__ void Run(const Batch& batch) {
    const int lane = threadIdx.x % 32;
    const int batch_items = batch.count * own_slices;
    const uint32_t a_lane = at.ring + lane % 16 * kStagePitch + lane / 16 * 16;
    const uint32_t b_lane = at.x + lane % 8 * s.x_pitch + lane / 8 * 16;
    int item = (warp - items % kConsumers + kConsumers) % kConsumers;
    for (; item < batch_items; item += kConsumers) {
      const int slice = item % own_slices;
      const int group = item / kInterleave * kInterleave;
      const int width = min(kInterleave, batch_items - group);
      int stage = stages + group * s.slice_stages + item - group;
      float sums[2][kNt][4] = {};
      for (int i = 0; i < s.slice_stages; ++i, stage += width) {
        const int slot = stage % s.ring;
        BarrierWait(at.full(slot), stage / s.ring & 1);
        const int k0 = (at.rank * s.block_slices + slice) * s.slice_stages + i;
        const int k = min(kStageK, s.k - k0 * kStageK);
        if (k > 0) {
          MultiplyStage<kNt>(sums, a_lane + slot * kStageBytes, b_lane + (slice * s.slice_stages + i) * kStageK * 2,
                             s.x_pitch, k);
        }
        __syncwarp();
        if (lane == 0) BarrierArrive(at.empty(slot));
      }
      const int tile = tiles + item / own_slices;
      const int owner = tile % at.cluster_size;
      const int use = tile / at.cluster_size;
      const int place = use % s.depth;
      if (use >= s.depth) BarrierWait(at.sums_free(owner, place), (use / s.depth - 1) & 1);
      const int part = (place * s.slices + at.rank * s.block_slices + slice) * (s.row_tile / 8);
      const uint32_t to = MapToRank(at.sums + part * kPartBytes + lane * 16, owner);
      const uint32_t barrier = MapToRank(at.sums_full(place), owner);
#pragma unroll
      for (int j = 0; j < kNt; ++j) {
        StoreRemote(to + j * kPartBytes, sums[0][j][0] + sums[1][j][0], sums[0][j][1] + sums[1][j][1],
                    sums[0][j][2] + sums[1][j][2], sums[0][j][3] + sums[1][j][3], barrier);
      }
    }
    stages += batch_items * s.slice_stages;
    items += batch_items;
    tiles += batch.count;
  }
};

// Columns of 8 that a job with so many rows is multiplied with.
__device__ inline int ColumnsOf(int rows) { return rows <= 8 ? 1 : rows <= 16 ? 2 : rows <= 32 ? 4 : 8; }

// ---- The warp that adds and writes

__device__ inline float Gelu(float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f)); }
__device__ inline float Silu(float v) { return v / (1.0f + __expf(-v)); }

__device__ inline void StorePair(const Shape& s, int64_t row, int column, float a, float b) {
  const int64_t at = row * s.out_stride + column;
  if (s.out_f32) {
    *reinterpret_cast<float2*>(static_cast<float*>(s.out) + at) = make_float2(a, b);
  } else {
    *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(s.out) + at) = __floats2bfloat162_rn(a, b);
  }
}

// Writes 16 x 8 sums. v: (row g, column 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1) of the tile, lane = 4 g + q.
// Lanes g and g ^ 1 exchange, so that each has two neighbours of one row of out. `row`: that row; negative: none.
__device__ inline void WriteSums(const Shape& s, int tile, float4 v, int64_t row, bool gated) {
  const int lane = threadIdx.x % 32;
  const bool even = lane / 4 % 2 == 0;
  const int pair = lane / 8 * 2;
  if (gated) {
    const float a = Silu(v.x) * v.z;
    const float b = Silu(v.y) * v.w;
    const float other = __shfl_xor_sync(~0u, even ? b : a, 4);
    const int column = tile * 8 + pair;
    if (row >= 0 && column < s.n / 2) StorePair(s, row, column, even ? a : other, even ? other : b);
    return;
  }
  if (s.epilogue == SkinnyEpilogue::kGelu) v = make_float4(Gelu(v.x), Gelu(v.y), Gelu(v.z), Gelu(v.w));
  const float low = __shfl_xor_sync(~0u, even ? v.y : v.x, 4);
  const float high = __shfl_xor_sync(~0u, even ? v.w : v.z, 4);
  const int column = tile * kTileRows + pair;
  if (row >= 0 && column < s.n) StorePair(s, row, column, even ? v.x : low, even ? low : v.y);
  if (row >= 0 && column + 8 < s.n) StorePair(s, row, column + 8, even ? v.z : high, even ? high : v.w);
}

template <class Jobs>
__device__ void AddAndWrite(const Shape& s, const Place& at, const Jobs& jobs, Units units, const uint8_t* sums) {
  const int lane = threadIdx.x % 32;
  const int total = (units.end - units.next + units.step - 1) / units.step;
  int tiles = 0;
  for (Batch batch; NextBatch(units, batch); tiles += batch.count) {
    const Job job = jobs.Get(batch.job);
    const int columns = ColumnsOf(job.rows);
    const int row0 = lane < job.rows ? jobs.RowIndex(job, lane) : -1;
    const int row1 = lane + 32 < job.rows ? jobs.RowIndex(job, lane + 32) : -1;
    int i = (at.rank - tiles % at.cluster_size + at.cluster_size) % at.cluster_size;
    for (; i < batch.count; i += at.cluster_size) {
      const int use = (tiles + i) / at.cluster_size;
      const int place = use % s.depth;
      if (lane == 0) BarrierArriveExpect(at.sums_full(place), s.slices * columns * kPartBytes);
      BarrierWait(at.sums_full(place), use / s.depth & 1);
      const uint8_t* from = sums + int64_t{place} * s.slices * (s.row_tile / 8) * kPartBytes + lane * 16;
      for (int j = 0; j < columns; ++j) {
        float4 v = *reinterpret_cast<const float4*>(from + j * kPartBytes);
        for (int p = 1; p < s.slices; ++p) {
          const float4 u = *reinterpret_cast<const float4*>(from + (p * (s.row_tile / 8) + j) * kPartBytes);
          v = make_float4(v.x + u.x, v.y + u.y, v.z + u.z, v.w + u.w);
        }
        const int r = j * 8 + lane % 4 * 2 + lane / 4 % 2;
        const int low = __shfl_sync(~0u, row0, r % 32);
        const int high = __shfl_sync(~0u, row1, r % 32);
        WriteSums(s, batch.tile + i * units.step, v, r < 32 ? low : high, s.epilogue == SkinnyEpilogue::kSiluGated);
      }
      __syncwarp();
      // Only where a later use waits for it: a block may have ended otherwise.
      const int later = (use + s.depth) * at.cluster_size + at.rank;
      if (later < total && lane < at.cluster_size && lane * s.block_slices < s.slices) {
        BarrierArriveRemote(MapToRank(at.sums_free(at.rank, place), lane));
      }
    }
  }
}

// ---- The kernel

// grid: clusters x cluster_size blocks of kThreads; every cluster takes its share of the tiles of all jobs.
// Bytes: w of every job once; x once per cluster and job; out once.
template <class Jobs, int kMaxNt>
__global__ void __launch_bounds__(kThreads, kMaxNt <= 4 ? 2 : 1)
    SkinnyGemmKernel(const __grid_constant__ Shape s, const __grid_constant__ typename Jobs::Params params) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  Jobs jobs{params, *reinterpret_cast<typename Jobs::Tables*>(shared + sizeof(Barriers))};
  Place at;
  uint32_t cluster_size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(cluster_size));
  at.rank = ClusterRank();
  at.cluster_size = cluster_size;
  at.bars = SharedAddress(shared);
  at.ring = at.bars + kRingOffset<Jobs>;
  at.x = at.ring + s.ring * kStageBytes;
  at.sums = at.x + s.row_tile * s.x_pitch;
  const int cluster = blockIdx.x / cluster_size;
  const int clusters = gridDim.x / cluster_size;
  const int own_slices = OwnSlices(s, at);

  if (threadIdx.x == 0) {
    for (int i = 0; i < s.ring; ++i) {
      BarrierInit(at.full(i), 1);
      BarrierInit(at.empty(i), 1);
    }
    BarrierInit(at.x_full(), 1);
    BarrierInit(at.x_empty(), kConsumers);
    for (int i = 0; i < s.depth; ++i) {
      BarrierInit(at.sums_full(i), 1);
      for (int r = 0; r < at.cluster_size; ++r) BarrierInit(at.sums_free(r, i), 1);
    }
    BarrierInitFence();
  }
  __syncthreads();
  ClusterArrive();

  // One matrix: its tiles are dealt to the clusters in turn, so that the first pass's are known without its rows.
  const bool deal = jobs.one_matrix();
  const int step = deal ? clusters : 1;
  Producer producer{s, at, own_slices, step, EvictFirstPolicy()};
  int loaded = 0;  // stages of the first batch that have been loaded, and prefetched
  if (warp == kConsumers && deal && !jobs.known_early()) {
    Units first{cluster, step, s.tiles, s.tiles};
    Batch batch;
    if (NextBatch(first, batch)) {
      const int stages = batch.count * own_slices * s.slice_stages;
      for (; loaded < min(s.ring, stages); ++loaded) producer.Load(jobs.first_matrix(), batch, loaded);
      for (int i = loaded; i < min(loaded + s.ahead, stages); ++i) producer.Prefetch(jobs.first_matrix(), batch, i);
    }
  }
  __syncwarp();
  ClusterWait();
  if (!jobs.known_early()) PdlWait();
  jobs.Scan(s.row_tile);

  const int total = jobs.count() * s.tiles;
  const Units all = deal ? Units{cluster, step, total, s.tiles}
                         : Units{static_cast<int>(int64_t{total} * cluster / clusters), 1,
                                 static_cast<int>(int64_t{total} * (cluster + 1) / clusters), s.tiles};
  Units units = all;
  Batch batch;
  if (warp < kConsumers) {
    Consumer consumer{s, at, warp, own_slices};
    for (int i = 0; NextBatch(units, batch); ++i) {
      const int columns = ColumnsOf(jobs.Get(batch.job).rows);
      BarrierWait(at.x_full(), i & 1);
      if (columns == 1) {
        consumer.template Run<1>(batch);
      } else if (kMaxNt == 2 || columns == 2) {
        consumer.template Run<2>(batch);
      } else if (kMaxNt == 4 || columns == 4) {
        consumer.template Run<4>(batch);
      } else {
        consumer.template Run<8>(batch);
      }
      __syncwarp();
      if (lane == 0) BarrierArrive(at.x_empty());
    }
  } else if (warp == kConsumers) {
    const int all_stages = (all.end - all.next + step - 1) / step * own_slices * s.slice_stages;
    bool triggered = false;
    for (; NextBatch(units, batch); loaded = 0) {
      const uint8_t* w = jobs.Get(batch.job).w;
      const int stages = batch.count * own_slices * s.slice_stages;
      const int ring = min(s.ring, stages);
      int fetched = loaded > 0 ? loaded + s.ahead : 0;
      for (int i = loaded; i < stages; ++i) {
        producer.Load(w, batch, i);
        if (i + 1 >= ring) {
          for (fetched = max(fetched, i + 1); fetched < min(i + 1 + s.ahead, stages); ++fetched) {
            producer.Prefetch(w, batch, fetched);
          }
        }
        if (!triggered && producer.filled >= all_stages - s.trigger_left) {
          triggered = true;
          PdlTrigger();
        }
      }
    }
    // Loaded for rows that did not come: not to be left while copies are under way.
    for (int i = 0; i < loaded; ++i) BarrierWait(at.full(i), 0);
  } else if (warp == kConsumers + 1) {
    PdlWait();
    const int k0 = at.rank * s.block_slices * s.slice_stages * kStageK;
    const int bytes = min(own_slices * s.slice_stages * kStageK, s.k - k0) * 2;
    for (int i = 0; NextBatch(units, batch); ++i) {
      const Job job = jobs.Get(batch.job);
      if (i > 0) BarrierWait(at.x_empty(), (i - 1) & 1);
      if (lane == 0) BarrierArriveExpect(at.x_full(), max(0, bytes) * job.rows);
      __syncwarp();
      for (int r = lane; r < job.rows && bytes > 0; r += 32) {
        BulkLoad(at.x + r * s.x_pitch, s.x + jobs.RowIndex(job, r) * s.x_stride + int64_t{k0} * 2, bytes, at.x_full());
      }
    }
  } else {
    AddAndWrite(s, at, jobs, units, shared + (at.sums - at.bars));
  }
}

}  // namespace soloist::cuda::skinny

#endif  // SOLOIST_KERNELS_CUDA_SKINNY_GEMM_CUH_
