// Both layouts of the dispatcher.
//
// Masked, capacity c = the step's max_tokens: what goes from one rank to another is one chunk of whole rows,
//   [header: the sender's counts of all experts | local expert 0 of the receiver: c rows | local expert 1: c rows |
//   ...]
// and all chunks have the room of the rank with most experts, so that one all-to-all carries counts and rows, and the
// receive buffer is one tensor of uniform stride. Bytes each way: R * (header + L * c) * row. The experts' outputs go
// back in the same geometry, so a row returns to the slot that it left from.
//
// Contiguous: rows packed by (destination, local expert); an all-gather of the counts, a host wait, exact bytes.
//
// A group of one sends nothing: its send buffer is the experts' input, and their output is what Combine reads. As all
// rows stay, the contiguous layout needs no host wait either: the experts find their rows by the counts on the device.
//
// Loopback is a group of one as well, whose buffer of rows for many ranks comes back whole, by one copy each way.
#include "engine/comm/dispatcher.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace soloist {
namespace {

constexpr int64_t kCountBytes = sizeof(int32_t);

// What holds of loopback options only; the rest has been checked.
absl::Status ValidateLoopback(const DispatcherOptions& options, int comm_size) {
  if (options.loopback_ranks == 0) {
    return options.loopback_experts.empty() ? absl::OkStatus()
                                            : InvalidArgument("dispatcher: loopback_experts without loopback_ranks");
  }
  if (comm_size != 1) return InvalidArgument("dispatcher: loopback in a group of {} ranks, allowed: 1", comm_size);
  const auto owned = [&](int rank) { return std::ranges::count(options.expert_rank, rank); };
  for (int rank = 0; rank < options.loopback_ranks; ++rank) {
    if (owned(rank) != owned(0)) {
      return InvalidArgument("dispatcher: loopback rank {} owns {} experts and rank 0 {}: all must own as many", rank,
                             owned(rank), owned(0));
    }
  }
  const std::span<const int32_t> experts = options.loopback_experts;
  if (experts.empty()) return absl::OkStatus();
  const int64_t top_k = options.top_k, wanted = options.max_tokens_per_rank * top_k;
  if (std::ssize(experts) != wanted) {
    return InvalidArgument("dispatcher: loopback_experts has {} entries, expected {}", experts.size(), wanted);
  }
  for (int64_t i = 0; i < wanted; ++i) {
    if (experts[i] < 0 || experts[i] >= options.num_experts) {
      return InvalidArgument("dispatcher: loopback_experts holds {}, of {} experts", experts[i], options.num_experts);
    }
    if (std::ranges::count(experts.subspan(i / top_k * top_k, top_k), experts[i]) != 1) {
      return InvalidArgument("dispatcher: loopback_experts chooses expert {} twice in row {}", experts[i], i / top_k);
    }
  }
  return absl::OkStatus();
}

absl::Status Validate(const DispatcherOptions& options, int comm_size) {
  if (options.loopback_ranks < 0) return InvalidArgument("dispatcher: loopback_ranks is {}", options.loopback_ranks);
  const int ranks = options.loopback_ranks > 0 ? options.loopback_ranks : comm_size;
  if (options.hidden_size < 1 || options.num_experts < 1 || options.max_tokens_per_rank < 1 ||
      options.masked_max_tokens < 0) {
    return InvalidArgument("dispatcher: hidden_size {}, num_experts {}, max_tokens_per_rank {}, masked_max_tokens {}",
                           options.hidden_size, options.num_experts, options.max_tokens_per_rank,
                           options.masked_max_tokens);
  }
  if (options.top_k < 1 || options.top_k > options.num_experts) {
    return InvalidArgument("dispatcher: top_k is {}, of {} experts", options.top_k, options.num_experts);
  }
  if (options.hidden_size * DTypeBytes(options.dtype) % kCountBytes != 0) {
    return InvalidArgument("dispatcher: a row of {} elements of {} bytes is not a multiple of {} bytes",
                           options.hidden_size, DTypeBytes(options.dtype), kCountBytes);
  }
  if (static_cast<int>(options.expert_rank.size()) != options.num_experts) {
    return InvalidArgument("dispatcher: expert_rank has {} entries for {} experts", options.expert_rank.size(),
                           options.num_experts);
  }
  for (int e = 0; e < options.num_experts; ++e) {
    if (options.expert_rank[e] < 0 || options.expert_rank[e] >= ranks) {
      return InvalidArgument("dispatcher: expert {} is on rank {}, of {} ranks", e, options.expert_rank[e], ranks);
    }
  }
  return ValidateLoopback(options, comm_size);
}

class AllToAllDispatcher final : public TokenDispatcher {
 public:
  AllToAllDispatcher(const DispatcherOptions& options, Device& device, Communicator& comm);
  absl::Status Allocate();

  absl::StatusOr<DispatchHandle> Dispatch(const Tensor& x, const Tensor& experts, const Tensor& weights,
                                          int64_t max_tokens, int32_t* counts, Stream& stream) override;
  absl::Status Combine(const DispatchHandle& handle, const CombineTarget& target, Stream& stream) override;
  bool WaitsOnHost(int64_t max_tokens) const override {
    return comm_.size() > 1 && LayoutOf(max_tokens) == DispatchLayout::kContiguous;
  }
  int64_t max_expert_rows() const override { return std::max(MaskedRows(masked_capacity_), ContiguousRows()); }

 private:
  DispatchLayout LayoutOf(int64_t capacity) const {
    // A rank alone waits for nobody's counts, and packed rows are what its experts want.
    if (ranks_ == 1) return DispatchLayout::kContiguous;
    return capacity <= options_.masked_max_tokens ? DispatchLayout::kMasked : DispatchLayout::kContiguous;
  }
  int64_t ChunkRows(int64_t capacity) const { return header_rows_ + max_local_experts_ * capacity; }
  int64_t MaskedRows(int64_t capacity) const { return ranks_ * ChunkRows(capacity); }
  // The experts of one token differ, so that no more of its rows than this rank's experts come here.
  int64_t ContiguousRows() const {
    if (comm_.size() == 1) return options_.max_tokens_per_rank * options_.top_k;
    return ranks_ * options_.max_tokens_per_rank * std::min<int64_t>(options_.top_k, std::ssize(experts_of_[rank_]));
  }
  Tensor Rows(const Buffer& buffer, int64_t rows) const {
    CHECK_LE(rows * row_bytes_, buffer.bytes());
    return {buffer.data(), options_.dtype, rows, options_.hidden_size, options_.hidden_size};
  }
  void AddGroup(int64_t local_expert, int64_t row_begin, int64_t row_capacity, const int32_t* row_count,
                const int32_t* row_begin_on_device = nullptr) {
    groups_.push_back({static_cast<int32_t>(local_expert), row_begin, row_capacity, row_count, row_begin_on_device});
  }

  absl::Status DispatchMasked(const Tensor& x, const Tensor& experts, int32_t* counts, DispatchHandle& handle,
                              Stream& stream);
  absl::Status DispatchContiguous(const Tensor& x, const Tensor& experts, int32_t* counts, DispatchHandle& handle,
                                  Stream& stream);
  // Second half of the contiguous layout: rows stay on this rank; rows go to others.
  absl::Status KeepRows(const int32_t* counts, DispatchHandle& handle, Stream& stream);
  absl::Status ExchangeRows(const int32_t* counts, DispatchHandle& handle, Stream& stream);

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
  Buffer begins_;    // I32 [num_experts + 1], contiguous layout in a group of one
  Buffer all_rows_;  // I32 [2]: zero and the rows of the step, in loopback
  // I64 [masked_capacity + 1, num_experts]: DispatchRows' base for each capacity. A table, because a kernel that still
  // reads it must not see the next step's.
  Buffer bases_;
  Buffer order_;        // I32 [num_experts], by (rank, local expert)
  Buffer forced_;       // I32 [max_tokens_per_rank, top_k]: loopback_experts, if given
  Buffer all_counts_;   // I32 [ranks, num_experts]; unused by a group of one
  Buffer host_counts_;  // the same, on the host

  // Of the contiguous step in flight, per rank.
  std::vector<int64_t> send_bytes_, send_offsets_, recv_bytes_, recv_offsets_;
  std::vector<ExpertRows> groups_;
};

AllToAllDispatcher::AllToAllDispatcher(const DispatcherOptions& options, Device& device, Communicator& comm)
    : options_(options),
      device_(device),
      comm_(comm),
      ranks_(options.loopback_ranks > 0 ? options.loopback_ranks : comm.size()),
      rank_(comm.rank()),
      row_bytes_(options.hidden_size * DTypeBytes(options.dtype)),
      masked_capacity_(std::min(options.masked_max_tokens, options.max_tokens_per_rank)),
      experts_of_(static_cast<size_t>(ranks_)) {
  for (int32_t e = 0; e < options_.num_experts; ++e) experts_of_[options_.expert_rank[e]].push_back(e);
  for (const std::vector<int32_t>& local : experts_of_)
    max_local_experts_ = std::max(max_local_experts_, std::ssize(local));
  if (ranks_ > 1) header_rows_ = (options_.num_experts * kCountBytes + row_bytes_ - 1) / row_bytes_;
  for (std::vector<int64_t>* v : {&send_bytes_, &send_offsets_, &recv_bytes_, &recv_offsets_}) v->resize(ranks_);
  groups_.reserve(experts_of_[rank_].size() * static_cast<size_t>(ranks_));
}

absl::Status AllToAllDispatcher::Allocate() {
  const int64_t sent = options_.max_tokens_per_rank * options_.top_k;
  const int64_t send_rows = std::max(MaskedRows(masked_capacity_), sent);
  if (std::max(send_rows, max_expert_rows()) > std::numeric_limits<int32_t>::max()) {
    return InvalidArgument("dispatcher: {} rows do not fit an int32 slot", std::max(send_rows, max_expert_rows()));
  }
  const int64_t experts = options_.num_experts;
  const int64_t base_bytes = (masked_capacity_ + 1) * experts * static_cast<int64_t>(sizeof(int64_t));
  ASSIGN_OR_RETURN(send_, device_.Allocate(send_rows * row_bytes_));
  if (ranks_ > 1) {
    ASSIGN_OR_RETURN(input_, device_.Allocate(max_expert_rows() * row_bytes_));
  }
  ASSIGN_OR_RETURN(output_, device_.Allocate(max_expert_rows() * row_bytes_));
  ASSIGN_OR_RETURN(slots_, device_.Allocate(sent * kCountBytes));
  if (comm_.size() > 1) {
    ASSIGN_OR_RETURN(all_counts_, device_.Allocate(ranks_ * experts * kCountBytes));
    ASSIGN_OR_RETURN(host_counts_, device_.AllocatePinned(ranks_ * experts * kCountBytes));
  } else {
    ASSIGN_OR_RETURN(begins_, device_.Allocate((experts + 1) * kCountBytes));
    ASSIGN_OR_RETURN(all_rows_, device_.Allocate(2 * kCountBytes));
  }
  ASSIGN_OR_RETURN(bases_, device_.Allocate(base_bytes));
  ASSIGN_OR_RETURN(order_, device_.Allocate(experts * kCountBytes));

  std::vector<int64_t> bases(static_cast<size_t>((masked_capacity_ + 1) * experts));
  std::vector<int32_t> order;
  for (int64_t owner = 0; owner < ranks_; ++owner) {
    const std::vector<int32_t>& local = experts_of_[owner];
    order.insert(order.end(), local.begin(), local.end());
    for (int64_t l = 0; l < std::ssize(local); ++l) {
      for (int64_t c = 0; c <= masked_capacity_; ++c) {
        bases[c * experts + local[l]] = owner * ChunkRows(c) + header_rows_ + l * c;
      }
    }
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device_.CreateStream());
  device_.Copy(bases_.data(), bases.data(), base_bytes, *stream);
  device_.Copy(order_.data(), order.data(), experts * kCountBytes, *stream);
  if (!options_.loopback_experts.empty()) {
    ASSIGN_OR_RETURN(forced_, device_.Allocate(sent * kCountBytes));
    device_.Copy(forced_.data(), options_.loopback_experts.data(), sent * kCountBytes, *stream);
  }
  return stream->Synchronize();
}

absl::StatusOr<DispatchHandle> AllToAllDispatcher::Dispatch(const Tensor& x, const Tensor& experts,
                                                            const Tensor& weights, int64_t max_tokens, int32_t* counts,
                                                            Stream& stream) {
  CHECK(x.rows <= max_tokens && max_tokens <= options_.max_tokens_per_rank);
  CHECK(x.cols == options_.hidden_size && x.dtype == options_.dtype);
  CHECK(experts.rows == x.rows && experts.cols == options_.top_k);
  CHECK(weights.rows == x.rows && weights.cols == options_.top_k);
  DispatchHandle handle;
  handle.layout = LayoutOf(max_tokens);
  handle.slots = slots_.View<int32_t>(x.rows, options_.top_k);
  handle.weights = weights;
  handle.max_tokens = max_tokens;
  groups_.clear();
  const Tensor routed = forced_.data() != nullptr ? forced_.View<int32_t>(x.rows, options_.top_k) : experts;
  RETURN_IF_ERROR(handle.layout == DispatchLayout::kMasked ? DispatchMasked(x, routed, counts, handle, stream)
                                                           : DispatchContiguous(x, routed, counts, handle, stream));
  handle.groups = groups_;
  handle.expert_output = Rows(output_, handle.expert_input.rows);
  return handle;
}

absl::Status AllToAllDispatcher::DispatchMasked(const Tensor& x, const Tensor& experts, int32_t* counts,
                                                DispatchHandle& handle, Stream& stream) {
  const int64_t capacity = handle.max_tokens;
  const int64_t chunk_rows = ChunkRows(capacity);
  const int64_t chunk_bytes = chunk_rows * row_bytes_;
  const bool exchanges = ranks_ > 1;
  device_.ops().DispatchRows({.x = x,
                              .experts = experts,
                              .base = static_cast<const int64_t*>(bases_.data()) + capacity * options_.num_experts,
                              .num_experts = options_.num_experts,
                              .slots = handle.slots,
                              .counts = counts,
                              .dst = Rows(send_, MaskedRows(capacity)),
                              .num_headers = exchanges ? ranks_ : 0,
                              .header_stride_bytes = chunk_bytes},
                             stream);
  if (exchanges) {
    RETURN_IF_ERROR(comm_.AllToAll(send_.data(), input_.data(), ranks_ / comm_.size() * chunk_bytes, stream));
  }
  handle.expert_input = Rows(exchanges ? input_ : send_, MaskedRows(capacity));

  const int64_t num_local = std::ssize(experts_of_[rank_]), num_experts = options_.num_experts;
  handle.expected_rows = (capacity * ranks_ * options_.top_k * num_local + num_experts - 1) / num_experts;
  for (int64_t l = 0; l < num_local; ++l) {
    for (int64_t source = 0; source < ranks_; ++source) {
      const auto* header =
          exchanges ? reinterpret_cast<const int32_t*>(static_cast<const char*>(input_.data()) + source * chunk_bytes)
                    : counts;
      // In loopback the rows are those for the source's expert.
      const int32_t expert = experts_of_[comm_.size() == 1 ? source : rank_][l];
      AddGroup(l, source * chunk_rows + header_rows_ + l * capacity, capacity, header + expert);
    }
  }
  return absl::OkStatus();
}

absl::Status AllToAllDispatcher::DispatchContiguous(const Tensor& x, const Tensor& experts, int32_t* counts,
                                                    DispatchHandle& handle, Stream& stream) {
  device_.ops().DispatchRows({.x = x,
                              .experts = experts,
                              .order = static_cast<const int32_t*>(order_.data()),
                              .num_experts = options_.num_experts,
                              .slots = handle.slots,
                              .counts = counts,
                              .begins = static_cast<int32_t*>(begins_.data()),
                              .dst = Rows(send_, x.rows * options_.top_k)},
                             stream);
  return comm_.size() == 1 ? KeepRows(counts, handle, stream) : ExchangeRows(counts, handle, stream);
}

absl::Status AllToAllDispatcher::KeepRows(const int32_t* counts, DispatchHandle& handle, Stream& stream) {
  const int64_t rows = handle.slots.rows * options_.top_k;
  if (ranks_ > 1) RETURN_IF_ERROR(comm_.AllToAll(send_.data(), input_.data(), rows * row_bytes_, stream));
  handle.expert_input = Rows(ranks_ > 1 ? input_ : send_, rows);
  handle.expected_rows = rows;
  const auto* begins = static_cast<const int32_t*>(begins_.data());
  for (int64_t l = 0; l < std::ssize(experts_of_[0]); ++l) {
    for (const std::vector<int32_t>& of_rank : experts_of_) {
      AddGroup(l, 0, handle.slots.rows, counts + of_rank[l], begins + of_rank[l]);
    }
  }
  if (ranks_ == 1) {
    handle.row_offsets = begins;
  } else if (experts_of_[0].size() == 1) {
    auto* offsets = static_cast<int32_t*>(all_rows_.data());
    device_.ops().CopyBytes(offsets + 1, begins + options_.num_experts, kCountBytes, stream);
    handle.row_offsets = offsets;
  }
  return absl::OkStatus();
}

absl::Status AllToAllDispatcher::ExchangeRows(const int32_t* counts, DispatchHandle& handle, Stream& stream) {
  const int64_t num_experts = options_.num_experts;
  RETURN_IF_ERROR(comm_.AllGather(counts, all_counts_.data(), num_experts * kCountBytes, stream));
  device_.Copy(host_counts_.data(), all_counts_.data(), ranks_ * num_experts * kCountBytes, stream);
  RETURN_IF_ERROR(stream.Synchronize());
  const auto* host = static_cast<const int32_t*>(host_counts_.data());
  const auto* device_counts = static_cast<const int32_t*>(all_counts_.data());

  const std::vector<int32_t>& local = experts_of_[rank_];
  int64_t sent = 0;
  int64_t received = 0;
  for (int64_t other = 0; other < ranks_; ++other) {
    send_offsets_[other] = sent * row_bytes_;
    recv_offsets_[other] = received * row_bytes_;
    for (const int32_t e : experts_of_[other]) sent += host[rank_ * num_experts + e];
    for (const int32_t e : local) received += host[other * num_experts + e];
    send_bytes_[other] = sent * row_bytes_ - send_offsets_[other];
    recv_bytes_[other] = received * row_bytes_ - recv_offsets_[other];
  }
  CHECK_LE(sent, handle.slots.rows * options_.top_k);
  if (received > max_expert_rows()) {
    return Internal("dispatcher: {} rows come to rank {}, which has room for {}: a token chose an expert twice",
                    received, rank_, max_expert_rows());
  }
  RETURN_IF_ERROR(
      comm_.AllToAllV(send_.data(), send_bytes_, send_offsets_, input_.data(), recv_bytes_, recv_offsets_, stream));
  handle.expert_input = Rows(input_, received);
  handle.expected_rows = received;

  for (int64_t l = 0; l < std::ssize(local); ++l) {
    for (int64_t source = 0; source < ranks_; ++source) {
      const int32_t* of_source = host + source * num_experts;
      int64_t begin = recv_offsets_[source] / row_bytes_;
      for (int64_t before = 0; before < l; ++before) begin += of_source[local[before]];
      AddGroup(l, begin, of_source[local[l]], device_counts + source * num_experts + local[l]);
    }
  }
  return absl::OkStatus();
}

absl::Status AllToAllDispatcher::Combine(const DispatchHandle& handle, const CombineTarget& target, Stream& stream) {
  const int64_t tokens = handle.slots.rows;
  CHECK(target.delta.data == nullptr || (target.delta.rows == tokens && target.delta.cols == options_.hidden_size));
  CHECK(target.residual.data == nullptr || (target.residual.rows == tokens && target.normed.rows == tokens));
  const bool masked = handle.layout == DispatchLayout::kMasked;
  const int64_t rows = masked ? MaskedRows(handle.max_tokens) : tokens * options_.top_k;
  if (comm_.size() > 1 && !masked) {
    RETURN_IF_ERROR(
        comm_.AllToAllV(output_.data(), recv_bytes_, recv_offsets_, send_.data(), send_bytes_, send_offsets_, stream));
  } else if (ranks_ > 1) {
    RETURN_IF_ERROR(comm_.AllToAll(output_.data(), send_.data(), rows / comm_.size() * row_bytes_, stream));
  }
  device_.ops().CombineRows({.y = Rows(ranks_ > 1 ? send_ : output_, rows),
                             .slots = handle.slots,
                             .weights = handle.weights,
                             .delta = target.delta,
                             .residual = target.residual,
                             .norm_weight = target.norm_weight,
                             .eps = target.eps,
                             .normed = target.normed},
                            stream);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<TokenDispatcher>> CreateTokenDispatcher(const DispatcherOptions& options, Device& device,
                                                                       Communicator& comm) {
  RETURN_IF_ERROR(Validate(options, comm.size()));
  auto dispatcher = std::make_unique<AllToAllDispatcher>(options, device, comm);
  RETURN_IF_ERROR(dispatcher->Allocate());
  return dispatcher;
}

}  // namespace soloist
