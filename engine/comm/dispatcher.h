// TokenDispatcher: carries each token's hidden row to the ranks of its experts and the experts' rows back.
//
// With one expert per rank the receive buffer, rank-major, is the expert's input: no permutation. No token is ever
// dropped. Layouts, chosen alike on all ranks from the step's numbers (never by one rank alone):
//  masked      fixed capacity per (source, expert); one all-to-all, counts travel in front of the rows; no host wait.
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
  // kMasked while the step's capacity (the same number on all ranks) <= this; else, and for one rank, kContiguous.
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

// What Combine needs, and the experts' input. Valid until the next Dispatch.
struct DispatchHandle {
  DispatchLayout layout = DispatchLayout::kMasked;
  Tensor expert_input;                 // act [rows, hidden]: received rows, source-rank-major
  std::span<const ExpertRows> groups;  // which rows belong to which local expert; for Ops::ExpertMlp
  Tensor expert_output;                // act, same shape: the caller writes the experts' rows here
  Tensor slots;                        // I32 [num_tokens, top_k]
  Tensor weights;                      // F32 [num_tokens, top_k], as given
  int64_t max_tokens = 0;              // the step's capacity
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
class TokenDispatcher {
 public:
  virtual ~TokenDispatcher() = default;

  // x act [num_tokens, hidden], experts I32 and weights F32 [num_tokens, top_k]; a negative expert has no row
  // (padding). max_tokens: the step's capacity, the same on every rank: at least the largest num_tokens of any rank, at
  // most max_tokens_per_rank. counts: I32 [num_experts] of device memory, written: choices of each expert by these
  // tokens; must stay until Combine. Every rank must call, with zero tokens too.
  virtual absl::StatusOr<DispatchHandle> Dispatch(const Tensor& x, const Tensor& experts, const Tensor& weights,
                                                  int64_t max_tokens, int32_t* counts, Stream& stream) = 0;
  // Sends handle.expert_output back and adds each token's experts in the router's order.
  virtual absl::Status Combine(const DispatchHandle& handle, const CombineTarget& target, Stream& stream) = 0;

  // Whether Dispatch at this capacity waits on the host for the stream (then it cannot be captured).
  virtual bool WaitsOnHost(int64_t max_tokens) const = 0;
  // Most rows that expert_input can have: size of the caller's scratch.
  virtual int64_t max_expert_rows() const = 0;
};

// INVALID_ARGUMENT if the map is not total over the communicator's (or loopback's) ranks. `device` and `comm` must
// outlive it.
absl::StatusOr<std::unique_ptr<TokenDispatcher>> CreateTokenDispatcher(const DispatcherOptions& options, Device& device,
                                                                       Communicator& comm);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_DISPATCHER_H_
