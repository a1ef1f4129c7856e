// The graph and its execution by cudnn-frontend, which is included by this file only: it takes a minute to compile.
#include "kernels/cuda/prefill_attention.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <compare>
#include <exception>
#include <iterator>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "cudnn_frontend.h"
#include "kernels/cuda/cuda_error.h"
#include "kernels/cuda/prefill_fallback.h"
#include "kernels/cuda/prefill_metadata.h"

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
  int slots = 0;        // batch: pieces of sequences
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

// cudnn-frontend returns most errors and throws some. Those that it returns get `code`.
template <typename Function>
absl::Status NoThrow(std::string_view what, absl::StatusCode code, Function&& function) {
  try {
    fe::error_t error = function();
    if (error.is_good()) return absl::OkStatus();
    return {code, fmt::format("cuDNN {}: {}", what, error.get_message())};
  } catch (const std::exception& e) {
    return Internal("cuDNN {}: {}", what, e.what());
  }
}

// One of cuDNN's own functions.
template <typename Function>
absl::Status Call(std::string_view what, Function&& function) {
  return NoThrow(what, absl::StatusCode::kInternal, [&]() -> fe::error_t {
    const cudnnStatus_t status = function();
    if (status == CUDNN_STATUS_SUCCESS) return {};
    return {fe::error_code_t::HANDLE_ERROR, fe::detail::get_error_string(status)};
  });
}

template <typename T>
struct DeviceArray {
  DeviceArray() = default;
  DeviceArray(DeviceArray&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
  DeviceArray& operator=(DeviceArray&&) = delete;
  ~DeviceArray() { cudaFree(data); }
  // Loses what is there.
  cudaError_t Resize(int64_t n) {
    cudaFree(std::exchange(data, nullptr));
    return cudaMalloc(reinterpret_cast<void**>(&data), std::max<int64_t>(n, 1) * sizeof(T));
  }
  T* data = nullptr;
};

// A graph of one attention, built for one shape, with its workspace. q and out are ragged: sequence i has rows[i] rows
// from element offsets[i] on.
class Plan {
 public:
  // UNIMPLEMENTED if cuDNN has no kernel for it.
  static absl::StatusOr<Plan> Build(cudnnHandle_t handle, int device, const PlanShape& s) {
    Plan plan;
    RETURN_IF_ERROR(NoThrow("attention graph", absl::StatusCode::kUnimplemented, [&]() -> fe::error_t {
      fe::graph::Graph& graph = *plan.graph_;
      graph.set_io_data_type(fe::DataType_t::BFLOAT16)
          .set_intermediate_data_type(fe::DataType_t::FLOAT)
          .set_compute_data_type(fe::DataType_t::FLOAT);
      using Dims = std::vector<int64_t>;
      const auto tensor = [&](Uid uid, const char* name, fe::DataType_t type, const Dims& dim, const Dims& stride) {
        return graph.tensor(
            fe::graph::Tensor_attributes().set_uid(uid).set_name(name).set_data_type(type).set_dim(dim).set_stride(
                stride));
      };
      const int64_t b = s.slots, h = s.num_heads, d = s.head_dim, width = s.table_width;
      const int64_t head = static_cast<int64_t>(s.block_size) * d;
      const Dims kv_dim = {s.num_blocks, s.num_kv_heads, s.block_size, d};
      const Dims kv_stride = {s.num_kv_heads * head, head, d, 1};
      const int64_t max_rows = kPrefillPieceRows;
      const Dims q_dim = {b, h, max_rows, d}, q_stride = {max_rows * h * d, d, h * d, 1};
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
      if (fe::error_t error = graph.validate(); error.is_bad()) return error;
      if (fe::error_t error = graph.build_operation_graph(handle); error.is_bad()) return error;
      if (fe::error_t error = graph.create_execution_plans({fe::HeurMode_t::A}); error.is_bad()) return error;
      return graph.check_support(handle);
    }));
    int64_t workspace_bytes = 0;
    RETURN_IF_ERROR(NoThrow("attention plan", absl::StatusCode::kInternal, [&]() -> fe::error_t {
      if (fe::error_t error = plan.graph_->build_plans(handle); error.is_bad()) return error;
      return plan.graph_->get_workspace_size(workspace_bytes);
    }));
    RETURN_IF_CUDA_ERROR(device, plan.workspace_.Resize(workspace_bytes));
    return plan;
  }

  absl::Status Execute(cudnnHandle_t handle, Pointers& pointers) const {
    return NoThrow("attention", absl::StatusCode::kInternal,
                   [&] { return graph_->execute(handle, pointers.data(), kNumUids, workspace_.data); });
  }

 private:
  std::unique_ptr<fe::graph::Graph> graph_ = std::make_unique<fe::graph::Graph>();
  DeviceArray<char> workspace_;
};

// Batches of plans. Slots that are not used cost about 0.1 us each.
constexpr int kSlots[] = {16, kMaxPrefillSlots};
// 9.14 has no Hopper kernel for paged caches: 270 TFLOP/s instead of 570, and rows of padding cost as much as others.
constexpr size_t kMinVersion = 91900;

class CudnnPrefill final : public PrefillAttention {
 public:
  CudnnPrefill(const PrefillOptions& options, int device) : options_(options), device_(device) {}
  ~CudnnPrefill() override {
    plans_.clear();
    if (handle_ != nullptr) fe::detail::destroy_handle(handle_);
  }

  absl::Status Open() {
    if (!options_.use_cudnn) {
      fallback_reason_ = "use_cudnn is off";
      return absl::OkStatus();
    }
    if (fe::cudnn_dlhandle == nullptr) {
      void* library = dlopen(options_.cudnn_library.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library == nullptr)
        return NotFound("{}, for the attention of prompts: {}", options_.cudnn_library, dlerror());
      const auto version = reinterpret_cast<size_t (*)()>(dlsym(library, "cudnnGetVersion"));
      const size_t found = version == nullptr ? 0 : version();
      if (found < kMinVersion) {
        dlclose(library);
        return FailedPrecondition(
            "{}: version {}.{}.{}; 9.19 is the first known to have a Hopper kernel for paged caches",
            options_.cudnn_library, found / 10000, found / 100 % 100, found % 100);
      }
      fe::cudnn_dlhandle = library;
    }
    return Call("cudnnCreate", [&] { return fe::detail::create_handle(&handle_); });
  }

  absl::Status Warm(const AttentionArgs& like) override {
    if (handle_ == nullptr) return absl::OkStatus();
    RETURN_IF_ERROR(Prepare(like.kv));
    for (const int slots : kSlots) RETURN_IF_ERROR(FindPlan(ShapeOf(like, slots)).status());
    return absl::OkStatus();
  }

  absl::Status Run(const AttentionArgs& args, int first_sequence, cudaStream_t stream) override {
    const int sequences = args.num_sequences - first_sequence;
    if (sequences <= 0 || args.max_query_rows <= 0) return absl::OkStatus();
    const KvLayer& kv = args.kv;
    const bool fp8 = kv.dtype == DType::kF8E4M3;
    const int64_t row_elements = int64_t{args.num_heads} * kv.head_dim;
    if (args.q.dtype != DType::kBF16 || args.out.dtype != DType::kBF16 || args.q.stride != row_elements ||
        args.out.stride != row_elements || (kv.dtype != DType::kBF16 && !fp8)) {
      return InvalidArgument("attention: q and out must be packed BF16 rows, the cache BF16 or F8E4M3");
    }
    if (handle_ == nullptr) return RunFallback(args, first_sequence, stream);
    if (args.max_seq_len > options_.max_model_len) {
      return InvalidArgument("attention: sequences of up to {} tokens, limit {}", args.max_seq_len,
                             options_.max_model_len);
    }
    RETURN_IF_ERROR(Prepare(kv));
    if (stream != stream_) {
      RETURN_IF_ERROR(Call("cudnnSetStream", [&] { return fe::detail::set_stream(handle_, stream); }));
      stream_ = stream;
    }
    // Sequences of one call of cuDNN: their pieces must fit into the slots, their copy into the scratch. Pieces: one
    // for each sequence and one more for each kPrefillPieceRows rows, at most.
    const int64_t whole_pieces = args.q.rows / kPrefillPieceRows;
    const int64_t pieces_each = (args.max_query_rows + kPrefillPieceRows - 1) / kPrefillPieceRows;
    if (pieces_each > kMaxPrefillSlots) return InvalidArgument("attention: {} rows of a sequence", args.max_query_rows);
    int64_t fit = std::max(kMaxPrefillSlots - whole_pieces, kMaxPrefillSlots / pieces_each);
    const int pitch = fp8 ? static_cast<int>((args.max_seq_len + kv.block_size - 1) / kv.block_size) : 0;
    if (fp8) fit = std::min(fit, ScratchBlocks(kv) / std::max(pitch, 1));
    if (fit == 0) return RunFallback(args, first_sequence, stream);
    for (int begin = first_sequence; begin < args.num_sequences; begin += static_cast<int>(fit)) {
      const int count = static_cast<int>(std::min<int64_t>(fit, args.num_sequences - begin));
      const int64_t pieces = std::min(count + whole_pieces, count * pieces_each);
      const PlanShape shape = ShapeOf(args, *std::lower_bound(std::begin(kSlots), std::end(kSlots), pieces));
      ASSIGN_OR_RETURN(const Plan* plan, FindPlan(shape));
      if (plan == nullptr) return RunFallback(args, begin, stream);
      RETURN_IF_ERROR(RunPlan(*plan, shape, args, begin, count, pitch, stream));
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
    return options_.kv_scratch == nullptr
               ? 0
               : options_.kv_scratch_bytes / 2 / kv.num_kv_heads / kv.block_size / kv.head_dim / 2;
  }

  PlanShape ShapeOf(const AttentionArgs& args, int slots) const {
    const KvLayer& kv = args.kv;
    return {.slots = slots,
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
  absl::Status Prepare(const KvLayer& kv) {
    const int64_t entries = int64_t{kMaxPrefillSlots} * TableWidth(kv.block_size);
    if (entries <= table_entries_) return absl::OkStatus();
    table_entries_ = 0;
    RETURN_IF_CUDA_ERROR(device_, table_.Resize(entries));
    RETURN_IF_CUDA_ERROR(device_, rows_.Resize(kMaxPrefillSlots));
    RETURN_IF_CUDA_ERROR(device_, keys_.Resize(kMaxPrefillSlots));
    RETURN_IF_CUDA_ERROR(device_, offsets_.Resize(kMaxPrefillSlots + 1));
    table_entries_ = entries;
    return absl::OkStatus();
  }

  // The sequences [begin, begin + count).
  absl::Status RunPlan(const Plan& plan, const PlanShape& shape, const AttentionArgs& args, int begin, int count,
                       int pitch, cudaStream_t stream) {
    const KvLayer& kv = args.kv;
    const bool fp8 = kv.dtype == DType::kF8E4M3;
    const int32_t* lens = args.seq_lens + begin;
    const int32_t* tables = args.block_tables + static_cast<int64_t>(begin) * args.max_blocks;
    const PrefillMetadataArgs metadata = {.query_starts = args.query_starts + begin,
                                          .seq_lens = lens,
                                          .block_tables = tables,
                                          .num_sequences = count,
                                          .max_blocks = args.max_blocks,
                                          .block_size = kv.block_size,
                                          .row_elements = args.num_heads * kv.head_dim,
                                          .table_width = shape.table_width,
                                          .pitch = pitch,
                                          .slots = shape.slots,
                                          .rows = rows_.data,
                                          .keys = keys_.data,
                                          .row_offsets = offsets_.data,
                                          .table = table_.data,
                                          .values = fp8 ? nullptr : static_cast<BFloat16*>(kv.values),
                                          .num_kv_heads = kv.num_kv_heads,
                                          .head_dim = kv.head_dim};
    RETURN_IF_CUDA_ERROR(device_, WritePrefillMetadata(metadata, stream));
    Pointers pointers = {args.q.data, kv.keys,    kv.values,   args.out.data,
                         rows_.data,  keys_.data, table_.data, offsets_.data};
    if (fp8) {
      BFloat16* keys = static_cast<BFloat16*>(options_.kv_scratch);
      BFloat16* values = keys + ScratchBlocks(kv) * kv.num_kv_heads * kv.block_size * kv.head_dim;
      const GatherKvArgs gather = {.keys = kv.keys,
                                   .values = kv.values,
                                   .keys_out = keys,
                                   .values_out = values,
                                   .num_kv_heads = kv.num_kv_heads,
                                   .block_size = kv.block_size,
                                   .head_dim = kv.head_dim,
                                   .seq_lens = lens,
                                   .block_tables = tables,
                                   .num_sequences = count,
                                   .max_blocks = args.max_blocks,
                                   .pitch = pitch};
      RETURN_IF_CUDA_ERROR(device_, GatherKv(gather, stream));
      pointers[kK] = keys;
      pointers[kV] = values;
    }
    return plan.Execute(handle_, pointers);
  }

  // Null: cuDNN refuses the shape.
  absl::StatusOr<const Plan*> FindPlan(const PlanShape& shape) {
    if (const auto found = plans_.find(shape); found != plans_.end()) return found->second.get();
    absl::StatusOr<Plan> plan = Plan::Build(handle_, device_, shape);
    if (absl::IsUnimplemented(plan.status())) {
      fallback_reason_ = std::string(plan.status().message());
      plans_[shape] = nullptr;
      return nullptr;
    }
    RETURN_IF_ERROR(plan.status());
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
  cudnnHandle_t handle_ = nullptr;                    // null: no cuDNN
  cudaStream_t stream_ = nullptr;                     // of handle_
  std::map<PlanShape, std::unique_ptr<Plan>> plans_;  // null: refused
  std::string fallback_reason_;
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
