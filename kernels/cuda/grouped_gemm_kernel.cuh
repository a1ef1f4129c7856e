// The kernel of grouped_gemm.cu.
//
// A unit of work is (expert e, row tile r, `multicast` neighbouring weight tiles); a cluster of `multicast` blocks
// computes it, each block one weight tile: 128 rows of w[e]. As the operands are swapped, a block's product is [128
// weight rows, up to 256 rows of x], whose transpose goes to out.
//   warp groups 0, 1   consumers: 64 weight rows each, wgmma m64nNk16, N = rows of the tile rounded up to 64
//   after them         producer: its first thread issues the copies of 64-column blocks of k into a ring of stages
// Each block reads its weights itself; each block of a cluster reads a share of the x rows and sends it to all.
// Units are dealt round-robin to the resident clusters. If there are so few that `splits` clusters can share each one,
// they do: each takes a part of k, writes its sums to `partials` and finishes a share of the rows, adding the parts in
// order. Launch: 384 threads, up to 227 KB of shared memory, one block per SM at most, all of them resident.
//
// Weights are read through one five-dimensional tensor map for all experts: {64 columns, start, 8 rows, 2 halves,
// groups}, where `start` counts 128-byte steps from the lowest w[e], so that it names both the expert and the block of
// k. The halves of a group are rows 0-7 and 8-15 of 16 consecutive ones or, gated, 8 gate rows and the 8 up rows of the
// same columns: a thread then holds a gate and its up in registers 4j + {0, 1} and 4j + {2, 3}.
#ifndef SOLOIST_KERNELS_CUDA_GROUPED_GEMM_KERNEL_CUH_
#define SOLOIST_KERNELS_CUDA_GROUPED_GEMM_KERNEL_CUH_

#include "kernels/cuda/grouped_gemm_epilogue.cuh"
#include "kernels/cuda/grouped_gemm_ptx.cuh"
#include "kernels/cuda/grouped_gemm_units.cuh"
#include "kernels/cuda/launch.cuh"

namespace soloist::cuda {

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

// acc = the block's product over `blocks` blocks of k.
template <int N>
__device__ __forceinline__ void Multiply(const GroupedKernelParams& params, const Consumer& me, Ring& ring, int blocks,
                                         float (&acc)[128]) {
  const auto release = [&](int stage) {
    if (me.lane < params.multicast) ptx::BarrierArriveAt(me.empty_at + 8 * stage, me.lane);
  };
  int previous = 0;
#pragma unroll 1
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
      release(previous);
    }
    previous = ring.stage;
    ring.Advance(params.stages);
  }
  ptx::WgmmaWait<0>();
  release(previous);
}

// One unit, or this block's part of it, with N columns of the product. `last`: the block has no other unit after it.
template <typename Variant, int N>
__device__ __forceinline__ void ComputeUnit(const GroupedKernelParams& params, const Consumer& me, Ring& ring,
                                            const UnitCursor& unit, int column, int blocks, const GroupedSplit& split,
                                            bool last) {
  constexpr int kConsumers = kGroupedConsumers;
  constexpr int kGroups = N / 8;  // of x rows
  float acc[128];
  Multiply<N>(params, me, ring, blocks, acc);
  if (!last) {
    StoreProduct<Variant, N>(params, me, unit, column, acc);
    return;
  }
  // Part p finishes the groups of x rows [p * share, (p + 1) * share): its own sums of those go to shared memory (the
  // stages are free once both consumers have read them), the others to `partials`. A unit in one part comes here too:
  // the loop below is short code, and a kernel's only unit runs it before the instruction caches are warm.
  const int groups = min(kGroups, (unit.rows + 15) / 16 * 2);  // that hold rows
  const int share = (groups / 2 + split.count - 1) / split.count * 2;
  const int own_begin = split.index * share;
  const int own_end = min(own_begin + share, groups);
  const int thread = me.group * 128 + me.thread;
  const uint32_t own_at = me.stages_at + thread * 16 - own_begin * (kConsumers * 16);
  float4* const sent = params.partials + blockIdx.x * kGroupedPartials + thread;
  ptx::GroupSync(3, kConsumers);
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    if (j >= groups) break;
    const float4 v = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
    if (j >= own_begin && j < own_end) {
      ptx::StoreShared4(own_at + j * (kConsumers * 16), v);
    } else {
      __stcg(sent + j * kConsumers, v);
    }
  }
  const int first_block = static_cast<int>(blockIdx.x) - split.index * split.block_stride;
  if (split.count > 1) {
    ptx::GroupSync(3, kConsumers);
    if (thread < split.count && thread != split.index && thread * share < groups) {
      ptx::AddRelease(params.arrivals + first_block + thread * split.block_stride, 1);
    }
    if (own_begin >= groups) return;
    if (thread == 0) {
      while (ptx::LoadAcquire(params.arrivals + blockIdx.x) != split.count - 1) {
      }
      params.arrivals[blockIdx.x] = 0;
    }
    ptx::GroupSync(3, kConsumers);
  }
  const float4* const received = params.partials + first_block * kGroupedPartials + thread;
  // The staging area: the copy engine has read what the unit before left there.
  if (me.thread == 0) ptx::StoreWaitRead<0>();
  ptx::GroupSync(1 + me.group, 128);
#pragma unroll 1
  for (int j = own_begin; j < own_end; j += 2) {
    float sum[8];
    for (float& value : sum) value = -0.0f;  // the zero that changes no bit of what is added
#pragma unroll 4
    for (int s = 0; s < split.count; ++s) {
      const float4* const from = received + s * split.block_stride * kGroupedPartials + j * kConsumers;
      const bool own = s == split.index;
      const float4 a = own ? ptx::LoadShared4(own_at + j * (kConsumers * 16)) : __ldcg(from);
      const float4 b = own ? ptx::LoadShared4(own_at + (j + 1) * (kConsumers * 16)) : __ldcg(from + kConsumers);
      sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
      sum[4] += b.x, sum[5] += b.y, sum[6] += b.z, sum[7] += b.w;
    }
    if constexpr (Variant::kFloat) {
      StoreFloats(params, me, unit, column, j * 8, sum);
    } else {
      constexpr int kSlots = kGroupedChunkRows / 16;
      const int place = (j - own_begin) / 2;
      const int slot = place % kSlots;
      StageRows<Variant>(me, me.staging_at, slot, sum);
      if (slot == kSlots - 1 || j + 2 == own_end) {
        ptx::GroupSync(1 + me.group, 128);
        StoreRows<Variant>(params, me, unit, me.staging_at, column, own_begin * 8 + (place - slot) * 16,
                           (slot + 1) * 16);
        ptx::GroupSync(1 + me.group, 128);
      }
    }
  }
}

template <typename Variant>
__global__ void __launch_bounds__(kGroupedThreads, 1)
    GroupedGemmKernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ CUtensorMap out_map, const __grid_constant__ GroupedKernelParams params) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t stage_bytes = kGroupedWeightBytes + params.row_tile * 128;
  const uint32_t stages_at = ptx::SharedAddress(memory);
  const uint32_t staging_at = stages_at + params.stages * stage_bytes;
  const uint32_t staging_bytes = params.staging_buffers * kGroupedStagingBytes;
  GroupedShared& shared = *reinterpret_cast<GroupedShared*>(memory + params.stages * stage_bytes + 2 * staging_bytes);
  const uint32_t full_at = ptx::SharedAddress(shared.full);
  const uint32_t empty_at = ptx::SharedAddress(shared.empty);
  const int rank = ptx::ClusterRank();
  const int cluster = blockIdx.x / params.multicast;
  const int num_clusters = gridDim.x / params.multicast;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  // No PdlTrigger: beside a block of this size hardly another fits, and measured in a decode step, early blocks of the
  // next kernel cost more than they gain. It starts when all blocks have left.
  if (stages_at % 1024 != 0) __trap();  // what the swizzles need
  const auto init_barriers = [&] {
#pragma unroll 1
    for (int i = 0; i < params.stages; ++i) {
      ptx::BarrierInit(full_at + 8 * i, 1);
      ptx::BarrierInit(empty_at + 8 * i, 8 * params.multicast);  // a warp of each consumer of each block
    }
    ptx::BarrierInitFence();
  };
  // Blocks signal each other only in clusters: without, a barrier of the block is enough, and quicker.
  const auto sync_cluster = [&] {
    if (params.multicast > 1) {
      ptx::ClusterSync();
    } else {
      __syncthreads();
    }
  };
  if (threadIdx.x == 0) init_barriers();
  sync_cluster();

  // Block `block` of k of the weight tile, into a stage.
  const auto load_weights = [&](int stage, int expert, int weight_unit, int block) {
    ptx::Load5d(stages_at + stage * stage_bytes, &w_map, full_at + 8 * stage, params.w_policy,
                params.w_start[expert] + block, (weight_unit * params.multicast + rank) * 8);
  };
  const auto part_begin = [&](int part, int parts) { return params.k_blocks * part / parts; };

  // Weights do not depend on earlier kernels: where the host can tell which this block needs first, the stages are
  // filled while those end.
  int prefetched = 0;
  if (params.expect_one_tile) {
    const int parts = SplitsFor(params, params.weight_units, num_clusters);
    const int part = cluster / params.weight_units;
    if (part < parts) {
      const int begin = part_begin(part, parts);
      prefetched = min(params.stages, part_begin(part + 1, parts) - begin);
      if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < prefetched; ++i) {
          ptx::BarrierExpect(full_at + 8 * i, kGroupedWeightBytes);
          load_weights(i, 0, cluster - part * params.weight_units, begin + i);
        }
      }
    }
  }
  PdlWait();
  if (threadIdx.x <= params.num_experts) shared.offsets[threadIdx.x] = params.offsets[threadIdx.x];
  __syncthreads();
  if (warp == 0) CountTiles(params, shared, lane);
  __syncthreads();
  const int row_tiles = shared.tile_begin[params.num_experts];
  if (prefetched > 0 && row_tiles != 1) {
    // A wrong guess: let what was asked for arrive, then start afresh.
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < prefetched; ++i) {
        ptx::BarrierArrive(full_at + 8 * i);
        ptx::BarrierWait(full_at + 8 * i, 0);
      }
#pragma unroll 1
      for (int i = 0; i < params.stages; ++i) {
        ptx::BarrierInvalidate(full_at + 8 * i);
        ptx::BarrierInvalidate(empty_at + 8 * i);
      }
      init_barriers();
    }
    prefetched = 0;
    sync_cluster();
  }

  const int units = row_tiles * params.weight_units;
  GroupedSplit split;
  split.count = SplitsFor(params, units, num_clusters);
  split.index = split.count > 1 ? cluster / units : 0;
  split.block_stride = units * params.multicast;
  int index = split.count > 1 ? cluster % units : cluster;
  if (split.index >= split.count) index = units;
  const int block_begin = part_begin(split.index, split.count);
  const int blocks = part_begin(split.index + 1, split.count) - block_begin;
  // With parts, each cluster has one unit at most.
  const int step = split.count > 1 ? units : num_clusters;
  UnitCursor unit(params, shared);
  Ring ring;
  if (warp >= kGroupedConsumers / 32) {
    ptx::ShrinkRegisters<40>();
    if (threadIdx.x == kGroupedConsumers) {
      const uint16_t everyone = (1 << params.multicast) - 1;
      const uint32_t box_bytes = params.x_box_rows * 128;
      for (; unit.Seek(index); index += step) {
        const int boxes = (unit.rows + params.x_box_rows - 1) / params.x_box_rows;
#pragma unroll 1
        for (int block = block_begin; block < block_begin + blocks; ++block) {
          const uint32_t full = full_at + 8 * ring.stage;
          const uint32_t x_at = stages_at + ring.stage * stage_bytes + kGroupedWeightBytes;
          ptx::BarrierWait(empty_at + 8 * ring.stage, ring.parity ^ 1);
          if (prefetched > 0) {
            --prefetched;
            ptx::BarrierArriveExpect(full, boxes * box_bytes);
          } else {
            ptx::BarrierArriveExpect(full, kGroupedWeightBytes + boxes * box_bytes);
            load_weights(ring.stage, unit.expert, unit.weight_unit, block);
          }
#pragma unroll 1
          for (int box = rank; box < boxes; box += params.multicast) {
            const int row = unit.row_begin + box * params.x_box_rows;
            if (params.multicast == 1) {
              ptx::Load2d(x_at + box * box_bytes, &x_map, full, ptx::kEvictLast, block * 64, row);
            } else {
              ptx::Load2dMulticast(x_at + box * box_bytes, &x_map, full, ptx::kEvictLast, block * 64, row, everyone);
            }
          }
          ring.Advance(params.stages);
        }
      }
    }
    __syncwarp();
  } else {
    ptx::GrowRegisters<232>();
    Consumer me;
    me.stages_at = stages_at;
    me.full_at = full_at;
    me.empty_at = empty_at;
    me.stage_bytes = stage_bytes;
    me.group = warp / 4;
    me.thread = threadIdx.x % 128;
    me.warp = warp % 4;
    me.lane = lane;
    me.staging_at = staging_at + me.group * staging_bytes;
    me.out_map = &out_map;
    for (; unit.Seek(index); index += step) {
      const int column = ((unit.weight_unit * params.multicast + rank) * 2 + me.group) * (Variant::kGated ? 32 : 64);
      const bool last = index + step >= units;
      if (unit.rows <= 64) {
        ComputeUnit<Variant, 64>(params, me, ring, unit, column, blocks, split, last);
      } else if (unit.rows <= 128) {
        ComputeUnit<Variant, 128>(params, me, ring, unit, column, blocks, split, last);
      } else if (unit.rows <= 192) {
        ComputeUnit<Variant, 192>(params, me, ring, unit, column, blocks, split, last);
      } else {
        ComputeUnit<Variant, 256>(params, me, ring, unit, column, blocks, split, last);
      }
    }
    if (me.thread == 0) ptx::StoreWaitAll();
  }
  if (params.multicast > 1) ptx::ClusterSync();  // no block ends while another still signals it
}

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_GROUPED_GEMM_KERNEL_CUH_
