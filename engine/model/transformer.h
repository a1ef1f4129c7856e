// Transformer: one rank's pass through a decoder-only MoE model, as stream-ordered ops. Knows layers, not families: a
// family is a ModelConfig and the names of its tensors.
//
// Before the first layer: embed, norm. Per layer: QKV, rope + KV append, paged attention, output, norm + route,
// dispatch, expert MLP, combine + the next layer's (or the final) norm.
//
// Of two micro-batches, one computes while the other's rows travel: see kCollectiveOrder and Transformer::RunLayers.
#ifndef SOLOIST_ENGINE_MODEL_TRANSFORMER_H_
#define SOLOIST_ENGINE_MODEL_TRANSFORMER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/comm/dispatcher.h"
#include "engine/model/config.h"
#include "engine/model/device_weights.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace soloist {

struct TransformerLimits {
  int64_t max_tokens = 0;      // rows of one step on this rank
  int64_t max_logit_rows = 0;  // rows whose logits are computed
};

// The order in which a step of one and of two micro-batches starts its collectives, layer after layer: the same on
// every rank. A new order needs a new text, so that ranks that differ in it find out before they serve.
inline constexpr std::string_view kCollectiveOrder = "dispatch, combine; dispatch A, dispatch B, combine A, combine B";

// Rows of a step that go through each layer together, and the sequences that they belong to.
struct MicroBatch {
  int64_t num_tokens = 0;
  int num_sequences = 0;
  int num_decodes = 0;      // the first so many sequences have one row each
  int max_query_rows = 0;   // most rows of one sequence
  int64_t max_seq_len = 0;  // bound of seq_lens
  // Device memory. Starts count from the micro-batch's first row; lengths are those after its rows.
  const int32_t* query_starts = nullptr;
  const int32_t* seq_lens = nullptr;
  const int32_t* block_tables = nullptr;
};

// One step's plan, in device memory. The counts may be those of a bucket that the plan was padded to: then padding rows
// have slot -1, padding sequences seq_len 0, and *num_rows rows are real.
struct StepInputs {
  // The same on all ranks; max_tokens is the bucket of the most tokens of any, >= all rows here.
  DispatchCapacity capacity;
  // One after the other, the step's rows; the same number on all ranks.
  MicroBatch micro_batches[kMaxMicroBatches];
  int num_micro_batches = 1;
  int max_blocks = 0;
  int num_logit_rows = 0;
  const int32_t* num_rows = nullptr;  // [1] rows that are not padding; null: all, as with two micro-batches
  const int32_t* token_ids = nullptr;
  const int32_t* previous_tokens = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* slot_mapping = nullptr;
  const int32_t* logit_rows = nullptr;

  int64_t num_tokens() const {
    int64_t tokens = 0;
    for (int i = 0; i < num_micro_batches; ++i) tokens += micro_batches[i].num_tokens;
    return tokens;
  }
};

// Called after the last op of a group has been enqueued: what was enqueued since the call before (or since Forward
// began) is of that group, and of a micro-batch where the step has two, else of -1. Groups: embed, attention_linear,
// attention, router, dispatch, expert, combine, head.
using OpGroupHook = std::function<void(const char* group, int micro_batch)>;

// Used by its rank's thread. Allocates everything at creation; `config`, weights, device and dispatcher must outlive
// it.
class Transformer {
 public:
  static absl::StatusOr<std::unique_ptr<Transformer>> Create(const ModelConfig& config, const TransformerLimits& limits,
                                                             const SharedWeights& shared, const ExpertWeights& experts,
                                                             Device& device, TokenDispatcher& dispatcher);

  // Enqueues the step. kv: one KvLayer per layer. Every rank of the group must call it for every step, with zero tokens
  // too. Errors are the communicator's. `times`: see CommQueue::BeginStep; needed for two micro-batches.
  absl::Status Forward(const StepInputs& in, const std::vector<KvLayer>& kv, CommTimes* times, Stream& stream);

  // Results of the last Forward, in device memory, valid until the next.
  Tensor logits(int64_t rows) const { return logits_.View<float>(rows, config_.vocab_size); }  // F32 [rows, vocab]
  // Chosen experts, I32 [num_layers * max_tokens, top_k]: layer l's rows start at l * max_tokens; and their weights,
  // F32.
  Tensor routed_experts() const { return Routed<int32_t>(experts_); }
  Tensor routed_weights() const { return Routed<float>(weights_); }
  // Choices of each expert that a micro-batch's tokens made, I32 [num_layers, num_experts]; one after the other.
  Tensor expert_counts(int micro_batch = 0) const {
    const int64_t layers = config_.num_layers;
    return expert_counts_.View<int32_t>(kMaxMicroBatches * layers, config_.num_experts)
        .Rows(micro_batch * layers, layers);
  }
  const TransformerLimits& limits() const { return limits_; }

  // For benchmarks; empty: none.
  void set_group_hook(OpGroupHook hook) { group_hook_ = std::move(hook); }

 private:
  Transformer(const ModelConfig& config, const TransformerLimits& limits, const SharedWeights& shared,
              const ExpertWeights& experts, Device& device, TokenDispatcher& dispatcher);
  absl::Status Allocate();
  template <typename T>
  Tensor Routed(const Buffer& buffer) const {
    return buffer.View<T>(config_.num_layers * limits_.max_tokens, config_.experts_per_token);
  }
  Tensor Act(const Buffer& buffer, int64_t rows, int64_t cols) const {
    CHECK_LE(rows * cols * DTypeBytes(act_), buffer.bytes());
    return {buffer.data(), act_, rows, cols, cols};
  }
  // A micro-batch in work.
  struct Part {
    MicroBatch batch;
    int index = 0;
    int64_t first_row = 0;
    bool alone = true;  // the step's only one
    DispatchHandle handle;
  };
  void GroupEnds(const char* group, int micro_batch = -1) const {
    if (group_hook_) group_hook_(group, micro_batch);
  }
  void GroupEnds(const char* group, const Part& part) const { GroupEnds(group, part.alone ? -1 : part.index); }
  Tensor Residual(const Part& part) const {
    return residual_.View<float>(part.first_row + part.batch.num_tokens, config_.hidden_size)
        .Rows(part.first_row, part.batch.num_tokens);
  }
  // The part's rows of a buffer of `cols` activations a row.
  Tensor Act(const Buffer& buffer, const Part& part, int64_t cols) const {
    return Act(buffer, part.first_row + part.batch.num_tokens, cols).Rows(part.first_row, part.batch.num_tokens);
  }
  absl::Status RunLayers(const StepInputs& in, const std::vector<KvLayer>& kv, Stream& stream);
  // A layer's five stages. While a stage of one part runs, what the other has started travels.
  void Attention(int layer, const StepInputs& in, const KvLayer& kv, const Part& part, Stream& stream);
  absl::Status StartDispatch(int layer, const StepInputs& in, const Part& part, Stream& stream);
  absl::Status FinishDispatch(Part& part, Stream& stream);
  void Experts(int layer, const Part& part, Stream& stream);
  absl::Status FinishCombine(int layer, const Part& part, Stream& stream);

  const ModelConfig config_;
  const TransformerLimits limits_;
  const SharedWeights& shared_;
  const ExpertWeights& expert_weights_;
  Device& device_;
  TokenDispatcher& dispatcher_;
  const DType act_;
  OpGroupHook group_hook_;

  Buffer residual_;  // F32 [max_tokens, hidden]
  // act [max_tokens, ...]
  Buffer normed_;          // hidden
  Buffer delta_;           // hidden: attention's output, which the router's norm adds to the residual
  Buffer qkv_;             // (hq + 2 hkv) * head_dim
  Buffer q_;               // hq * head_dim
  Buffer attention_;       // hq * head_dim
  Buffer expert_scratch_;  // [max expert rows, width of w_in]
  Buffer experts_;         // I32, see routed_experts
  Buffer weights_;         // F32
  Buffer expert_counts_;   // I32 [2, num_layers, num_experts]
  Buffer last_hidden_;     // [max_logit_rows, hidden]
  Buffer logits_;          // F32 [max_logit_rows, vocab]
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_MODEL_TRANSFORMER_H_
