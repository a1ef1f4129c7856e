// The kernel of grouped_gemm.cu.
//
// A unit of work is (expert e, row tile r, `multicast` neighbouring weight tiles); a cluster of multicast * splits
// blocks computes it: block (im, is) the weight tile im over part is of k. A weight tile is 128 rows of w[e]; as the
// operands are swapped, a block's product is [128 weight rows, up to 256 rows of x], whose transpose goes to out.
//   warp group 0   producer: its first thread issues the copies of 64-column blocks of k into a ring of stages
//   warp groups 1, 2   consumers: 64 weight rows each, wgmma m64nNk16, N = rows of the tile rounded up to 64
// Each block reads its weights itself; each block of a multicast group reads a share of the x rows and sends it to all.
// Units are dealt round-robin to the resident clusters. Launch: 384 threads, about 215 KB shared memory, one block per
// SM.
//
// Weights are read through one five-dimensional tensor map for all experts: {64 columns, start, 8 rows, 2 halves,
// groups}, where `start` counts 128-byte steps from the lowest w[e], so that it names both the expert and the block of
// k. The halves of a group are rows 0-7 and 8-15 of 16 consecutive ones or, gated, 8 gate rows and the 8 up rows of the
// same columns: a thread then holds a gate and its up in registers 4j + {0, 1} and 4j + {2, 3}.
#ifndef SOLOIST_KERNELS_CUDA_GROUPED_GEMM_KERNEL_CUH_
#define SOLOIST_KERNELS_CUDA_GROUPED_GEMM_KERNEL_CUH_

#include "kernels/cuda/grouped_gemm.h"
#include "kernels/cuda/grouped_gemm_ptx.cuh"
#include "kernels/cuda/launch.cuh"

namespace soloist::cuda {

inline constexpr int kGroupedThreads = 384;
inline constexpr int kGroupedMaxStages = 8;
inline constexpr int kGroupedWeightBytes = 128 * 128;  // of a stage
inline constexpr int kGroupedStagingBytes = 64 * 128;  // of a consumer: 64 rows of out, 64 columns

struct GroupedKernelParams {
  const int32_t* offsets;
  __nv_bfloat16* out;
  float4* partials;  // [blocks of the grid][kGroupedPartials]
  int* arrivals;     // [blocks of the grid][kGroupedMaxSplits], zero between launches
  int64_t out_stride;
  uint64_t w_policy;
  int num_experts;
  int columns;   // of out
  int k_blocks;  // of 64
  int row_tile;
  int stages;
  int x_box_rows;
  int multicast;
  int max_splits;
  int weight_units;  // weight tiles / multicast, rounded up
  int raster;
  int32_t w_start[kMaxGroupedExperts];  // in 128-byte steps from the base of the tensor map
};

struct GroupedShared {
  uint64_t full[kGroupedMaxStages];
  uint64_t empty[kGroupedMaxStages];
  int offsets[kMaxGroupedExperts + 1];
  int tile_begin[kMaxGroupedExperts + 1];  // row tiles of the experts before
};

// Walks the units of one cluster, in ascending order.
class UnitCursor {
 public:
  __device__ UnitCursor(const GroupedKernelParams& params, const GroupedShared& shared)
      : params_(params), shared_(shared) {}

  // Unit `index`; false past the last one.
  __device__ bool Seek(int index) {
    while (expert < params_.num_experts && index >= shared_.tile_begin[expert + 1] * params_.weight_units) ++expert;
    if (expert == params_.num_experts) return false;
    const int row_tiles = shared_.tile_begin[expert + 1] - shared_.tile_begin[expert];
    index -= shared_.tile_begin[expert] * params_.weight_units;
    const int strip = index / (params_.raster * row_tiles);
    index -= strip * params_.raster * row_tiles;
    const int width = min(params_.raster, params_.weight_units - strip * params_.raster);
    const int row_tile = index / width;
    weight_unit = strip * params_.raster + index - row_tile * width;
    row_begin = shared_.offsets[expert] + row_tile * params_.row_tile;
    rows = min(params_.row_tile, shared_.offsets[expert + 1] - row_begin);
    return true;
  }

  int expert = 0;
  int weight_unit = 0;
  int row_begin = 0;
  int rows = 0;

 private:
  const GroupedKernelParams& params_;
  const GroupedShared& shared_;
};

// A place in the ring of stages.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ float Gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float SiluGate(float g, float u) { return __fdividef(g, 1.0f + __expf(-g)) * u; }

// What a consumer thread needs to know.
struct Consumer {
  uint32_t stages_at;  // shared memory
  uint32_t full_at;
  uint32_t empty_at;
  uint32_t staging_at;
  uint32_t stage_bytes;
  int group;   // 0, 1
  int thread;  // of the group
  int warp;
  int lane;
  uint32_t block_in_cluster;
  uint32_t peers_begin;  // first block of the multicast group
};

__device__ __forceinline__ void Release(const GroupedKernelParams& params, const Consumer& me, int stage) {
  if (me.lane < params.multicast) ptx::BarrierArriveAt(me.empty_at + 8 * stage, me.peers_begin + me.lane);
}

// acc = the block's product over its part of k, of `blocks` blocks.
template <int N>
__device__ __forceinline__ void Multiply(const GroupedKernelParams& params, const Consumer& me, Ring& ring, int blocks,
                                         float (&acc)[128]) {
  int previous = 0;
  for (int block = 0; block < blocks; ++block) {
    ptx::BarrierWait(me.full_at + 8 * ring.stage, ring.parity);
    const uint32_t at = me.stages_at + ring.stage * me.stage_bytes;
    const uint64_t a = ptx::WgmmaDescriptor(at + me.group * (kGroupedWeightBytes / 2));
    const uint64_t b = ptx::WgmmaDescriptor(at + kGroupedWeightBytes);
    ptx::WgmmaFence();
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::Wgmma<N>(acc, a + 2 * i, b + 2 * i, block + i);
    ptx::WgmmaCommit();
    // One block of k stays in flight; the one before has been read.
    if (block > 0) {
      ptx::WgmmaWait<1>();
      Release(params, me, previous);
    }
    previous = ring.stage;
    ring.Advance(params.stages);
  }
  ptx::WgmmaWait<0>();
  Release(params, me, previous);
}

// Puts 16 x rows (columns of the product; v: this thread's part) into place `slot` (0 to 3) of the staging area.
template <GroupedActivation kActivation>
__device__ __forceinline__ void StageRows(const Consumer& me, int slot, const float* v) {
  const int i = me.lane & 7;
  if constexpr (kActivation == GroupedActivation::kSiluGated) {
    // 64-byte rows; the swizzle keeps 8 of them on distinct banks.
    const int row = slot * 16 + ((me.lane >> 3) & 1) * 8 + i;
    ptx::StoreTransposed2(me.staging_at + row * 64 + ((me.warp ^ (row >> 1)) & 3) * 16,
                          ptx::Pack(SiluGate(v[0], v[2]), SiluGate(v[1], v[3])),
                          ptx::Pack(SiluGate(v[4], v[6]), SiluGate(v[5], v[7])));
  } else {
    float y[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) y[c] = kActivation == GroupedActivation::kGelu ? Gelu(v[c]) : v[c];
    const int matrix = me.lane >> 3;
    const int row = slot * 16 + (matrix >> 1) * 8 + i;
    ptx::StoreTransposed4(me.staging_at + row * 128 + ((me.warp * 2 + (matrix & 1)) ^ i) * 16, ptx::Pack(y[0], y[1]),
                          ptx::Pack(y[2], y[3]), ptx::Pack(y[4], y[5]), ptx::Pack(y[6], y[7]));
  }
}

// Writes the staged rows, the first of which is x row `first` of the unit, to out. `column`: the group's first.
template <GroupedActivation kActivation>
__device__ __forceinline__ void StoreRows(const GroupedKernelParams& params, const Consumer& me, const UnitCursor& unit,
                                          int column, int first, int count) {
  constexpr bool kGated = kActivation == GroupedActivation::kSiluGated;
  constexpr int kPieces = kGated ? 4 : 8;  // of 16 bytes, in a row
  ptx::GroupSync(1 + me.group);
  for (int index = me.thread; index < count * kPieces; index += 128) {
    const int row = index / kPieces;
    const int piece = index % kPieces;
    const int swizzled = kGated ? (piece ^ (row >> 1)) & 3 : piece ^ (row & 7);
    if (first + row < unit.rows && column + piece * 8 < params.columns) {
      const uint4 v = ptx::LoadShared16(me.staging_at + row * (kPieces * 16) + swizzled * 16);
      *reinterpret_cast<uint4*>(params.out + (unit.row_begin + first + row) * params.out_stride + column + piece * 8) =
          v;
    }
  }
  ptx::GroupSync(1 + me.group);
}

// One unit with N columns of the product.
template <GroupedActivation kActivation, int N>
__device__ __forceinline__ void ComputeUnit(const GroupedKernelParams& params, const Consumer& me, Ring& ring,
                                            const UnitCursor& unit, int column, int blocks, int split) {
  float acc[128];
  Multiply<N>(params, me, ring, blocks, acc);
  if (params.splits == 1) {
#pragma unroll
    for (int chunk = 0; chunk < N / 64; ++chunk) {
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) StageRows<kActivation>(me, slot, acc + chunk * 32 + slot * 8);
      StoreRows<kActivation>(params, me, unit, column, chunk * 64, 64);
    }
    return;
  }
  // Each block of the cluster finishes its share of the x rows: send it the partial sums of those.
  ptx::ClusterSync();                       // all stages have been read: they may hold the sums
  const int share = N / 8 / params.splits;  // in groups of 8 x rows; a power of two
  const int share_bits = __ffs(share) - 1;
  const int thread = me.group * 128 + me.thread;
  const uint32_t rank = me.block_in_cluster - split * params.multicast;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const int owner = j >> share_bits;
    ptx::StoreCluster4(me.stages_at + ((split * share + j - owner * share) * 256 + thread) * 16,
                       rank + owner * params.multicast, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
  }
  ptx::ClusterSync();
  for (int j = 0; j < share; j += 2) {
    float sum[8] = {};
    for (int s = 0; s < params.splits; ++s) {
      const uint32_t at = me.stages_at + ((s * share + j) * 256 + thread) * 16;
      const float4 a = ptx::LoadShared4(at);
      const float4 b = ptx::LoadShared4(at + 256 * 16);
      sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
      sum[4] += b.x, sum[5] += b.y, sum[6] += b.z, sum[7] += b.w;
    }
    const int slot = (j / 2) % 4;
    StageRows<kActivation>(me, slot, sum);
    if (slot == 3 || j + 2 == share) {
      StoreRows<kActivation>(params, me, unit, column, split * share * 8 + (j / 8) * 64, slot * 16 + 16);
    }
  }
  ptx::ProxyFence();
  ptx::ClusterSync();  // the stages may be filled again
}

template <GroupedActivation kActivation>
__global__ void __launch_bounds__(kGroupedThreads, 1)
    GroupedGemmKernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ GroupedKernelParams params) {
  extern __shared__ __align__(1024) uint8_t memory[];
  __shared__ GroupedShared shared;
  const uint32_t stages_at = (ptx::SharedAddress(memory) + 1023) & ~1023u;
  const uint32_t stage_bytes = kGroupedWeightBytes + params.row_tile * 128;
  const uint32_t full_at = ptx::SharedAddress(shared.full);
  const uint32_t empty_at = ptx::SharedAddress(shared.empty);
  const int cluster_size = params.multicast * params.splits;
  const int rank = ptx::ClusterRank();
  const int split = rank / params.multicast;
  const int tile_in_unit = rank - split * params.multicast;
  const int cluster = blockIdx.x / cluster_size;
  const int num_clusters = gridDim.x / cluster_size;
  const int block_begin = params.k_blocks * split / params.splits;
  const int blocks = params.k_blocks * (split + 1) / params.splits - block_begin;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  constexpr bool kGated = kActivation == GroupedActivation::kSiluGated;

  PdlTrigger();
  if (threadIdx.x == 0) {
    for (int i = 0; i < params.stages; ++i) {
      ptx::BarrierInit(full_at + 8 * i, 1);
      ptx::BarrierInit(empty_at + 8 * i, 8 * params.multicast);  // a warp of each consumer of each block
    }
    ptx::BarrierInitFence();
    ptx::PrefetchMap(&w_map);
    ptx::PrefetchMap(&x_map);
  }
  ptx::ClusterSync();

  // Weights do not depend on earlier kernels: with one expert the first stages are filled while those end.
  int prefetched = 0;
  const int groups_per_tile = 8;  // of the tensor map's last dimension
  if (params.num_experts == 1 && cluster < params.raster && cluster < params.weight_units) {
    prefetched = min(params.stages, blocks);
    if (threadIdx.x == 0) {
      for (int i = 0; i < prefetched; ++i) {
        ptx::BarrierExpect(full_at + 8 * i, kGroupedWeightBytes);
        ptx::Load5d(stages_at + i * stage_bytes, &w_map, full_at + 8 * i, params.w_policy,
                    params.w_start[0] + block_begin + i, (cluster * params.multicast + tile_in_unit) * groups_per_tile);
      }
    }
  }
  PdlWait();
  for (int i = threadIdx.x; i <= params.num_experts; i += kGroupedThreads) shared.offsets[i] = params.offsets[i];
  __syncthreads();
  if (warp == 0) {
    // Prefix sum of the row tiles: lane i has experts 8 i to 8 i + 7.
    int tiles[8];
    int sum = 0;
    for (int i = 0; i < 8; ++i) {
      const int e = lane * 8 + i;
      tiles[i] = sum;
      if (e < params.num_experts) {
        sum += (shared.offsets[e + 1] - shared.offsets[e] + params.row_tile - 1) / params.row_tile;
      }
    }
    int before = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += other;
    }
    if (lane == 31) shared.tile_begin[params.num_experts] = before;
    before -= sum;
    for (int i = 0; i < 8; ++i) {
      if (lane * 8 + i < params.num_experts) shared.tile_begin[lane * 8 + i] = before + tiles[i];
    }
  }
  __syncthreads();

  UnitCursor unit(params, shared);
  Ring ring;
  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const bool leader = threadIdx.x == 0;
    if (leader && prefetched > 0 && shared.tile_begin[1] == 0) {
      // No rows: what was asked for must have come before the block ends.
      for (int i = 0; i < prefetched; ++i) {
        ptx::BarrierArrive(full_at + 8 * i);
        ptx::BarrierWait(full_at + 8 * i, 0);
      }
    }
    const uint16_t mask = ((1 << params.multicast) - 1) << (split * params.multicast);
    for (int index = cluster; unit.Seek(index); index += num_clusters) {
      if (leader) {
        const int boxes = (unit.rows + params.x_box_rows - 1) / params.x_box_rows;
        const uint32_t box_bytes = params.x_box_rows * 128;
        const int group = (unit.weight_unit * params.multicast + tile_in_unit) * groups_per_tile;
        for (int i = 0; i < blocks; ++i) {
          const uint32_t full = full_at + 8 * ring.stage;
          const uint32_t at = stages_at + ring.stage * stage_bytes;
          ptx::BarrierWait(empty_at + 8 * ring.stage, ring.parity ^ 1);
          if (prefetched > 0) {
            --prefetched;
            ptx::BarrierArriveExpect(full, boxes * box_bytes);
          } else {
            ptx::BarrierArriveExpect(full, kGroupedWeightBytes + boxes * box_bytes);
            ptx::Load5d(at, &w_map, full, params.w_policy, params.w_start[unit.expert] + block_begin + i, group);
          }
          for (int box = tile_in_unit; box < boxes; box += params.multicast) {
            const uint32_t to = at + kGroupedWeightBytes + box * box_bytes;
            const int row = unit.row_begin + box * params.x_box_rows;
            if (params.multicast == 1) {
              ptx::Load2d(to, &x_map, full, ptx::kEvictLast, (block_begin + i) * 64, row);
            } else {
              ptx::Load2dMulticast(to, &x_map, full, ptx::kEvictLast, (block_begin + i) * 64, row, mask);
            }
          }
          ring.Advance(params.stages);
        }
      }
      __syncwarp();
      if (params.splits > 1) {
        for (int i = 0; i < 3; ++i) ptx::ClusterSync();
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consumer me;
    me.stages_at = stages_at;
    me.full_at = full_at;
    me.empty_at = empty_at;
    me.stage_bytes = stage_bytes;
    me.group = warp / 4 - 1;
    me.thread = threadIdx.x % 128;
    me.warp = warp % 4;
    me.lane = lane;
    me.staging_at = stages_at + params.stages * stage_bytes + me.group * kGroupedStagingBytes;
    me.block_in_cluster = rank;
    me.peers_begin = split * params.multicast;
    constexpr int kGroupColumns = kGated ? 32 : 64;
    for (int index = cluster; unit.Seek(index); index += num_clusters) {
      const int column = ((unit.weight_unit * params.multicast + tile_in_unit) * 2 + me.group) * kGroupColumns;
      if (unit.rows <= 64 && params.splits < 8) {
        ComputeUnit<kActivation, 64>(params, me, ring, unit, column, blocks, split);
      } else if (unit.rows <= 128) {
        ComputeUnit<kActivation, 128>(params, me, ring, unit, column, blocks, split);
      } else if (unit.rows <= 192 && params.splits == 1) {
        ComputeUnit<kActivation, 192>(params, me, ring, unit, column, blocks, split);
      } else {
        ComputeUnit<kActivation, 256>(params, me, ring, unit, column, blocks, split);
      }
    }
  }
  ptx::ClusterSync();  // no block ends while others still signal it
}

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_GROUPED_GEMM_KERNEL_CUH_
