// TokenDispatcher: carries each token's hidden row to the ranks of its experts and the experts' rows back.
//
// With one expert per rank the receive buffer, rank-major, is the expert's input: no permutation. No token is ever
// dropped unseen. Layouts, chosen alike on all ranks from the step's numbers (never by one rank alone):
//  masked      fixed room per (source, expert); one all-to-all, counts travel in front of the rows; no host wait. The
//              room may be less than the worst case: then rows that find none are left out, the counts say so, and the
//              caller must run the whole step again with more.
//  contiguous  counts all-gather first, then exact rows; one host wait; for prefill. A rank alone always
//              packs so, without the wait.
// Row independence: rows travel as bytes and Combine adds a token's experts in the router's order on its home, so the
// result does not depend on layout, R, placement or arrival.
#ifndef SOLOIST_ENGINE_COMM_DISPATCHER_H_
#define SOLOIST_ENGINE_COMM_DISPATCHER_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/comm/comm_queue.h"
#include "engine/comm/communicator.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace soloist {

enum class DispatchLayout { kMasked, kContiguous };

struct DispatcherOptions {
  int hidden_size = 0;
  int num_experts = 0;
  int top_k = 0;
  int64_t max_tokens_per_rank = 0;  // most tokens that a home has in one step
  DType dtype = DType::kF32;        // of the rows
  // expert_rank[e]: the rank that owns expert e. Expert e is local expert (number of e' < e with the same rank) there.
  // One map for all layers here; a map per layer becomes a Dispatch argument when placements differ.
  std::vector<int> expert_rank;
  // kMasked while the step's max_tokens (the same number on all ranks) <= this; else, and for one rank, kContiguous.
  int64_t masked_max_tokens = 64;

  // Loopback, to measure one rank of a large group alone: > 0: this is rank 0 of so many ranks and plays them all. The
  // communicator is one rank's. What it would send to rank s comes back as if from rank s by one copy of the same
  // bytes, and its own local expert l serves the rows for rank s's local expert l; so results are those of a model
  // whose ranks share rank 0's experts. Every rank must own as many experts as rank 0.
  int loopback_ranks = 0;
  // Loopback only: [max_tokens_per_rank, top_k] experts that row i goes to in place of Dispatch's `experts`, to set the
  // load; empty: those. Padding rows are routed too.
  std::vector<int32_t> loopback_experts;
};

// What all ranks know alike of a step.
struct DispatchCapacity {
  // At least the largest num_tokens of any rank, at most max_tokens_per_rank.
  int64_t max_tokens = 0;
  // Masked layout: rows that each (source, expert) has room for, 1 to max_tokens; 0: max_tokens, the worst case.
  int64_t masked_rows = 0;
};

// The rows of a micro-batch, and where they go.
struct DispatchInput {
  Tensor x;        // act [num_tokens, hidden]
  Tensor experts;  // I32 [num_tokens, top_k]; a negative expert has no row (padding)
  Tensor weights;  // F32 [num_tokens, top_k]
  // Of the whole step; the same on every rank and for both micro-batches, each of which has the masked room.
  DispatchCapacity capacity;
  // Device memory, [num_experts], written: choices of each expert by these tokens, those that found no room too; must
  // stay until the combine.
  int32_t* counts = nullptr;
};

// What a combine needs, and the experts' input. Valid until the micro-batch's next dispatch.
struct DispatchHandle {
  int micro_batch = 0;
  DispatchLayout layout = DispatchLayout::kMasked;
  Tensor expert_input;                 // act [rows, hidden]: received rows, source-rank-major
  std::span<const ExpertRows> groups;  // which rows belong to which local expert; for Ops::ExpertMlp
  Tensor expert_output;                // act, same shape: the caller writes the experts' rows here
  Tensor slots;                        // I32 [num_tokens, top_k]; -1: the choice has no row
  Tensor weights;                      // F32 [num_tokens, top_k], as given
  int64_t max_tokens = 0;              // the step's
  int64_t masked_rows = 0;             // room of each (source, expert), masked layout
  // Rows of all groups together: exact where the host knows them, else what a uniform choice of experts would give at
  // full capacity. For ExpertMlpArgs::expected_rows.
  int64_t expected_rows = 0;
  const int32_t* row_offsets = nullptr;  // see ExpertMlpArgs::row_offsets
};

// Where the weighted sums go: see CombineRowsArgs. Either or both of delta and residual.
struct CombineTarget {
  Tensor delta;        // act [num_tokens, hidden] = sums, or none
  Tensor residual;     // F32 [num_tokens, hidden] += sums, or none; then also:
  Tensor norm_weight;  // F32 [1, hidden]
  float eps = 0;
  Tensor normed;  // act [num_tokens, hidden] = RMSNorm(residual)
};

// Owned by one Worker, used by its thread. All buffers are allocated at creation.
//
// A step has one micro-batch, 0, or two: then, in each layer, 1 is dispatched after 0, and neither before its combine
// of the layer before is finished. Every rank must make the same calls in the same order, with zero tokens too. What is
// started runs as queue() says. After an error the step is over: CommQueue::Abandon.
class TokenDispatcher {
 public:
  virtual ~TokenDispatcher() = default;

  // Where the collectives run; its BeginStep says how.
  virtual CommQueue& queue() = 0;
  virtual absl::Status StartDispatch(int micro_batch, const DispatchInput& in, Stream& stream) = 0;
  virtual absl::StatusOr<DispatchHandle> FinishDispatch(int micro_batch, Stream& stream) = 0;
  // Sends handle.expert_output back...
  virtual absl::Status StartCombine(const DispatchHandle& handle, Stream& stream) = 0;
  // ...and adds each token's experts in the router's order.
  virtual absl::Status FinishCombine(const DispatchHandle& handle, const CombineTarget& target, Stream& stream) = 0;

  // Both halves, in line, of the only micro-batch of a step; see DispatchInput.
  absl::StatusOr<DispatchHandle> Dispatch(const Tensor& x, const Tensor& experts, const Tensor& weights,
                                          const DispatchCapacity& capacity, int32_t* counts, Stream& stream);
  absl::Status Combine(const DispatchHandle& handle, const CombineTarget& target, Stream& stream);

  // Whether a dispatch in steps with so many tokens waits on the host for the stream (then it cannot be captured).
  virtual bool WaitsOnHost(int64_t max_tokens) const = 0;
  // Whether `counts`, all that a micro-batch's dispatches wrote in a step one after another, say that a choice of this
  // rank's tokens has found no room: then the most choices of an expert; else 0.
  virtual int64_t OverflowRows(std::span<const int32_t> counts, const DispatchCapacity& capacity) const = 0;
  // Most rows that expert_input can have: size of the caller's scratch.
  virtual int64_t max_expert_rows() const = 0;
};

// INVALID_ARGUMENT if the map is not total over the communicator's (or loopback's) ranks. `device` and `comm` must
// outlive it.
absl::StatusOr<std::unique_ptr<TokenDispatcher>> CreateTokenDispatcher(const DispatcherOptions& options, Device& device,
                                                                       Communicator& comm);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_DISPATCHER_H_
