#include <cuda_fp8.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/prefill_metadata.h"

namespace soloist::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) MetadataKernel(const __grid_constant__ PrefillMetadataArgs args) {
  const int slot = blockIdx.x;
  PdlWait();
  PdlTrigger();
  const int sequence = min(slot, args.num_sequences - 1);
  const int end = args.query_starts[sequence + 1];
  const int begin = slot < args.num_sequences ? args.query_starts[sequence] : end;
  const int rows = end - begin;
  const int keys = rows > 0 ? args.seq_lens[sequence] : 0;
  if (threadIdx.x == 0) {
    args.rows[slot] = keys > 0 ? rows : 0;
    args.keys[slot] = keys;
    args.row_offsets[slot] = static_cast<int64_t>(begin) * args.row_elements;
    if (slot == args.slots - 1) args.row_offsets[args.slots] = static_cast<int64_t>(end) * args.row_elements;
  }
  const int blocks = (keys + args.block_size - 1) / args.block_size;
  const int32_t* from = args.block_tables + static_cast<int64_t>(sequence) * args.max_blocks;
  int32_t* to = args.table + static_cast<int64_t>(slot) * args.table_width;
  for (int j = threadIdx.x; j < args.table_width; j += kThreads) {
    to[j] = j >= blocks ? 0 : args.pitch > 0 ? slot * args.pitch + j : from[j];
  }
}

__global__ void __launch_bounds__(kThreads) GatherKernel(const __grid_constant__ GatherKvArgs args) {
  const int block = blockIdx.x, sequence = blockIdx.y;
  PdlWait();
  PdlTrigger();
  if (static_cast<int64_t>(block) * args.block_size >= args.seq_lens[sequence]) return;
  const int64_t from = args.block_tables[static_cast<int64_t>(sequence) * args.max_blocks + block];
  const int64_t to = static_cast<int64_t>(sequence) * args.pitch + block;
  const uint4* in = reinterpret_cast<const uint4*>(
      static_cast<const uint8_t*>(blockIdx.z == 0 ? args.keys : args.values) + from * args.block_elements);
  uint4* out = reinterpret_cast<uint4*>((blockIdx.z == 0 ? args.keys_out : args.values_out) + to * args.block_elements);
  const int vectors = static_cast<int>(args.block_elements / 16);
#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 packed = __ldcs(in + i);
    const __nv_fp8x4_storage_t quads[4] = {packed.x, packed.y, packed.z, packed.w};
    uint32_t words[8];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      __nv_fp8x4_e4m3 quad;
      quad.__x = quads[q];
      const float4 f = static_cast<float4>(quad);
      // e4m3 has 3 bits of mantissa: its values are bfloat16 values, so the upper half is all there is.
      words[2 * q] = __byte_perm(__float_as_uint(f.x), __float_as_uint(f.y), 0x7632);
      words[2 * q + 1] = __byte_perm(__float_as_uint(f.z), __float_as_uint(f.w), 0x7632);
    }
    out[2 * i] = make_uint4(words[0], words[1], words[2], words[3]);
    out[2 * i + 1] = make_uint4(words[4], words[5], words[6], words[7]);
  }
}

}  // namespace

cudaError_t WritePrefillMetadata(const PrefillMetadataArgs& args, cudaStream_t stream) {
  if (args.num_sequences <= 0) return cudaSuccess;
  if (args.num_sequences > args.slots) return cudaErrorInvalidValue;
  return Launch(MetadataKernel, dim3(args.slots), dim3(kThreads), 0, stream, 1, args);
}

cudaError_t GatherKv(const GatherKvArgs& args, cudaStream_t stream) {
  if (args.num_sequences <= 0 || args.pitch <= 0) return cudaSuccess;
  if (args.block_elements % 16 != 0 || args.num_sequences > 65535) return cudaErrorInvalidValue;
  const dim3 grid(args.pitch, args.num_sequences, 2);
  return Launch(GatherKernel, grid, dim3(kThreads), 0, stream, 1, args);
}

}  // namespace soloist::cuda
