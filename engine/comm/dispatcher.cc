#include "engine/comm/dispatcher.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "engine/comm/all_to_all_dispatcher.h"

namespace soloist {

absl::StatusOr<DispatchHandle> TokenDispatcher::Dispatch(const Tensor& x, const Tensor& experts, const Tensor& weights,
                                                         const DispatchCapacity& capacity, int32_t* counts,
                                                         Stream& stream) {
  queue().BeginStep(/*overlaps=*/false, /*times=*/nullptr);
  RETURN_IF_ERROR(StartDispatch(0, {x, experts, weights, capacity, counts}, stream));
  return FinishDispatch(0, stream);
}

absl::Status TokenDispatcher::Combine(const DispatchHandle& handle, const CombineTarget& target, Stream& stream) {
  RETURN_IF_ERROR(StartCombine(handle, stream));
  return FinishCombine(handle, target, stream);
}

AllToAllDispatcher::AllToAllDispatcher(const DispatcherOptions& options, Device& device, Communicator& comm)
    : options_(options),
      device_(device),
      comm_(comm),
      ranks_(options.loopback_ranks > 0 ? options.loopback_ranks : comm.size()),
      rank_(comm.rank()),
      row_bytes_(options.hidden_size * DTypeBytes(options.dtype)),
      masked_capacity_(std::min(options.masked_max_tokens, options.max_tokens_per_rank)),
      experts_of_(static_cast<size_t>(ranks_)),
      queue_(device, comm) {
  for (int32_t e = 0; e < options_.num_experts; ++e) experts_of_[options_.expert_rank[e]].push_back(e);
  for (const std::vector<int32_t>& local : experts_of_)
    max_local_experts_ = std::max(max_local_experts_, std::ssize(local));
  if (ranks_ > 1) header_rows_ = (options_.num_experts * kCountBytes + row_bytes_ - 1) / row_bytes_;
  for (Part& part : parts_) {
    for (auto* v : {&part.send_bytes, &part.send_offsets, &part.recv_bytes, &part.recv_offsets}) v->resize(ranks_);
    part.groups.reserve(experts_of_[rank_].size() * static_cast<size_t>(ranks_));
  }
}

absl::Status AllToAllDispatcher::Allocate() {
  const int64_t sent = options_.max_tokens_per_rank * options_.top_k;
  const int64_t send_rows = std::max(kMaxMicroBatches * MaskedRows(masked_capacity_), sent);
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
    const int64_t bytes = kMaxMicroBatches * ranks_ * experts * kCountBytes;
    ASSIGN_OR_RETURN(all_counts_, device_.Allocate(bytes));
    ASSIGN_OR_RETURN(host_counts_, device_.AllocatePinned(bytes));
  } else {
    ASSIGN_OR_RETURN(begins_, device_.Allocate(kMaxMicroBatches * BeginWords() * kCountBytes));
    ASSIGN_OR_RETURN(all_rows_, device_.Allocate(kMaxMicroBatches * 2 * kCountBytes));
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

absl::Status AllToAllDispatcher::StartDispatch(int micro_batch, const DispatchInput& in, Stream& stream) {
  Part& part = parts_[micro_batch];
  const Part* const before = micro_batch > 0 ? &parts_[micro_batch - 1] : nullptr;
  part.first_token = before != nullptr ? before->first_token + before->handle.slots.rows : 0;
  part.send_row = before != nullptr ? before->send_row + before->send_rows : 0;
  CHECK(part.first_token + in.x.rows <= in.capacity.max_tokens);
  CHECK(in.capacity.max_tokens <= options_.max_tokens_per_rank);
  CHECK(in.capacity.masked_rows >= 0 && in.capacity.masked_rows <= in.capacity.max_tokens);
  CHECK(in.x.cols == options_.hidden_size && in.x.dtype == options_.dtype);
  CHECK(in.experts.rows == in.x.rows && in.experts.cols == options_.top_k);
  CHECK(in.weights.rows == in.x.rows && in.weights.cols == options_.top_k);
  part.counts = in.counts;
  part.groups.clear();
  part.handle = {};
  part.handle.micro_batch = micro_batch;
  part.handle.layout = LayoutOf(in.capacity.max_tokens);
  part.handle.slots =
      slots_.View<int32_t>(part.first_token + in.x.rows, options_.top_k).Rows(part.first_token, in.x.rows);
  part.handle.weights = in.weights;
  part.handle.max_tokens = in.capacity.max_tokens;
  part.handle.masked_rows = RoomOf(in.capacity);
  DispatchInput routed = in;
  if (forced_.data() != nullptr) {
    routed.experts =
        forced_.View<int32_t>(part.first_token + in.x.rows, options_.top_k).Rows(part.first_token, in.x.rows);
  }
  const bool masked = part.handle.layout == DispatchLayout::kMasked;
  if (masked) {
    PackMasked(routed, part, stream);
  } else {
    PackContiguous(routed, part, stream);
  }
  if (ranks_ == 1) return absl::OkStatus();
  const auto exchange = masked              ? &AllToAllDispatcher::ExchangeChunks
                        : comm_.size() == 1 ? &AllToAllDispatcher::CopyBack
                                            : &AllToAllDispatcher::ExchangeRows;
  return queue_.Start(
      micro_batch, "dispatch", [this, &part, exchange](Stream& s) { return (this->*exchange)(part, s); }, stream);
}

absl::StatusOr<DispatchHandle> AllToAllDispatcher::FinishDispatch(int micro_batch, Stream& stream) {
  RETURN_IF_ERROR(queue_.Finish(micro_batch, stream));
  return parts_[micro_batch].handle;
}

void AllToAllDispatcher::PackMasked(const DispatchInput& in, Part& part, Stream& stream) {
  const int64_t room = part.handle.masked_rows;
  part.send_rows = MaskedRows(room);
  device_.ops().DispatchRows({.x = in.x,
                              .experts = in.experts,
                              .base = static_cast<const int64_t*>(bases_.data()) + room * options_.num_experts,
                              .num_experts = options_.num_experts,
                              .slots = part.handle.slots,
                              .counts = in.counts,
                              .dst = Rows(send_, part.send_row, part.send_rows),
                              .room = room < part.handle.max_tokens ? room : 0,
                              .num_headers = ranks_,
                              .header_stride_bytes = ChunkRows(room) * row_bytes_},
                             stream);
}

void AllToAllDispatcher::PackContiguous(const DispatchInput& in, Part& part, Stream& stream) {
  part.send_rows = in.x.rows * options_.top_k;
  device_.ops().DispatchRows(
      {.x = in.x,
       .experts = in.experts,
       .order = static_cast<const int32_t*>(order_.data()),
       .num_experts = options_.num_experts,
       .slots = part.handle.slots,
       .counts = in.counts,
       .begins = comm_.size() > 1 ? nullptr : Words(begins_, part.handle.micro_batch, BeginWords()),
       .dst = Rows(send_, part.send_row, part.send_rows)},
      stream);
  if (comm_.size() == 1) KeepRows(part, stream);
}

// Of a group of one: what all rows are known to be before anything has moved.
void AllToAllDispatcher::KeepRows(Part& part, Stream& stream) {
  part.row = part.send_row;
  DispatchHandle& handle = part.handle;
  handle.expert_input = Rows(ranks_ > 1 ? input_ : send_, part.row, part.send_rows);
  handle.expert_output = Rows(output_, part.row, part.send_rows);
  handle.expected_rows = part.send_rows;
  const int32_t* begins = Words(begins_, handle.micro_batch, BeginWords());
  for (int64_t l = 0; l < std::ssize(experts_of_[0]); ++l) {
    for (const std::vector<int32_t>& of_rank : experts_of_) {
      AddGroup(part, l, 0, handle.slots.rows, part.counts + of_rank[l], begins + of_rank[l]);
    }
  }
  handle.groups = part.groups;
  if (ranks_ == 1) {
    handle.row_offsets = begins;
  } else if (experts_of_[0].size() == 1) {
    int32_t* offsets = Words(all_rows_, handle.micro_batch, 2);
    device_.ops().CopyBytes(offsets + 1, begins + options_.num_experts, kCountBytes, stream);
    handle.row_offsets = offsets;
  }
}

absl::Status AllToAllDispatcher::CopyBack(Part& part, Stream& stream) {
  return comm_.AllToAll(Rows(send_, part.send_row, part.send_rows).data, part.handle.expert_input.data,
                        part.send_rows * row_bytes_, stream);
}

absl::Status AllToAllDispatcher::ExchangeChunks(Part& part, Stream& stream) {
  DispatchHandle& handle = part.handle;
  const int64_t room = handle.masked_rows, chunk_rows = ChunkRows(room), chunk_bytes = chunk_rows * row_bytes_;
  part.row = part.send_row;
  handle.expert_input = Rows(input_, part.row, part.send_rows);
  handle.expert_output = Rows(output_, part.row, part.send_rows);
  RETURN_IF_ERROR(comm_.AllToAll(Rows(send_, part.send_row, part.send_rows).data, handle.expert_input.data,
                                 ranks_ / comm_.size() * chunk_bytes, stream));
  const int64_t num_local = std::ssize(experts_of_[rank_]), num_experts = options_.num_experts;
  handle.expected_rows = (handle.max_tokens * ranks_ * options_.top_k * num_local + num_experts - 1) / num_experts;
  for (int64_t l = 0; l < num_local; ++l) {
    for (int64_t source = 0; source < ranks_; ++source) {
      const auto* header =
          reinterpret_cast<const int32_t*>(static_cast<const char*>(handle.expert_input.data) + source * chunk_bytes);
      // In loopback the rows are those for the source's expert.
      const int32_t expert = experts_of_[comm_.size() == 1 ? source : rank_][l];
      AddGroup(part, l, source * chunk_rows + header_rows_ + l * room, room, header + expert);
    }
  }
  handle.groups = part.groups;
  return absl::OkStatus();
}

absl::Status AllToAllDispatcher::ExchangeRows(Part& part, Stream& stream) {
  DispatchHandle& handle = part.handle;
  const int64_t num_experts = options_.num_experts, all = ranks_ * num_experts;
  int32_t* const device_counts = Words(all_counts_, handle.micro_batch, all);
  int32_t* const host = Words(host_counts_, handle.micro_batch, all);
  RETURN_IF_ERROR(comm_.AllGather(part.counts, device_counts, num_experts * kCountBytes, stream));
  device_.Copy(host, device_counts, all * kCountBytes, stream);
  RETURN_IF_ERROR(stream.Synchronize());

  const std::vector<int32_t>& local = experts_of_[rank_];
  int64_t sent = 0;
  int64_t received = 0;
  for (int64_t other = 0; other < ranks_; ++other) {
    part.send_offsets[other] = sent * row_bytes_;
    part.recv_offsets[other] = received * row_bytes_;
    for (const int32_t e : experts_of_[other]) sent += host[rank_ * num_experts + e];
    for (const int32_t e : local) received += host[other * num_experts + e];
    part.send_bytes[other] = sent * row_bytes_ - part.send_offsets[other];
    part.recv_bytes[other] = received * row_bytes_ - part.recv_offsets[other];
  }
  CHECK_LE(sent, part.send_rows);
  // The first micro-batch has arrived: jobs run in order.
  part.row = handle.micro_batch > 0 ? parts_[0].row + parts_[0].handle.expert_input.rows : 0;
  if (part.row + received > max_expert_rows()) {
    return Internal("dispatcher: {} rows come to rank {}, which has room for {}: a token chose an expert twice",
                    received, rank_, max_expert_rows() - part.row);
  }
  handle.expert_input = Rows(input_, part.row, received);
  handle.expert_output = Rows(output_, part.row, received);
  RETURN_IF_ERROR(comm_.AllToAllV(Rows(send_, part.send_row, sent).data, part.send_bytes, part.send_offsets,
                                  handle.expert_input.data, part.recv_bytes, part.recv_offsets, stream));
  handle.expected_rows = received;

  for (int64_t l = 0; l < std::ssize(local); ++l) {
    for (int64_t source = 0; source < ranks_; ++source) {
      const int32_t* of_source = host + source * num_experts;
      int64_t begin = part.recv_offsets[source] / row_bytes_;
      for (int64_t before = 0; before < l; ++before) begin += of_source[local[before]];
      AddGroup(part, l, begin, of_source[local[l]], device_counts + source * num_experts + local[l]);
    }
  }
  handle.groups = part.groups;
  return absl::OkStatus();
}

absl::Status AllToAllDispatcher::StartCombine(const DispatchHandle& handle, Stream& stream) {
  if (ranks_ == 1) return absl::OkStatus();
  Part& part = parts_[handle.micro_batch];
  return queue_.Start(handle.micro_batch, "combine", [this, &part](Stream& s) { return ReturnRows(part, s); }, stream);
}

absl::Status AllToAllDispatcher::ReturnRows(Part& part, Stream& stream) {
  void* const from = part.handle.expert_output.data;
  void* const to = Rows(send_, part.send_row, part.send_rows).data;
  if (comm_.size() > 1 && part.handle.layout == DispatchLayout::kContiguous) {
    return comm_.AllToAllV(from, part.recv_bytes, part.recv_offsets, to, part.send_bytes, part.send_offsets, stream);
  }
  return comm_.AllToAll(from, to, part.send_rows / comm_.size() * row_bytes_, stream);
}

absl::Status AllToAllDispatcher::FinishCombine(const DispatchHandle& handle, const CombineTarget& target,
                                               Stream& stream) {
  RETURN_IF_ERROR(queue_.Finish(handle.micro_batch, stream));
  const Part& part = parts_[handle.micro_batch];
  const int64_t tokens = handle.slots.rows;
  CHECK(target.delta.data == nullptr || (target.delta.rows == tokens && target.delta.cols == options_.hidden_size));
  CHECK(target.residual.data == nullptr || (target.residual.rows == tokens && target.normed.rows == tokens));
  device_.ops().CombineRows({.y = ranks_ > 1 ? Rows(send_, part.send_row, part.send_rows) : handle.expert_output,
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

absl::StatusOr<std::unique_ptr<TokenDispatcher>> CreateTokenDispatcher(const DispatcherOptions& options, Device& device,
                                                                       Communicator& comm) {
  RETURN_IF_ERROR(CheckDispatcherOptions(options, comm.size()));
  auto dispatcher = std::make_unique<AllToAllDispatcher>(options, device, comm);
  RETURN_IF_ERROR(dispatcher->Allocate());
  return dispatcher;
}

}  // namespace soloist
