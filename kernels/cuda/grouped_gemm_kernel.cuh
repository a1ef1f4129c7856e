// The kernel of grouped_gemm.cu.
//
// A unit of work is (expert e, row tile r, `multicast` neighbouring weight tiles); a cluster of `multicast` blocks
// computes it, each block one weight tile: 128 rows of w[e]. As the operands are swapped, a block's product is [128
// weight rows, up to 256 rows of x], whose transpose goes to out.
//   warp group 0   producer: its first thread issues the copies of 64-column blocks of k into a ring of stages
//   warp groups 1, 2   consumers: 64 weight rows each, wgmma m64nNk16, N = rows of the tile rounded up to 64
// Each block reads its weights itself; each block of a cluster reads a share of the x rows and sends it to all.
// Units are dealt round-robin to the resident clusters. If there are so few that `splits` clusters can share each one,
// they do: each takes a part of k, writes its sums to `partials` and finishes a share of the rows, adding the parts in
// order. Launch: 384 threads, about 215 KB of shared memory, at most one block per SM, all of them resident.
#ifndef SOLOIST_KERNELS_CUDA_GROUPED_GEMM_KERNEL_CUH_
#define SOLOIST_KERNELS_CUDA_GROUPED_GEMM_KERNEL_CUH_

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

// 0.5 x (1 + erf(x / sqrt 2)) = max(x, 0) - |x| exp(-x^2 / 2) q(|x|) with q(t) = exp(t^2 / 2) erfc(t / sqrt 2) / 2,
// here a polynomial on [0, 6]. Within 1e-4 of the value (of 1e-5 below x = -4.5), a twentieth of bf16's rounding; erff
// takes half as long again.
__device__ __forceinline__ float Gelu(float x) {
  const float t = fminf(fabsf(x), 6.0f);
  float q = -7.040954641e-7f;
  q = fmaf(q, t, 2.211341688e-5f);
  q = fmaf(q, t, -3.040807206e-4f);
  q = fmaf(q, t, 2.423126875e-3f);
  q = fmaf(q, t, -1.254093087e-2f);
  q = fmaf(q, t, 4.512734260e-2f);
  q = fmaf(q, t, -1.193526861e-1f);
  q = fmaf(q, t, 2.441356241e-1f);
  q = fmaf(q, t, -3.978910329e-1f);
  q = fmaf(q, t, 4.999661087e-1f);
  const float density = ptx::Exp2(x * -0.72134752f * x);
  return fmaf(-fabsf(x) * density, q, fmaxf(x, 0.0f));
}
__device__ __forceinline__ float SiluGate(float g, float u) { return __fdividef(g, 1.0f + __expf(-g)) * u; }

// What a consumer thread needs to know.
struct Consumer {
  uint32_t stages_at;  // shared memory
  uint32_t full_at;
  uint32_t empty_at;
  uint32_t staging_at;
  uint32_t stage_bytes;
  const CUtensorMap* out_map;
  int group;   // 0, 1
  int thread;  // of the group
  int warp;
  int lane;
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

// Puts 16 x rows (columns of the product; v: this thread's part) into place `slot` (0 to 3) of a staging area. Its rows
// have 128 bytes (64 if gated) and the copy engine's swizzle of that width, which keeps 8 of them on distinct banks.
template <GroupedActivation kActivation>
__device__ __forceinline__ void StageRows(const Consumer& me, uint32_t staging_at, int slot, const float* v) {
  const int i = me.lane & 7;
  if constexpr (kActivation == GroupedActivation::kSiluGated) {
    const int row = slot * 16 + ((me.lane >> 3) & 1) * 8 + i;
    ptx::StoreTransposed2(staging_at + row * 64 + ((me.warp ^ (row >> 1)) & 3) * 16,
                          ptx::Pack(SiluGate(v[0], v[2]), SiluGate(v[1], v[3])),
                          ptx::Pack(SiluGate(v[4], v[6]), SiluGate(v[5], v[7])));
  } else {
    float y[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) y[c] = kActivation == GroupedActivation::kGelu ? Gelu(v[c]) : v[c];
    const int matrix = me.lane >> 3;
    const int row = slot * 16 + (matrix >> 1) * 8 + i;
    ptx::StoreTransposed4(staging_at + row * 128 + ((me.warp * 2 + (matrix & 1)) ^ i) * 16, ptx::Pack(y[0], y[1]),
                          ptx::Pack(y[2], y[3]), ptx::Pack(y[4], y[5]), ptx::Pack(y[6], y[7]));
  }
}

// Writes the staged rows, the first of which is x row `first` of the unit, to out, all but those past the unit's last
// and the columns past out's. `column`: the group's first. Between two GroupSync.
template <GroupedActivation kActivation>
__device__ __forceinline__ void StoreRows(const GroupedKernelParams& params, const Consumer& me, const UnitCursor& unit,
                                          uint32_t staging_at, int column, int first, int count) {
  constexpr bool kGated = kActivation == GroupedActivation::kSiluGated;
  constexpr int kPieces = kGated ? 4 : 8;  // of 16 bytes, in a row
  for (int index = me.thread; index < count * kPieces; index += 128) {
    const int row = index / kPieces;
    const int piece = index % kPieces;
    const int swizzled = kGated ? (piece ^ (row >> 1)) & 3 : piece ^ (row & 7);
    if (first + row < unit.rows && column + piece * 8 < params.columns) {
      const uint4 v = ptx::LoadShared16(staging_at + row * (kPieces * 16) + swizzled * 16);
      *reinterpret_cast<uint4*>(params.out + (unit.row_begin + first + row) * params.out_stride + column + piece * 8) =
          v;
    }
  }
}

// Rounds a whole product and writes it to out, 64 rows at a time: the copy engine where all of them are the expert's.
template <GroupedActivation kActivation, int N>
__device__ __forceinline__ void StoreProduct(const GroupedKernelParams& params, const Consumer& me,
                                             const UnitCursor& unit, int column, const float (&acc)[128]) {
#pragma unroll
  for (int chunk = 0; chunk < N / 64; ++chunk) {
    const uint32_t at = me.staging_at + (params.staging_buffers == 2 ? (chunk & 1) * kGroupedStagingBytes : 0);
    if (me.thread == 0) {
      // The last store from this area has read it.
      if (params.staging_buffers == 2) {
        ptx::StoreWaitRead<1>();
      } else {
        ptx::StoreWaitRead<0>();
      }
    }
    ptx::GroupSync(1 + me.group, 128);
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) StageRows<kActivation>(me, at, slot, acc + chunk * 32 + slot * 8);
    ptx::ProxyFence();
    ptx::GroupSync(1 + me.group, 128);
    const bool whole = chunk * 64 + 64 <= unit.rows;
    if (me.thread == 0) {
      if (whole) ptx::Store2d(me.out_map, at, column, unit.row_begin + chunk * 64);
      ptx::StoreCommit();
    }
    if (!whole) StoreRows<kActivation>(params, me, unit, at, column, chunk * 64, 64);
  }
}

// One unit, or this block's part of it, with N columns of the product. `last`: the block has no other unit after it.
template <GroupedActivation kActivation, int N>
__device__ __forceinline__ void ComputeUnit(const GroupedKernelParams& params, const Consumer& me, Ring& ring,
                                            const UnitCursor& unit, int column, int blocks, const GroupedSplit& split,
                                            bool last) {
  constexpr int kConsumers = 256;
  constexpr int kGroups = N / 8;  // of x rows
  float acc[128];
  Multiply<N>(params, me, ring, blocks, acc);
  if (!last) {
    StoreProduct<kActivation, N>(params, me, unit, column, acc);
    return;
  }
  // Part p finishes the groups of x rows [p * share, (p + 1) * share): its own sums of those go to shared memory (the
  // stages are free once both consumers have read them), the others to `partials`. A unit in one part comes here too:
  // the loop below is short code, and a kernel's only unit runs it before the instruction caches are warm.
  const int share = (kGroups / 2 + split.count - 1) / split.count * 2;
  const int own_begin = split.index * share;
  const int own_end = min(own_begin + share, kGroups);
  const int thread = me.group * 128 + me.thread;
  const uint32_t own_at = me.stages_at + thread * 16 - own_begin * (kConsumers * 16);
  float4* const sent = params.partials + blockIdx.x * kGroupedPartials + thread;
  ptx::GroupSync(3, kConsumers);
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
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
    if (thread < split.count && thread != split.index && thread * share < kGroups) {
      ptx::AddRelease(params.arrivals + first_block + thread * split.block_stride, 1);
    }
    if (own_begin >= kGroups) return;
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
    float sum[8] = {};
#pragma unroll 4
    for (int s = 0; s < split.count; ++s) {
      const float4* const from = received + s * split.block_stride * kGroupedPartials + j * kConsumers;
      const bool own = s == split.index;
      const float4 a = own ? ptx::LoadShared4(own_at + j * (kConsumers * 16)) : __ldcg(from);
      const float4 b = own ? ptx::LoadShared4(own_at + (j + 1) * (kConsumers * 16)) : __ldcg(from + kConsumers);
      sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
      sum[4] += b.x, sum[5] += b.y, sum[6] += b.z, sum[7] += b.w;
    }
    const int place = (j - own_begin) / 2;
    StageRows<kActivation>(me, me.staging_at, place % 4, sum);
    if (place % 4 == 3 || j + 2 == own_end) {
      ptx::GroupSync(1 + me.group, 128);
      StoreRows<kActivation>(params, me, unit, me.staging_at, column, (own_begin + place / 4 * 8) * 8,
                             (place % 4 + 1) * 16);
      ptx::GroupSync(1 + me.group, 128);
    }
  }
}

template <GroupedActivation kActivation>
__global__ void __launch_bounds__(kGroupedThreads, 1)
    GroupedGemmKernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ CUtensorMap out_map, const __grid_constant__ GroupedKernelParams params) {
  extern __shared__ __align__(1024) uint8_t memory[];
  constexpr bool kGated = kActivation == GroupedActivation::kSiluGated;
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

  PdlTrigger();
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
  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
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
    me.staging_at = staging_at + me.group * staging_bytes;
    me.out_map = &out_map;
    for (; unit.Seek(index); index += step) {
      const int column = ((unit.weight_unit * params.multicast + rank) * 2 + me.group) * (kGated ? 32 : 64);
      const bool last = index + step >= units;
      if (unit.rows <= 64) {
        ComputeUnit<kActivation, 64>(params, me, ring, unit, column, blocks, split, last);
      } else if (unit.rows <= 128) {
        ComputeUnit<kActivation, 128>(params, me, ring, unit, column, blocks, split, last);
      } else if (unit.rows <= 192) {
        ComputeUnit<kActivation, 192>(params, me, ring, unit, column, blocks, split, last);
      } else {
        ComputeUnit<kActivation, 256>(params, me, ring, unit, column, blocks, split, last);
      }
    }
    if (me.thread == 0) ptx::StoreWaitAll();
  }
  if (params.multicast > 1) ptx::ClusterSync();  // no block ends while another still signals it
}

}  // namespace soloist::cuda

#endif  // SOLOIST_KERNELS_CUDA_GROUPED_GEMM_KERNEL_CUH_
