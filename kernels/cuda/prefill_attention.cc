// The graph and its execution by cudnn-frontend, which is included by this file only: it takes a minute to compile.
#include "kernels/cuda/prefill_attention.h"

#include <algorithm>
#include <compare>
#include <exception>
#include <map>
#include <utility>

#include "base/status.h"
#include "kernels/cuda/cuda_error.h"
#include "kernels/cuda/prefill_fallback.h"
#include "kernels/cuda/prefill_metadata.h"

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include "cudnn_frontend.h"

// Defined by whoever loads cuDNN.
void* cudnn_frontend::cudnn_dlhandle = nullptr;

namespace soloist::cuda {
namespace {

namespace fe = cudnn_frontend;

// Pointers of a call, in the order of the uids that Plan gives to the tensors.
enum Uid : int { kQ, kK, kV, kO, kRows, kKeys, kTable, kOffsets, kNumUids };
using Pointers = std::array<void*, kNumUids>;

// All that a plan depends on.
struct PlanShape {
  int slots = 0;        // sequences
  int64_t max_rows = 0; // of a sequence
  int table_width = 0;  // blocks of a sequence
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int block_size = 0;
  int64_t num_blocks = 0;
  int sliding_window = 0;
  float scale = 0;
  auto operator<=>(const PlanShape&) const = default;
};

// cudnn-frontend returns most errors and throws some.
template <typename Function>
absl::Status NoThrow(std::string_view what, Function&& function) {
  try {
    fe::error_t error = function();
    if (error.is_good()) return absl::OkStatus();
    switch (error.get_code()) {
      case fe::error_code_t::GRAPH_NOT_SUPPORTED:
      case fe::error_code_t::HEURISTIC_QUERY_FAILED:
      case fe::error_code_t::GRAPH_EXECUTION_PLAN_CREATION_FAILED:
        return Unimplemented("cuDNN {}: {}", what, error.get_message());
      default:
        return Internal("cuDNN {}: {}", what, error.get_message());
    }
  } catch (const std::exception& e) {
    return Internal("cuDNN {}: {}", what, e.what());
  }
}

// A graph of one attention, built for one shape. q and out are ragged: sequence i has rows[i] rows from element
// offsets[i] on.
class Plan {
 public:
  static absl::StatusOr<Plan> Build(cudnnHandle_t handle, const PlanShape& s) {
    Plan plan;
    RETURN_IF_ERROR(NoThrow("attention plan", [&]() -> fe::error_t {
      fe::graph::Graph& graph = *plan.graph_;
      graph.set_io_data_type(fe::DataType_t::BFLOAT16)
          .set_intermediate_data_type(fe::DataType_t::FLOAT)
          .set_compute_data_type(fe::DataType_t::FLOAT);
      using Dims = std::vector<int64_t>;
      const auto tensor = [&](Uid uid, const char* name, fe::DataType_t type, Dims dim, Dims stride) {
        return graph.tensor(fe::graph::Tensor_attributes()
                                .set_uid(uid)
                                .set_name(name)
                                .set_data_type(type)
                                .set_dim(std::move(dim))
                                .set_stride(std::move(stride)));
      };
      const int64_t b = s.slots, h = s.num_heads, d = s.head_dim, width = s.table_width;
      const int64_t head = static_cast<int64_t>(s.block_size) * d;
      const Dims kv_dim = {s.num_blocks, s.num_kv_heads, s.block_size, d};
      const Dims kv_stride = {s.num_kv_heads * head, head, d, 1};
      const Dims q_dim = {b, h, s.max_rows, d}, q_stride = {s.max_rows * h * d, d, h * d, 1};
      const auto bf16 = fe::DataType_t::BFLOAT16, i32 = fe::DataType_t::INT32;
      const auto q = tensor(kQ, "q", bf16, q_dim, q_stride);
      const auto k = tensor(kK, "k", bf16, kv_dim, kv_stride);
      const auto v = tensor(kV, "v", bf16, kv_dim, kv_stride);
      const auto rows = tensor(kRows, "rows", i32, {b, 1, 1, 1}, {1, 1, 1, 1});
      const auto keys = tensor(kKeys, "keys", i32, {b, 1, 1, 1}, {1, 1, 1, 1});
      const auto table = tensor(kTable, "table", i32, {b, 1, width, 1}, {width, width, 1, 1});
      const auto offsets = tensor(kOffsets, "offsets", fe::DataType_t::INT64, {b + 1, 1, 1, 1}, {1, 1, 1, 1});
      q->set_ragged_offset(offsets);
      auto attributes = fe::graph::SDPA_attributes()
                            .set_name("prefill")
                            .set_generate_stats(false)
                            .set_attn_scale(s.scale)
                            .set_padding_mask(true)
                            .set_seq_len_q(rows)
                            .set_seq_len_kv(keys)
                            .set_diagonal_alignment(fe::DiagonalAlignment_t::BOTTOM_RIGHT)
                            .set_diagonal_band_right_bound(0)
                            .set_paged_attention_k_table(table)
                            .set_paged_attention_v_table(table)
                            .set_paged_attention_max_seq_len_kv(s.table_width * s.block_size)
                            // AUTO may take another in later versions, which then has to be measured first.
                            .set_implementation(fe::AttentionImplementation_t::COMPOSITE);
      if (s.sliding_window > 0) attributes.set_diagonal_band_left_bound(s.sliding_window);
      auto [out, stats] = graph.sdpa(q, k, v, attributes);
      out->set_output(true).set_uid(kO).set_data_type(bf16).set_dim(q_dim).set_stride(q_stride);
      out->set_ragged_offset(offsets);
      if (fe::error_t error = graph.build(handle, {fe::HeurMode_t::A}); error.is_bad()) return error;
      return graph.get_workspace_size(plan.workspace_bytes_);
    }));
    return plan;
  }

  int64_t workspace_bytes() const { return workspace_bytes_; }

  absl::Status Execute(cudnnHandle_t handle, Pointers& pointers, void* workspace) const {
    return NoThrow("attention", [&] { return graph_->execute(handle, pointers.data(), kNumUids, workspace); });
  }

 private:
  std::unique_ptr<fe::graph::Graph> graph_ = std::make_unique<fe::graph::Graph>();
  int64_t workspace_bytes_ = 0;
};

constexpr int kMaxSlots = 64;

int RoundUpToPowerOfTwo(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <typename T>
struct DeviceArray {
  DeviceArray() = default;
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data); }
  cudaError_t Resize(int64_t n) {
    cudaFree(data);
    data = nullptr;
    return cudaMalloc(reinterpret_cast<void**>(&data), n * sizeof(T));
  }
  T* data = nullptr;
};

class CudnnPrefill final : public PrefillAttention {
 public:
  CudnnPrefill(const PrefillOptions& options, int device) : options_(options), device_(device) {}
  ~CudnnPrefill() override {
    if (handle_ != nullptr) fe::detail::destroy_handle(handle_);
  }

  absl::Status Open() {
    if (options_.deterministic) {
      fallback_reason_ = "deterministic";
      return absl::OkStatus();
    }
    if (fe::cudnn_dlhandle == nullptr) fe::cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_GLOBAL);
    if (fe::cudnn_dlhandle == nullptr) return NotFound("cuDNN 9, for attention of prompts: {}", dlerror());
    return NoThrow("cudnnCreate", [&]() -> fe::error_t {
      const cudnnStatus_t status = fe::detail::create_handle(&handle_);
      if (status == CUDNN_STATUS_SUCCESS) return {};
      return {fe::error_code_t::HANDLE_ERROR, fe::detail::get_error_string(status)};
    });
  }

  absl::Status Warm(const AttentionArgs& like, int64_t max_rows) override {
    if (handle_ == nullptr) return absl::OkStatus();
    RETURN_IF_ERROR(Prepare(like));
    for (int slots = 1; slots <= std::min(kMaxSlots, RoundUpToPowerOfTwo(options_.max_sequences)); slots *= 2) {
      ASSIGN_OR_RETURN(const Plan* plan, FindPlan(ShapeOf(like, slots, max_rows)));
      if (plan == nullptr) break;
    }
    return absl::OkStatus();
  }

  absl::Status Run(const AttentionArgs& args, int first_sequence, cudaStream_t stream) override {
    const int sequences = args.num_sequences - first_sequence;
    if (sequences <= 0) return absl::OkStatus();
    const KvLayer& kv = args.kv;
    const bool fp8 = kv.dtype == DType::kF8E4M3;
    const int64_t row_elements = int64_t{args.num_heads} * kv.head_dim;
    if (args.q.dtype != DType::kBF16 || args.out.dtype != DType::kBF16 || args.q.stride != row_elements ||
        args.out.stride != row_elements || (kv.dtype != DType::kBF16 && !fp8)) {
      return InvalidArgument("attention: q and out must be packed BF16 rows, the cache BF16 or F8E4M3");
    }
    if (handle_ == nullptr) return RunFallback(args, first_sequence, stream);
    RETURN_IF_ERROR(Prepare(args));
    // Blocks of the copy of one sequence.
    const int pitch = fp8 ? static_cast<int>((args.max_seq_len + kv.block_size - 1) / kv.block_size) : 0;
    const int64_t fit = fp8 ? std::min<int64_t>(kMaxSlots, ScratchBlocks(kv) / std::max(pitch, 1)) : kMaxSlots;
    if (fit == 0) return RunFallback(args, first_sequence, stream);
    if (stream != stream_) {
      if (fe::detail::set_stream(handle_, stream) != CUDNN_STATUS_SUCCESS) return Internal("cudnnSetStream");
      stream_ = stream;
    }
    for (int begin = first_sequence; begin < args.num_sequences; begin += static_cast<int>(fit)) {
      const int count = std::min<int>(fit, args.num_sequences - begin);
      const PlanShape shape = ShapeOf(args, RoundUpToPowerOfTwo(count), args.max_query_rows);
      ASSIGN_OR_RETURN(const Plan* plan, FindPlan(shape));
      if (plan == nullptr) return RunFallback(args, begin, stream);
      const int32_t* starts = args.query_starts + begin;
      const int32_t* lens = args.seq_lens + begin;
      const int32_t* tables = args.block_tables + static_cast<int64_t>(begin) * args.max_blocks;
      const PrefillMetadataArgs metadata = {.query_starts = starts,
                                            .seq_lens = lens,
                                            .block_tables = tables,
                                            .num_sequences = count,
                                            .max_blocks = args.max_blocks,
                                            .block_size = kv.block_size,
                                            .row_elements = static_cast<int>(row_elements),
                                            .table_width = shape.table_width,
                                            .pitch = pitch,
                                            .slots = shape.slots,
                                            .rows = rows_.data,
                                            .keys = keys_.data,
                                            .row_offsets = offsets_.data,
                                            .table = table_.data};
      RETURN_IF_CUDA_ERROR(device_, WritePrefillMetadata(metadata, stream));
      Pointers pointers = {args.q.data,  kv.keys,    kv.values,   args.out.data,
                           rows_.data, keys_.data, table_.data, offsets_.data};
      if (fp8) {
        const int64_t block_elements = int64_t{kv.num_kv_heads} * kv.block_size * kv.head_dim;
        BFloat16* keys_out = static_cast<BFloat16*>(options_.kv_scratch);
        BFloat16* values_out = keys_out + ScratchBlocks(kv) * block_elements;
        const GatherKvArgs gather = {.keys = kv.keys,
                                     .values = kv.values,
                                     .keys_out = keys_out,
                                     .values_out = values_out,
                                     .block_elements = block_elements,
                                     .seq_lens = lens,
                                     .block_tables = tables,
                                     .num_sequences = count,
                                     .max_blocks = args.max_blocks,
                                     .block_size = kv.block_size,
                                     .pitch = pitch};
        RETURN_IF_CUDA_ERROR(device_, GatherKv(gather, stream));
        pointers[kK] = keys_out;
        pointers[kV] = values_out;
      }
      RETURN_IF_ERROR(plan->Execute(handle_, pointers, workspace_.data));
    }
    return absl::OkStatus();
  }

  std::string fallback_reason() const override { return fallback_reason_; }

 private:
  int TableWidth(int block_size) const {
    return static_cast<int>((options_.max_model_len + block_size - 1) / block_size);
  }
  // Blocks of keys (and as many of values) that fit into the scratch.
  int64_t ScratchBlocks(const KvLayer& kv) const {
    return options_.kv_scratch == nullptr ? 0
                                          : options_.kv_scratch_bytes / 2 / kv.num_kv_heads / kv.block_size / kv.head_dim / 2;
  }

  PlanShape ShapeOf(const AttentionArgs& args, int slots, int64_t max_rows) const {
    const KvLayer& kv = args.kv;
    return {.slots = slots,
            .max_rows = RoundUpToPowerOfTwo(max_rows),
            .table_width = TableWidth(kv.block_size),
            .num_heads = args.num_heads,
            .num_kv_heads = kv.num_kv_heads,
            .head_dim = kv.head_dim,
            .block_size = kv.block_size,
            .num_blocks = kv.dtype == DType::kF8E4M3 ? ScratchBlocks(kv) : kv.num_blocks,
            .sliding_window = args.sliding_window,
            .scale = args.scale};
  }

  // Metadata for blocks of this size.
  absl::Status Prepare(const AttentionArgs& args) {
    const int64_t entries = int64_t{kMaxSlots} * TableWidth(args.kv.block_size);
    if (entries <= table_entries_) return absl::OkStatus();
    table_entries_ = 0;
    RETURN_IF_CUDA_ERROR(device_, table_.Resize(entries));
    RETURN_IF_CUDA_ERROR(device_, rows_.Resize(kMaxSlots));
    RETURN_IF_CUDA_ERROR(device_, keys_.Resize(kMaxSlots));
    RETURN_IF_CUDA_ERROR(device_, offsets_.Resize(kMaxSlots + 1));
    table_entries_ = entries;
    return absl::OkStatus();
  }

  // Null: cuDNN refuses the shape.
  absl::StatusOr<const Plan*> FindPlan(const PlanShape& shape) {
    if (const auto found = plans_.find(shape); found != plans_.end()) return found->second.get();
    absl::StatusOr<Plan> plan = Plan::Build(handle_, shape);
    if (absl::IsUnimplemented(plan.status())) {
      fallback_reason_ = std::string(plan.status().message());
      plans_[shape] = nullptr;
      return nullptr;
    }
    RETURN_IF_ERROR(plan.status());
    if (plan->workspace_bytes() > workspace_bytes_) {
      workspace_bytes_ = 0;
      RETURN_IF_CUDA_ERROR(device_, workspace_.Resize(plan->workspace_bytes()));
      workspace_bytes_ = plan->workspace_bytes();
    }
    return (plans_[shape] = std::make_unique<Plan>(*std::move(plan))).get();
  }

  absl::Status RunFallback(const AttentionArgs& args, int first_sequence, cudaStream_t stream) const {
    const KvLayer& kv = args.kv;
    const PrefillFallbackArgs fallback = {
        .q = static_cast<const BFloat16*>(args.q.data),
        .out = static_cast<BFloat16*>(args.out.data),
        .keys = kv.keys,
        .values = kv.values,
        .fp8 = kv.dtype == DType::kF8E4M3,
        .query_starts = args.query_starts + first_sequence,
        .seq_lens = args.seq_lens + first_sequence,
        .block_tables = args.block_tables + static_cast<int64_t>(first_sequence) * args.max_blocks,
        .num_sequences = args.num_sequences - first_sequence,
        .max_query_rows = args.max_query_rows,
        .max_blocks = args.max_blocks,
        .num_heads = args.num_heads,
        .num_kv_heads = kv.num_kv_heads,
        .head_dim = kv.head_dim,
        .block_size = kv.block_size,
        .sliding_window = args.sliding_window,
        .scale = args.scale};
    const cudaError_t error = RunPrefillFallback(fallback, stream);
    if (error == cudaErrorInvalidValue) {
      return InvalidArgument("attention: head_dim {} must be a multiple of 8 up to 256", kv.head_dim);
    }
    return CudaStatus(error, device_, "RunPrefillFallback");
  }

  const PrefillOptions options_;
  const int device_;
  cudnnHandle_t handle_ = nullptr;  // null: deterministic
  cudaStream_t stream_ = nullptr;   // of handle_
  std::map<PlanShape, std::unique_ptr<Plan>> plans_;  // null: refused
  std::string fallback_reason_;
  DeviceArray<char> workspace_;
  int64_t workspace_bytes_ = 0;
  // Of the call in progress on the stream.
  int64_t table_entries_ = 0;
  DeviceArray<int32_t> table_, rows_, keys_;
  DeviceArray<int64_t> offsets_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillAttention>> PrefillAttention::Create(const PrefillOptions& options) {
  int device = 0;
  RETURN_IF_CUDA_ERROR(device, cudaGetDevice(&device));
  auto attention = std::make_unique<CudnnPrefill>(options, device);
  RETURN_IF_ERROR(attention->Open());
  return attention;
}

}  // namespace soloist::cuda
