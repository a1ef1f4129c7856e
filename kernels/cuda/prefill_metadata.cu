#include <cuda_fp8.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/prefill_metadata.h"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 256;
// cuDNN takes keys in tiles of at most so many, of which it reads every block.
constexpr int kTileKeys = 256;

// Zeros behind the last key of `sequence`, for one kv head.
__device__ void ZeroTail(const PrefillMetadataArgs& args, int sequence, int head) {
  const int keys = args.seq_lens[sequence], used = keys % args.block_size;
  if (used == 0) return;
  const int64_t block = args.block_tables[static_cast<int64_t>(sequence) * args.max_blocks + keys / args.block_size];
  const int64_t at = ((block * args.num_kv_heads + head) * args.block_size + used) * args.head_dim;
  uint4* out = reinterpret_cast<uint4*>(args.values + at);
  const int vectors = (args.block_size - used) * args.head_dim / 8;
  for (int i = threadIdx.x; i < vectors; i += kThreads) out[i] = make_uint4(0, 0, 0, 0);
}

__global__ void __launch_bounds__(kThreads) MetadataKernel(const __grid_constant__ PrefillMetadataArgs args) {
  __shared__ int starts[kMaxPrefillSlots + 1], lens[kMaxPrefillSlots];
  const int slot = blockIdx.x, thread = threadIdx.x;
  PdlWait();
  PdlTrigger();
  if (blockIdx.y > 0) {
    if (slot < args.num_sequences) ZeroTail(args, slot, blockIdx.y - 1);
    return;
  }
  if (thread <= args.num_sequences) starts[thread] = args.query_starts[thread];
  if (thread < args.num_sequences) lens[thread] = args.seq_lens[thread];
  __syncthreads();
  // The slot's piece, in the order of the rows; behind the last one none.
  int sequence = 0, begin = starts[args.num_sequences], rows = 0, keys = 0;
  for (int s = 0, index = slot; s < args.num_sequences; ++s) {
    const int all_rows = lens[s] > 0 ? starts[s + 1] - starts[s] : 0;
    const int pieces = (all_rows + kPrefillPieceRows - 1) / kPrefillPieceRows;
    if (index < pieces) {
      const int first = index * kPrefillPieceRows, end = min(all_rows, first + kPrefillPieceRows);
      sequence = s;
      begin = starts[s] + first;
      rows = end - first;
      keys = lens[s] - all_rows + end;
      break;
    }
    index -= pieces;
  }
  if (thread == 0) {
    args.rows[slot] = rows;
    args.keys[slot] = keys;
    args.row_offsets[slot] = static_cast<int64_t>(begin) * args.row_elements;
    if (slot == args.slots - 1) args.row_offsets[args.slots] = static_cast<int64_t>(begin + rows) * args.row_elements;
  }
  const int blocks = (keys + args.block_size - 1) / args.block_size;
  if (blocks == 0) return;
  const int read = min(args.table_width, blocks + kTileKeys / args.block_size + 1);
  const int32_t* from = args.block_tables + static_cast<int64_t>(sequence) * args.max_blocks;
  int32_t* to = args.table + static_cast<int64_t>(slot) * args.table_width;
  for (int j = thread; j < read; j += kThreads) {
    const int block = min(j, blocks - 1);
    to[j] = args.pitch > 0 ? sequence * args.pitch + block : from[block];
  }
}

// Four e4m3 values to bfloat16: they have 3 bits of mantissa, so that the upper half of a float holds them.
__device__ __forceinline__ uint2 Widen(uint32_t quad) {
  __nv_fp8x4_e4m3 packed;
  packed.__x = quad;
  const float4 f = static_cast<float4>(packed);
  return {__byte_perm(__float_as_uint(f.x), __float_as_uint(f.y), 0x7632),
          __byte_perm(__float_as_uint(f.z), __float_as_uint(f.w), 0x7632)};
}

__global__ void __launch_bounds__(kThreads) GatherKernel(const __grid_constant__ GatherKvArgs args) {
  const int block = blockIdx.x, sequence = blockIdx.y;
  PdlWait();
  PdlTrigger();
  const int used = args.seq_lens[sequence] - block * args.block_size;  // slots that have a key, and more
  if (used <= 0) return;
  const int chunks_per_slot = args.head_dim / 8;
  const int chunks_per_head = args.block_size * chunks_per_slot;
  const int chunks = args.num_kv_heads * chunks_per_head;  // of 8 elements
  const int64_t from =
      static_cast<int64_t>(args.block_tables[static_cast<int64_t>(sequence) * args.max_blocks + block]);
  const int64_t to = static_cast<int64_t>(sequence) * args.pitch + block;
  const uint2* in = static_cast<const uint2*>(blockIdx.z == 0 ? args.keys : args.values) + from * chunks;
  uint4* out = reinterpret_cast<uint4*>(blockIdx.z == 0 ? args.keys_out : args.values_out) + to * chunks;
  const bool whole = used >= args.block_size;
#pragma unroll 4
  for (int i = threadIdx.x; i < chunks; i += kThreads) {
    const uint2 packed = __ldcs(in + i);
    const uint2 low = Widen(packed.x), high = Widen(packed.y);
    const bool valid = whole || i % chunks_per_head / chunks_per_slot < used;
    out[i] = valid ? make_uint4(low.x, low.y, high.x, high.y) : make_uint4(0, 0, 0, 0);
  }
}

}  // namespace

cudaError_t WritePrefillMetadata(const PrefillMetadataArgs& args, cudaStream_t stream) {
  if (args.num_sequences <= 0) return cudaSuccess;
  if (args.num_sequences > args.slots || args.slots > kMaxPrefillSlots) return cudaErrorInvalidValue;
  const dim3 grid(args.slots, args.values == nullptr ? 1 : 1 + args.num_kv_heads);
  return Launch(MetadataKernel, grid, dim3(kThreads), 0, stream, 1, args);
}

cudaError_t GatherKv(const GatherKvArgs& args, cudaStream_t stream) {
  if (args.num_sequences <= 0 || args.pitch <= 0) return cudaSuccess;
  if (args.head_dim % 8 != 0 || args.num_sequences > kMaxPrefillSlots) return cudaErrorInvalidValue;
  const dim3 grid(args.pitch, args.num_sequences, 2);
  return Launch(GatherKernel, grid, dim3(kThreads), 0, stream, 1, args);
}

}  // namespace soloist::cuda
