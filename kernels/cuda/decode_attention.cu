#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/decode_attention_generic.cuh"
#include "kernels/cuda/decode_attention_launch.cuh"

namespace soloist::cuda {
namespace {

bool Aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool Valid(const DecodeAttentionArgs& args) {
  const KvLayer& kv = args.kv;
  if (args.num_rows < 0 || args.num_rows > kDecodeAttentionMaxRows) return false;
  if (kv.dtype != DType::kBF16 && kv.dtype != DType::kF8E4M3) return false;
  if (kv.head_dim <= 0 || kv.head_dim > 256 || kv.head_dim % 8 != 0) return false;
  if (kv.block_size < 16 || !std::has_single_bit(static_cast<unsigned>(kv.block_size))) return false;
  if (kv.num_kv_heads <= 0 || args.num_heads <= 0 || args.num_heads % kv.num_kv_heads != 0) return false;
  if (int64_t{args.num_rows} * kv.num_kv_heads > decode::kMaxPairs) return false;
  if (kv.num_blocks <= 0 || kv.num_blocks * kv.num_kv_heads * kv.block_size > INT32_MAX) return false;
  if (args.max_len < 0 || args.max_len > int64_t{args.max_blocks} * kv.block_size || args.max_len >= 1 << 30)
    return false;
  if (args.sliding_window < 0) return false;
  const int64_t columns = int64_t{args.num_heads} * kv.head_dim;
  if (args.q_stride % 8 != 0 || args.out_stride % 8 != 0 || args.q_stride < columns || args.out_stride < columns)
    return false;
  return Aligned(args.q) && Aligned(args.out) && Aligned(kv.keys) && Aligned(kv.values) && Aligned(args.workspace);
}

}  // namespace

int64_t DecodeAttentionWorkspaceBytes(int max_rows, int64_t max_len, int num_heads, int head_dim) {
  return decode::kCounterBytes + decode::kTicketBytes +
         decode::SlotBytes(max_rows, max_len, num_heads, head_dim, decode::kChunkKeys);
}

cudaError_t DecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (!Valid(args)) return cudaErrorInvalidValue;
  const int head_dim = args.kv.head_dim;
  const int group = args.num_heads / args.kv.num_kv_heads;
  if ((head_dim != 64 && head_dim != 128) || group > decode::kMaxGroup) return decode::LaunchGeneric(args, stream);
  if (args.workspace_bytes < DecodeAttentionWorkspaceBytes(args.num_rows, args.max_len, args.num_heads, head_dim)) {
    return cudaErrorInvalidValue;
  }
  const auto launch = [&](auto fp8, auto dim) {
    const auto kernel = group <= 8 ? decode::LaunchTensorCores<fp8.value, dim.value, 1>
                                   : decode::LaunchTensorCores<fp8.value, dim.value, 2>;
    return kernel(args, decode::Tuning(), stream);
  };
  constexpr std::integral_constant<int, 64> k64;
  constexpr std::integral_constant<int, 128> k128;
  if (args.kv.dtype == DType::kF8E4M3) {
    return head_dim == 64 ? launch(std::true_type(), k64) : launch(std::true_type(), k128);
  }
  return head_dim == 64 ? launch(std::false_type(), k64) : launch(std::false_type(), k128);
}

}  // namespace soloist::cuda
