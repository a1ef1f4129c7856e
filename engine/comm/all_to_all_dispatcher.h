// The one TokenDispatcher there is. Private to engine/comm.
//
// Masked, room c = the step's masked_rows: what goes from one rank to another is one chunk of whole rows,
//   [header: the sender's counts of all experts | local expert 0 of the receiver: c rows | local expert 1: c rows |
//   ...]
// and all chunks have the room of the rank with most experts, so that one all-to-all carries counts and rows, and the
// receive buffer is one tensor of uniform stride. Bytes each way: R * (header + L * c) * row. The experts' outputs go
// back in the same geometry, so a row returns to the slot that it left from. The counts in the headers stop at c.
//
// Contiguous: rows packed by (destination, local expert); an all-gather of the counts, a host wait, exact bytes.
//
// A group of one sends nothing: its send buffer is the experts' input, and their output is what Combine reads. As all
// rows stay, the contiguous layout needs no host wait either: the experts find their rows by the counts on the device.
//
// Loopback is a group of one as well, whose buffer of rows for many ranks comes back whole, by one copy each way.
//
// Two micro-batches share the buffers: the second one's rows lie behind the first one's, wherever those end. Together
// they have no more tokens than one step may have, so there is room.
#ifndef SOLOIST_ENGINE_COMM_ALL_TO_ALL_DISPATCHER_H_
#define SOLOIST_ENGINE_COMM_ALL_TO_ALL_DISPATCHER_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/comm/comm_queue.h"
#include "engine/comm/dispatcher.h"

namespace soloist {

inline constexpr int64_t kCountBytes = sizeof(int32_t);

absl::Status CheckDispatcherOptions(const DispatcherOptions& options, int comm_size);

class AllToAllDispatcher final : public TokenDispatcher {
 public:
  AllToAllDispatcher(const DispatcherOptions& options, Device& device, Communicator& comm);
  absl::Status Allocate();

  CommQueue& queue() override { return queue_; }
  absl::Status StartDispatch(int micro_batch, const DispatchInput& in, Stream& stream) override;
  absl::StatusOr<DispatchHandle> FinishDispatch(int micro_batch, Stream& stream) override;
  absl::Status StartCombine(const DispatchHandle& handle, Stream& stream) override;
  absl::Status FinishCombine(const DispatchHandle& handle, const CombineTarget& target, Stream& stream) override;
  bool WaitsOnHost(int64_t max_tokens) const override {
    return comm_.size() > 1 && LayoutOf(max_tokens) == DispatchLayout::kContiguous;
  }
  int64_t OverflowRows(std::span<const int32_t> counts, const DispatchCapacity& capacity) const override {
    const int64_t most = std::ranges::max(counts);
    return LayoutOf(capacity.max_tokens) == DispatchLayout::kMasked && most > RoomOf(capacity) ? most : 0;
  }
  int64_t max_expert_rows() const override {
    return std::max(kMaxMicroBatches * MaskedRows(masked_capacity_), ContiguousRows());
  }

 private:
  // A micro-batch on its way. Its rows are at send_row of send_ and at row of input_ and output_.
  struct Part {
    DispatchHandle handle;
    int32_t* counts = nullptr;
    int64_t first_token = 0;
    int64_t send_row = 0, send_rows = 0;
    int64_t row = 0;
    // Contiguous, per rank; offsets from the part's first rows.
    std::vector<int64_t> send_bytes, send_offsets, recv_bytes, recv_offsets;
    std::vector<ExpertRows> groups;
  };

  DispatchLayout LayoutOf(int64_t max_tokens) const {
    // A rank alone waits for nobody's counts, and packed rows are what its experts want.
    if (ranks_ == 1) return DispatchLayout::kContiguous;
    return max_tokens <= options_.masked_max_tokens ? DispatchLayout::kMasked : DispatchLayout::kContiguous;
  }
  // Rows for each (source, expert) in the masked layout.
  static int64_t RoomOf(const DispatchCapacity& capacity) {
    return capacity.masked_rows > 0 ? capacity.masked_rows : capacity.max_tokens;
  }
  int64_t ChunkRows(int64_t room) const { return header_rows_ + max_local_experts_ * room; }
  int64_t MaskedRows(int64_t room) const { return ranks_ * ChunkRows(room); }
  // The experts of one token differ, so that no more of its rows than this rank's experts come here.
  int64_t ContiguousRows() const {
    if (comm_.size() == 1) return options_.max_tokens_per_rank * options_.top_k;
    return ranks_ * options_.max_tokens_per_rank * std::min<int64_t>(options_.top_k, std::ssize(experts_of_[rank_]));
  }
  Tensor Rows(const Buffer& buffer, int64_t first, int64_t rows) const {
    CHECK_LE((first + rows) * row_bytes_, buffer.bytes());
    return {static_cast<char*>(buffer.data()) + first * row_bytes_, options_.dtype, rows, options_.hidden_size,
            options_.hidden_size};
  }
  int64_t BeginWords() const { return (options_.num_experts + 1 + 3) / 4 * 4; }
  // Of a table with `words` for each micro-batch.
  static int32_t* Words(const Buffer& buffer, int micro_batch, int64_t words) {
    return static_cast<int32_t*>(buffer.data()) + micro_batch * words;
  }
  static void AddGroup(Part& part, int64_t local_expert, int64_t row_begin, int64_t row_capacity,
                       const int32_t* row_count, const int32_t* row_begin_on_device = nullptr) {
    part.groups.push_back(
        {static_cast<int32_t>(local_expert), row_begin, row_capacity, row_count, row_begin_on_device});
  }

  void PackMasked(const DispatchInput& in, Part& part, Stream& stream);
  void PackContiguous(const DispatchInput& in, Part& part, Stream& stream);
  // The collectives of a dispatch, and what follows from them for the handle.
  absl::Status ExchangeChunks(Part& part, Stream& stream);
  absl::Status ExchangeRows(Part& part, Stream& stream);
  absl::Status CopyBack(Part& part, Stream& stream);
  void KeepRows(Part& part, Stream& stream);
  // Those of a combine.
  absl::Status ReturnRows(Part& part, Stream& stream);

  const DispatcherOptions options_;
  Device& device_;
  Communicator& comm_;
  const int ranks_;  // of the group, or of loopback's
  const int rank_;
  const int64_t row_bytes_;
  const int64_t masked_capacity_;                 // largest
  std::vector<std::vector<int32_t>> experts_of_;  // [rank][local expert]: expert id
  int64_t max_local_experts_ = 0;                 // of any rank
  int64_t header_rows_ = 0;

  Buffer send_;      // rows that leave; in Combine the rows that have come back
  Buffer input_;     // rows that have come; unused by a group of one
  Buffer output_;    // the experts' rows
  Buffer slots_;     // I32 [max_tokens_per_rank, top_k]
  Buffer begins_;    // I32 [2, BeginWords()], contiguous layout in a group of one
  Buffer all_rows_;  // I32 [2, 2]: zero and the rows of the micro-batch, in loopback
  // I64 [masked_capacity + 1, num_experts]: DispatchRows' base for each room. A table, because a kernel that still
  // reads it must not see the next step's.
  Buffer bases_;
  Buffer order_;        // I32 [num_experts], by (rank, local expert)
  Buffer forced_;       // I32 [max_tokens_per_rank, top_k]: loopback_experts, if given
  Buffer all_counts_;   // I32 [2, ranks, num_experts]; unused by a group of one
  Buffer host_counts_;  // the same, on the host

  Part parts_[kMaxMicroBatches];
  CommQueue queue_;  // goes before what its jobs touch
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_ALL_TO_ALL_DISPATCHER_H_
