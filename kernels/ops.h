// Ops: everything that a model step computes, as few stream-ordered calls on Tensors. Each backend implements all of
// it.
//
// Contract of every op
//  - Stateless, allocates nothing, enqueues on `stream`. Zero rows are allowed and do nothing.
//  - Row independence: each output row is a function of its own input row(s) and the weights only, bit for bit,
//  whatever
//    the number of rows, their order, the number of threads or the chunking. (The CPU backend keeps one summation order
//    per output element: lanes over K in steps of the vector width, then one fixed reduction, in GEMV and GEMM alike;
//    attention walks the keys in tiles of absolute positions.) Tokens therefore do not depend on the batch, on R or on
//    placement.
//    A CUDA backend keeps this only in its deterministic mode (DeviceOptions).
//  - Activations are of Device::activation_dtype(): F32 on the CPU, BF16 on CUDA ("act" below). The residual stream is
//    F32; matrices are BF16 [out, in]; norm weights F32; sums F32.
//  - Padding: where an op takes `num_rows`, rows at and beyond *num_rows (device memory; null: none) are padding of a
//    batch bucket. They must not disturb others; what they compute is of no interest.
//  - Preconditions (shapes, dtypes, index ranges) are CHECKed where the host can see them: the StepPlan was validated
//    before.
#ifndef SOLOIST_KERNELS_OPS_H_
#define SOLOIST_KERNELS_OPS_H_

#include <cstdint>

#include "kernels/device.h"
#include "kernels/sampling.h"
#include "kernels/tensor.h"

namespace soloist {

enum class Activation : uint8_t {
  kSiluGated,  // silu(g) * u of a [2 * hidden] row: g first, then u
  kGelu,       // 0.5 x (1 + erf(x / sqrt 2))
};

// One layer's paged keys and values on one home.
// Element (block, kv head, slot, d) of keys is at ((block * num_kv_heads + head) * block_size + slot) * head_dim + d.
struct KvLayer {
  void* keys = nullptr;       // [num_blocks, num_kv_heads, block_size, head_dim]
  void* values = nullptr;     // the same
  DType dtype = DType::kF32;  // F32, BF16 or F8E4M3, as the backend can
  int64_t num_blocks = 0;
  int num_kv_heads = 0;
  int block_size = 0;
  int head_dim = 0;
};

struct AttentionArgs {
  Tensor q;                     // act [num_tokens, num_heads * head_dim]
  KvLayer kv;                   // the chunk's own keys are already in it
  const int32_t* query_starts;  // [num_sequences + 1] rows of q that belong to each sequence
  const int32_t* seq_lens;      // [num_sequences] keys in the cache, the chunk's own rows included; 0: padding
  const int32_t* block_tables;  // [num_sequences, max_blocks] block ids
  int num_sequences = 0;
  // What the host knows of the above. The first num_decodes sequences have one row each.
  int num_decodes = 0;
  int max_query_rows = 0;   // most rows of one sequence
  int64_t max_seq_len = 0;  // bound of seq_lens
  int max_blocks = 0;
  int num_heads = 0;
  int sliding_window = 0;  // a query at position p sees keys in (p - window, p]; 0: all of [0, p]
  float scale = 0;         // usually 1/sqrt(head_dim)
  Tensor out;              // act [num_tokens, num_heads * head_dim]
};

// Rows of expert input that belong together: rows [row_begin, row_begin + *row_count) of x go through local expert
// `expert`. row_count lies in device memory (it arrived with the rows); row_capacity bounds it.
struct ExpertRows {
  int32_t expert = 0;
  int64_t row_begin = 0;
  int64_t row_capacity = 0;
  const int32_t* row_count = nullptr;
  // Device memory; if not null, the first row instead of row_begin.
  const int32_t* row_begin_on_device = nullptr;
};

struct ExpertMlpArgs {
  Tensor x;  // act [rows, hidden]
  const ExpertRows* groups = nullptr;
  int num_groups = 0;  // groups of one expert are consecutive
  const Tensor* w_in =
      nullptr;  // per local expert: BF16 [2 * expert_hidden or expert_hidden, hidden] (gate rows, then up rows)
  const Tensor* w_out = nullptr;  // per local expert: BF16 [hidden, expert_hidden]
  int num_experts = 0;            // local experts
  Activation activation = Activation::kSiluGated;
  // Device memory, [num_experts + 1]: rows [row_offsets[e], row_offsets[e + 1]) of x are local expert e's, all of them
  // and without gaps, as the groups say too. Null: only the groups know.
  const int32_t* row_offsets = nullptr;
  int64_t expected_rows =
      0;           // rows of all groups together as far as the host knows: chooses the kernel, not the result
  Tensor scratch;  // act [>= rows of x, width of w_in]: inner activations, at the rows of x
  Tensor out;      // act [rows, hidden]; rows that belong to no group keep what they had
};

// residual += delta; normed = RMSNorm(residual); the router's choice for it.
struct RouteArgs {
  Tensor residual;     // F32 [n, hidden], in place
  Tensor delta;        // act [n, hidden]; none: nothing is added
  Tensor norm_weight;  // F32 [1, hidden]
  float eps = 0;
  Tensor normed;                      // act [n, hidden], written
  Tensor gate;                        // BF16 [num_experts, hidden]
  const int32_t* num_rows = nullptr;  // padding rows get expert -1 and weight 0
  Tensor experts;                     // I32 [n, top_k], written
  Tensor weights;                     // F32 [n, top_k], written
};

// Puts each token's row where its experts' input is, or is sent from. Slots are given in token order, then choice
// order, so that they depend on the batch's order only: slot = base[e] + (number of earlier choices of expert e in this
// call). With zero rows the counts, begins and headers are written all the same.
struct DispatchRowsArgs {
  Tensor x;                        // act [n, hidden]
  Tensor experts;                  // I32 [n, top_k] expert ids; negative: the choice has no row, its slot is -1
  const int64_t* base = nullptr;   // [num_experts] first row of each expert in dst; null: rows are packed expert after
                                   // expert in `order` (contiguous layout)
  const int32_t* order = nullptr;  // [num_experts] expert ids in dst's order, used when base is null
  int num_experts = 0;
  Tensor slots;               // I32 [n, top_k] row of dst, written
  int32_t* counts = nullptr;  // [num_experts] rows per expert (indexed by expert id), written
  // [num_experts + 1] first row per expert; where rows are packed, also the number of all rows. Written unless null.
  int32_t* begins = nullptr;
  Tensor dst;  // act [rows, hidden]: dst[slots[i, j], :] = x[i, :]
  // With a base: rows of each expert that dst has room for. A choice beyond has no row, its slot is -1; counts count it
  // all the same. 0: there is room for all.
  int64_t room = 0;
  // Copies of counts, each at most `room`, in front of the rows for each destination: copy r at dst.data + r *
  // header_stride_bytes.
  int num_headers = 0;
  int64_t header_stride_bytes = 0;
};

// sum[i, :] = sum over j, in order j = 0..top_k-1, of weights[i, j] * y[slots[i, j], :] in F32; slots of -1 are left
// out. Then delta = sum if delta is given; residual += sum and normed = RMSNorm(residual) if residual is given.
struct CombineRowsArgs {
  Tensor y;            // act [rows, hidden]
  Tensor slots;        // I32 [n, top_k]
  Tensor weights;      // F32 [n, top_k]
  Tensor delta;        // act [n, hidden] or none
  Tensor residual;     // F32 [n, hidden], in place, or none
  Tensor norm_weight;  // F32 [1, hidden]
  float eps = 0;
  Tensor normed;  // act [n, hidden]
};

class Ops {
 public:
  virtual ~Ops() = default;

  // out[i, :] = table[id(i), :], where id(i) = token_ids[i], or previous_tokens[-1 - token_ids[i]] if that is negative.
  virtual void Embed(const int32_t* token_ids, const int32_t* previous_tokens,
                     const Tensor& table /* BF16 [vocab, hidden] */, const Tensor& out /* F32 [num_tokens, hidden] */,
                     Stream& stream) = 0;

  // residual += delta (if delta.data is not null); out = residual / sqrt(mean(residual^2) + eps) * weight.
  virtual void AddRmsNorm(const Tensor& residual /* F32 [n, hidden], in place */,
                          const Tensor& delta /* act [n, hidden] */, const Tensor& weight /* F32 [1, hidden] */,
                          float eps, const Tensor& out /* act [n, hidden] */, Stream& stream) = 0;

  // out = x * w^T.  bytes: n*k*2 of weights; 2*m*n*k FLOP. out may be F32 whatever act is.
  virtual void Linear(const Tensor& x /* act [m, k] */, const Tensor& w /* BF16 [n, k] */,
                      const Tensor& out /* [m, n] */, Stream& stream) = 0;

  // Splits qkv = [q heads | k heads | v heads], rotates q and k by position (halves layout of Hugging Face: pairs (d, d
  // + head_dim/2); angle = position * theta^(-2d/head_dim)), writes q to q_out and k, v to cache slot slot_mapping[i] =
  // block * block_size + slot; a negative slot (padding): nowhere. cos_sin: F32 [max_positions, head_dim] = cos of the
  // head_dim/2 angles, then sin.
  virtual void RopeAppendKv(const Tensor& qkv /* act [n, (hq + 2 hkv) * head_dim] */, const int32_t* positions,
                            const int32_t* slot_mapping, const Tensor& cos_sin, const KvLayer& kv,
                            const Tensor& q_out /* act [n, hq * head_dim] */, Stream& stream) = 0;

  // Causal attention of ragged chunks over the paged cache. Row i of sequence s is at position seq_lens[s] - chunk + i.
  // Slots behind a sequence's last key, in the same block, may be overwritten: nothing that is still needed may lie
  // there.
  virtual void PagedAttention(const AttentionArgs& args, Stream& stream) = 0;

  // logits = normed * gate^T; top_k experts by logit (descending; the lower id first on a tie); weights = softmax over
  // the chosen logits (= Mixtral's softmax over all, renormalised over the chosen).
  virtual void Route(const RouteArgs& args, Stream& stream) = 0;

  virtual void DispatchRows(const DispatchRowsArgs& args, Stream& stream) = 0;

  // Each group's rows through its expert. A group's count may be zero.
  virtual void ExpertMlp(const ExpertMlpArgs& args, Stream& stream) = 0;

  virtual void CombineRows(const CombineRowsArgs& args, Stream& stream) = 0;

  // out[i, :] = x[rows[i], :].
  virtual void GatherRows(const Tensor& x /* act [n, hidden] */, const int32_t* rows /* [m] */,
                          const Tensor& out /* act [m, hidden] */, Stream& stream) = 0;

  // Copies within device memory; for what lies between ops (elsewhere Device::Copy).
  virtual void CopyBytes(void* dst, const void* src, int64_t bytes, Stream& stream) = 0;

  // Dummy weights: out[i, j] = UniformAt(key, (first_row + i) * cols + j, scale); see kernels/uniform.h.
  virtual void FillUniform(uint64_t key, float scale, int64_t first_row, const Tensor& out /* F32 or BF16 [n, cols] */,
                           Stream& stream) = 0;

  // One token for each row of logits; see kernels/sampling.h. Changes logits.
  virtual void Sample(const SampleArgs& args, Stream& stream) = 0;
};

}  // namespace soloist

#endif  // SOLOIST_KERNELS_OPS_H_
