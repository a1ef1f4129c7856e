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
// Warps of a block: `consumers` that multiply; one that fills the ring (bulk copies, one per row of a stage, and
// prefetches to L2 further ahead); one that loads x; one that adds slices and writes out.
//
// Before PdlWait the ring is filled and the L2 prefetched: weights do not depend on earlier kernels. PdlTrigger comes
// when few stages are left to fetch, so that the next kernel's prefetches begin as this one's end.
#ifndef SOLOIST_KERNELS_CUDA_SKINNY_GEMM_CUH_
#define SOLOIST_KERNELS_CUDA_SKINNY_GEMM_CUH_

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/skinny_gemm_jobs.cuh"
#include "kernels/cuda/skinny_gemm_ptx.cuh"
#include "kernels/cuda/skinny_gemm_roles.cuh"
#include "kernels/cuda/skinny_gemm_shape.cuh"

namespace soloist::cuda::skinny {

// grid: clusters x cluster_size blocks of consumers + 3 warps; every cluster takes its share of the tiles of all jobs.
// Bytes: w of every job once; x once per cluster and job; out once.
template <class Jobs, int kMaxNt>
__global__ void __maxnreg__(kMaxNt <= 4 ? 104 : 184)
    SkinnyGemmKernel(const __grid_constant__ Shape s, const __grid_constant__ typename Jobs::Params params) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = Uniform(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  Jobs jobs{params, *reinterpret_cast<typename Jobs::Tables*>(shared + sizeof(Barriers))};
  Barriers& barriers = *reinterpret_cast<Barriers*>(shared);
  Place at;
  uint32_t cluster_size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(cluster_size));
  at.rank = Uniform(ClusterRank());
  at.cluster_size = Uniform(cluster_size);
  at.bars = SharedAddress(shared);
  at.ring = at.bars + kRingOffset<Jobs>;
  at.x = at.ring + s.ring * kStageBytes;
  at.sums = at.x + s.row_tile * s.x_pitch;
  const int cluster = blockIdx.x / cluster_size;
  const int clusters = gridDim.x / cluster_size;
  const int own_slices = OwnSlices(s, at);

  if (threadIdx.x == 0) {
    for (uint32_t& taken : barriers.sums_taken) taken = 0;
    for (int i = 0; i < s.ring; ++i) {
      BarrierInit(at.full(i), 1);
    }
    BarrierInit(at.x_full(), 1);
    BarrierInit(at.x_empty(), s.consumers);
    for (int i = 0; i < s.depth; ++i) BarrierInit(at.sums_full(i), 1);
    BarrierInitFence();
  }
  __syncthreads();
  ClusterArrive();

  // One matrix: its tiles are dealt to the clusters in turn, so that the first pass's are known without its rows.
  const bool deal = jobs.one_matrix();
  const int step = deal ? clusters : 1;
  const int ring_of_warp = s.ring / s.consumers;
  const int item_tiles = s.consumers / max(1, own_slices);
  Loader loader{s,          at,
                warp,       own_slices,
                step,       s.evict_first ? EvictFirstPolicy() : EvictNormalPolicy(),
                item_tiles, s.consumers - item_tiles * own_slices};
  Batch first = {0, cluster, 0};  // known before earlier kernels have ended
  int loaded = 0;
  if (deal) {
    Units units{cluster, step, s.tiles, s.tiles};
    if (NextBatch(units, first)) {
      if (warp < s.consumers && own_slices > 0) {
        loader.Open(first, jobs.first_matrix());
        while (loaded < ring_of_warp && loader.Load(jobs, warp + loaded * s.consumers)) ++loaded;
      } else if (warp == s.consumers && lane == 0 && s.ahead > 0) {
        PrefetchTiles(s, at, jobs.first_matrix(), first, step, s.ring / max(1, own_slices * s.slice_stages),
                      loader.policy);
      }
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
  if (warp < s.consumers) {
    loader.units = all;
    if (first.count > 0) NextBatch(loader.units, batch);
    while (loaded < ring_of_warp && loader.Load(jobs, warp + loaded * s.consumers)) ++loaded;
    const int left = StagesOfFirstWarp(s, own_slices, all) - ring_of_warp - s.trigger_left;
    if (warp == 0 && left <= 0) PdlTrigger();
    Consumer consumer{s, at, loader, warp == 0 ? left : 0, warp, 0, 0};
    for (int i = 0; own_slices > 0 && NextBatch(units, batch); ++i) {
      const int columns = ColumnsOf(jobs.Get(batch.job).rows);
      BarrierWait(at.x_full(), i & 1);
      if (columns == 1) {
        consumer.template Run<1>(jobs, batch);
      } else if (kMaxNt == 2 || columns == 2) {
        consumer.template Run<2>(jobs, batch);
      } else if (kMaxNt == 4 || columns == 4) {
        consumer.template Run<4>(jobs, batch);
      } else {
        consumer.template Run<8>(jobs, batch);
      }
      __syncwarp();
      if (lane == 0) BarrierArrive(at.x_empty());
    }
    // Loaded for rows that did not come: not to be left while copies are under way.
    if (total == 0) {
      for (int i = 0; i < loaded; ++i) BarrierWait(at.full(warp + i * s.consumers), 0);
    }
  } else if (warp == s.consumers) {
    PdlWait();
    const int k0 = at.rank * s.block_slices * s.slice_stages * kStageK;
    const int bytes = max(0, min(own_slices * s.slice_stages * kStageK, s.k - k0) * 2);
    for (int i = 0; own_slices > 0 && NextBatch(units, batch); ++i) {
      const Job job = jobs.Get(batch.job);
      const int rows = Uniform(job.rows);
      const int row0 = lane < rows ? jobs.RowIndex(job, lane) : 0;
      const int row1 = lane + 32 < rows ? jobs.RowIndex(job, lane + 32) : 0;
      if (i > 0) BarrierWait(at.x_empty(), (i - 1) & 1);
      if (lane == 0) BarrierArriveExpect(at.x_full(), bytes * rows);
      __syncwarp();
      for (int r = 0; r < rows && bytes > 0; ++r) {
        const int row = __shfl_sync(~0u, r < 32 ? row0 : row1, r % 32);
        if (ElectOne()) BulkLoad(at.x + r * s.x_pitch, s.x + row * s.x_stride + int64_t{k0} * 2, bytes, at.x_full());
      }
    }
  } else {
    AddAndWrite(s, at, jobs, units, shared + (at.sums - at.bars));
  }
}

}  // namespace soloist::cuda::skinny

#endif  // SOLOIST_KERNELS_CUDA_SKINNY_GEMM_CUH_
