// Host side of the tensor core kernel of decode attention.
#ifndef SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_LAUNCH_CUH_
#define SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_LAUNCH_CUH_

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/decode_attention_kernel.cuh"

namespace soloist::cuda::decode {

// Blocks per multiprocessor, stages of a block's ring (fewer where they would not fit). Found by
// measurement: 64 to 128 KB on their way per multiprocessor are enough; more only lengthens the queue in which
// everything else waits.
struct Tuning {
  int blocks_per_sm = 1;
  int max_stages = 3;
  bool prefetch = true;  // the first keys, into the L2 cache; with early_tables
};

// Workspace: the counters, tickets for the most pairs there can be, so that they lie in the same place in every call,
// then the partial sums.
constexpr int64_t kCounterBytes = 256;
constexpr int64_t kTicketBytes = 4 * kMaxPairs;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
inline EncodeTiled GetEncodeTiled() {
  static const EncodeTiled encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess ? reinterpret_cast<EncodeTiled>(function) : nullptr;
  }();
  return encode;
}

// A cache as a matrix of [num_blocks * kv_heads * block_size, head_dim], read in boxes of a block or a tile of keys,
// whichever is smaller, and up to 128 bytes.
inline cudaError_t EncodeMap(const KvLayer& kv, void* data, CUtensorMap* map) {
  const EncodeTiled encode = GetEncodeTiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const bool fp8 = kv.dtype == DType::kF8E4M3;
  const int bytes = fp8 ? 1 : 2;
  const int row_bytes = std::min(128, kv.head_dim * bytes);
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(kv.head_dim),
                               static_cast<cuuint64_t>(kv.num_blocks) * kv.num_kv_heads * kv.block_size};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(kv.head_dim) * bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(row_bytes / bytes),
                             static_cast<cuuint32_t>(std::min(kv.block_size, TileKeys(kv.head_dim, bytes)))};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode(map, fp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data,
                                 sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline int64_t SlotBytes(int rows, int64_t max_len, int num_heads, int head_dim, int chunk_keys) {
  return int64_t{rows} * num_heads * MaxChunks(max_len, chunk_keys) * (head_dim + 2) * 4;
}

// Long chunks cost less to merge, short ones occupy more multiprocessors.
inline int ChooseChunkKeys(const DecodeAttentionArgs& args, int sms) {
  const int64_t pairs = int64_t{args.num_rows} * args.kv.num_kv_heads;
  if (pairs >= 2 * int64_t{sms}) return kManyChunkKeys;
  const int64_t room = args.workspace_bytes - kCounterBytes - kTicketBytes;
  const bool fits = SlotBytes(args.num_rows, args.max_len, args.num_heads, args.kv.head_dim, kFewChunkKeys) <= room;
  return 2 * pairs < sms && fits ? kFewChunkKeys : kChunkKeys;
}

template <bool kFp8, int kHeadDim, int kQueryTiles>
cudaError_t LaunchTensorCores(const DecodeAttentionArgs& args, const Tuning& tuning, cudaStream_t stream) {
  const auto kernel = DecodeAttentionKernel<kFp8, kHeadDim, kQueryTiles>;
  constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // as createpolicy.fractional makes them
  Params p;
  cudaError_t error = EncodeMap(args.kv, args.kv.keys, &p.keys);
  if (error == cudaSuccess) error = EncodeMap(args.kv, args.kv.values, &p.values);
  if (error != cudaSuccess) return error;
  p.q = reinterpret_cast<const __nv_bfloat16*>(args.q);
  p.q_stride = args.q_stride;
  p.kv_lens = args.kv_lens;
  p.block_tables = args.block_tables;
  p.out = reinterpret_cast<__nv_bfloat16*>(args.out);
  p.out_stride = args.out_stride;
  p.policy = kEvictFirst;  // a key is read once
  p.max_blocks = args.max_blocks;
  p.max_len = static_cast<int>(args.max_len);
  p.num_rows = args.num_rows;
  p.kv_heads = args.kv.num_kv_heads;
  p.group = args.num_heads / args.kv.num_kv_heads;
  p.block_shift = std::countr_zero(static_cast<unsigned>(args.kv.block_size));
  p.window = args.sliding_window;
  p.early_tables = args.early_tables;
  p.prefetch = tuning.prefetch;
  p.scale_log2 = args.scale * static_cast<float>(M_LOG2E);

  int device, sms, sm_bytes, block_bytes;
  if ((error = cudaGetDevice(&device)) != cudaSuccess) return error;
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  p.chunk_keys = ChooseChunkKeys(args, sms);
  p.max_chunks = MaxChunks(args.max_len, p.chunk_keys);

  char* workspace = static_cast<char*>(args.workspace);
  const int64_t slots = int64_t{args.num_rows} * args.num_heads * p.max_chunks;
  p.next_item = reinterpret_cast<int32_t*>(workspace);
  p.tickets = reinterpret_cast<int32_t*>(workspace + kCounterBytes);
  p.partial_o = reinterpret_cast<float*>(workspace + kCounterBytes + kTicketBytes);
  p.partial_ml = reinterpret_cast<float2*>(p.partial_o + slots * kHeadDim);

  const int budget = std::min(block_bytes, sm_bytes / tuning.blocks_per_sm - 1024);  // 1 KB is the system's
  const auto bytes = [&](int stages) {
    return SharedLayout(stages, p.group, kHeadDim, kFp8 ? 1 : 2, p.num_rows).total;
  };
  p.stages = tuning.max_stages;
  while (p.stages > 2 && bytes(p.stages) > budget) --p.stages;
  const int shared_bytes = bytes(p.stages);
  if ((error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, block_bytes)) != cudaSuccess) {
    return error;
  }
  const int64_t items = int64_t{args.num_rows} * args.kv.num_kv_heads * p.max_chunks;
  const int grid = static_cast<int>(std::min<int64_t>(items, int64_t{sms} * tuning.blocks_per_sm));
  return Launch(kernel, dim3(grid), dim3(kThreads), shared_bytes, stream, 1, p);
}

}  // namespace soloist::cuda::decode

#endif  // SOLOIST_KERNELS_CUDA_DECODE_ATTENTION_LAUNCH_CUH_
