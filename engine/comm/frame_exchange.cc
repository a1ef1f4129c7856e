#include "engine/comm/frame_exchange.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace soloist {
namespace {

constexpr uint32_t kMagic = 0x4D415246;  // "FRAM"
// Added to the phase of the frames that follow a bulk payload: "I have it".
constexpr int kTaken = 4;

std::string Describe(CommOp op, int64_t bytes, int root, uint64_t sequence) {
  std::string out = CommOpName(op);
  if (op != CommOp::kBarrier && op != CommOp::kAllToAllV) absl::StrAppend(&out, " of ", bytes, " bytes");
  if (op == CommOp::kBroadcast) absl::StrAppend(&out, " from rank ", root);
  return absl::StrCat(out, " (call ", sequence, ")");
}

CommOp Counterpart(CommOp op) {
  if (op == CommOp::kSend) return CommOp::kRecv;
  return op == CommOp::kRecv ? CommOp::kSend : op;
}

// Where a frame's header, sizes and payload lie. The part of it that begins `done` bytes from its start.
int Rest(std::array<iovec, 3>& pieces, int64_t done) {
  int count = 0;
  for (const iovec& piece : pieces) {
    const auto skip = std::min(done, static_cast<int64_t>(piece.iov_len));
    done -= skip;
    if (static_cast<int64_t>(piece.iov_len) == skip) continue;
    pieces[count++] = {static_cast<char*>(piece.iov_base) + skip, piece.iov_len - static_cast<size_t>(skip)};
  }
  return count;
}

}  // namespace

FrameExchange::FrameExchange(int rank, std::vector<Socket> data, GroupControl& control, GlooBulk* bulk,
                             int64_t bulk_bytes, absl::Duration timeout)
    : rank_(rank), control_(control), bulk_(bulk), bulk_bytes_(bulk_bytes), timeout_(timeout), peers_(data.size()) {
  for (size_t peer = 0; peer < data.size(); ++peer) peers_[peer].socket = std::move(data[peer]);
}

absl::Status FrameExchange::Run(const ExchangeCall& call, std::span<const ExchangePart> parts,
                                const Deadline& deadline) {
  RETURN_IF_ERROR(control_.error());
  if (Pairwise(call)) {
    ++peers_[parts[0].peer].pair_sequence;
  } else {
    ++sequence_;
  }
  Begin(call, parts);
  RETURN_IF_ERROR(MoveFrames(call, deadline));
  RETURN_IF_ERROR(CheckSizes(call));
  return bulk_ == nullptr ? absl::OkStatus() : MoveBulk(call, parts, deadline);
}

void FrameExchange::Begin(const ExchangeCall& call, std::span<const ExchangePart> parts) {
  out_sizes_.assign(call.send_bytes.begin(), call.send_bytes.end());
  out_sizes_.insert(out_sizes_.end(), call.recv_bytes.begin(), call.recv_bytes.end());
  const auto fixed = static_cast<int64_t>(sizeof(Header) + out_sizes_.size() * sizeof(int64_t));
  for (Peer& peer : peers_) peer.in_exchange = false;
  for (const ExchangePart& part : parts) {
    CHECK_NE(part.peer, rank_);
    Peer& peer = peers_[part.peer];
    peer.in_exchange = true;
    peer.part = part;
    peer.checked = false;
    peer.sent = peer.received = 0;
    peer.send_end = fixed + (IsBulk(part.send_bytes) ? 0 : part.send_bytes);
    peer.receive_end = fixed + (IsBulk(part.recv_bytes) ? 0 : part.recv_bytes);
    peer.in_sizes.resize(out_sizes_.size());
    peer.out = {.magic = kMagic,
                .op = static_cast<int16_t>(call.op),
                .root = static_cast<int16_t>(Pairwise(call) ? 0 : call.root),
                .phase = call.phase,
                .sizes = static_cast<int32_t>(out_sizes_.size()),
                .sequence = Pairwise(call) ? peer.pair_sequence : sequence_,
                .bytes = call.bytes,
                .payload = part.send_bytes};
  }
}

absl::Status FrameExchange::MoveFrames(const ExchangeCall& call, const Deadline& deadline) {
  // Each rank starts with the one after it, so that not all send to the same rank at a time.
  const auto peer_at = [&](int i) { return (rank_ + i) % size(); };
  for (int i = 1; i < size(); ++i) {
    if (peers_[peer_at(i)].in_exchange) RETURN_IF_ERROR(SendSome(peer_at(i)));
  }
  while (true) {
    entries_.assign(1, {.fd = control_.wake_fd(), .events = POLLIN, .revents = 0});
    entry_peers_.assign(1, rank_);
    for (int i = 1; i < size(); ++i) {
      const Peer& peer = peers_[peer_at(i)];
      const int events = (peer.Sends() ? POLLOUT : 0) | (peer.Receives() ? POLLIN : 0);
      if (events == 0) continue;
      entries_.push_back({.fd = peer.socket.fd(), .events = static_cast<int16_t>(events), .revents = 0});
      entry_peers_.push_back(peer_at(i));
    }
    if (entries_.size() == 1) return absl::OkStatus();
    if (PollUntil(entries_, deadline) == 0 || deadline.Passed()) return FailByDeadline(call, DescribeMissing());
    for (size_t i = 1; i < entries_.size(); ++i) {
      // Also where there is an error or a hang-up: then sending or receiving finds out which.
      if (entries_[i].revents == 0) continue;
      const Peer& peer = peers_[entry_peers_[i]];
      if (peer.Receives() && (entries_[i].revents & ~POLLOUT) != 0) {
        RETURN_IF_ERROR(ReceiveSome(call, entry_peers_[i]));
      }
      if (peer.Sends() && (entries_[i].revents & ~POLLIN) != 0) RETURN_IF_ERROR(SendSome(entry_peers_[i]));
    }
    // Last: a call whose bytes have all come has succeeded, whatever happened since.
    const bool done =
        std::none_of(peers_.begin(), peers_.end(), [](const Peer& p) { return p.Sends() || p.Receives(); });
    if (done) return absl::OkStatus();
    if (entries_[0].revents != 0) RETURN_IF_ERROR(control_.error());
  }
}

absl::Status FrameExchange::SendSome(int to) {
  Peer& peer = peers_[to];
  const int64_t payload = IsBulk(peer.part.send_bytes) ? 0 : peer.part.send_bytes;
  std::array<iovec, 3> pieces = {{{&peer.out, sizeof(Header)},
                                  {out_sizes_.data(), out_sizes_.size() * sizeof(int64_t)},
                                  {const_cast<char*>(peer.part.send), static_cast<size_t>(payload)}}};
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = static_cast<size_t>(Rest(pieces, peer.sent));
  const ssize_t sent = sendmsg(peer.socket.fd(), &message, MSG_NOSIGNAL);
  if (sent >= 0) {
    peer.sent += sent;
  } else if (errno != EAGAIN && errno != EINTR) {
    return control_.PeerBroken(to, strerror(errno));
  }
  return absl::OkStatus();
}

absl::Status FrameExchange::ReceiveSome(const ExchangeCall& call, int from) {
  Peer& peer = peers_[from];
  const int64_t payload = IsBulk(peer.part.recv_bytes) ? 0 : peer.part.recv_bytes;
  std::array<iovec, 3> pieces = {{{&peer.in, sizeof(Header)},
                                  {peer.in_sizes.data(), peer.in_sizes.size() * sizeof(int64_t)},
                                  {peer.part.recv, static_cast<size_t>(payload)}}};
  const ssize_t got = readv(peer.socket.fd(), pieces.data(), Rest(pieces, peer.received));
  if (got == 0) return control_.PeerBroken(from, "its connection was closed");
  if (got < 0) {
    return errno == EAGAIN || errno == EINTR ? absl::OkStatus() : control_.PeerBroken(from, strerror(errno));
  }
  peer.received += got;
  if (peer.checked || peer.received < static_cast<int64_t>(sizeof(Header))) return absl::OkStatus();
  peer.checked = true;
  if (const absl::Status status = CheckHeader(call, from); !status.ok()) return Fail(status);
  return absl::OkStatus();
}

absl::Status FrameExchange::CheckHeader(const ExchangeCall& call, int from) const {
  const Peer& peer = peers_[from];
  const Header &in = peer.in, &out = peer.out;
  const CommOp op = static_cast<CommOp>(in.op);
  if (in.magic != kMagic) return Internal("{}: rank {} sends what is no frame", CommOpName(call.op), from);
  const bool same_call = op == Counterpart(call.op) && in.root == out.root && in.phase == out.phase &&
                         in.sizes == out.sizes && in.sequence == out.sequence;
  if (same_call && in.bytes == out.bytes && in.payload == peer.part.recv_bytes) return absl::OkStatus();
  if (same_call && Pairwise(call)) {
    const bool sends = call.op == CommOp::kSend;
    return Internal("Send and Recv differ: rank {} sends {} bytes to rank {}, which expects {}", sends ? rank_ : from,
                    sends ? out.bytes : in.bytes, sends ? from : rank_, sends ? in.bytes : out.bytes);
  }
  if (same_call && call.op == CommOp::kAllToAllV) {
    return Internal("AllToAllV: rank {} sends {} bytes to rank {}, which expects {}", from, in.payload, rank_,
                    peer.part.recv_bytes);
  }
  const std::string mine = Describe(call.op, out.bytes, call.root, out.sequence);
  const std::string its = Describe(op, in.bytes, in.root, in.sequence);
  return Internal("ranks differ: rank {} is in {}, rank {} in {}", std::min(rank_, from), rank_ < from ? mine : its,
                  std::max(rank_, from), rank_ < from ? its : mine);
}

absl::Status FrameExchange::CheckSizes(const ExchangeCall& call) const {
  if (call.send_bytes.empty()) return absl::OkStatus();
  const auto sizes_of = [&](int rank) { return rank == rank_ ? out_sizes_.data() : peers_[rank].in_sizes.data(); };
  for (int from = 0; from < size(); ++from) {
    for (int to = 0; to < size(); ++to) {
      const int64_t sends = sizes_of(from)[to], expects = sizes_of(to)[size() + from];
      if (sends == expects) continue;
      const absl::Status status =
          Internal("AllToAllV: rank {} sends {} bytes to rank {}, which expects {}", from, sends, to, expects);
      control_.Abort(status);
      return control_.error();
    }
  }
  return absl::OkStatus();
}

absl::Status FrameExchange::MoveBulk(const ExchangeCall& call, std::span<const ExchangePart> parts,
                                     const Deadline& deadline) {
  std::vector<ExchangePart> bulk, taken;
  for (ExchangePart part : parts) {
    if (!IsBulk(part.send_bytes)) part.send_bytes = 0;
    if (!IsBulk(part.recv_bytes)) part.recv_bytes = 0;
    if (part.send_bytes == 0 && part.recv_bytes == 0) continue;
    bulk.push_back(part);
    taken.push_back({.peer = part.peer});
  }
  if (bulk.empty()) return absl::OkStatus();
  const Peer& first = peers_[bulk[0].peer];
  std::vector<int> missing;
  const uint64_t slot =
      (first.out.sequence * kTaken + static_cast<uint64_t>(call.phase)) * 2 + (Pairwise(call) ? 1 : 0);
  const absl::Status status = bulk_->Exchange(slot, bulk, deadline, &missing);
  if (absl::IsDeadlineExceeded(status)) {
    std::string ranks;
    for (const int rank : missing) absl::StrAppend(&ranks, ranks.empty() ? "" : ", ", "rank ", rank);
    return FailByDeadline(call, ranks);
  }
  if (!status.ok()) return control_.SomeoneBroken(std::string(status.message()));
  // Gloo drops what is on its way when a rank closes: nobody returns, and leaves, before its bytes have been taken.
  ExchangeCall end = call;
  end.phase += kTaken;
  end.send_bytes = end.recv_bytes = {};
  Begin(end, taken);
  return MoveFrames(end, deadline);
}

absl::Status FrameExchange::Fail(const absl::Status& status) {
  control_.Abort(status);
  return control_.error();
}

absl::Status FrameExchange::FailByDeadline(const ExchangeCall& call, const std::string& missing) {
  std::string what;
  if (Pairwise(call)) {
    what = fmt::format("{} of {} bytes {} rank {}", CommOpName(call.op), call.bytes,
                       call.op == CommOp::kSend ? "to" : "from", call.root);
  } else {
    what = Describe(call.op, call.bytes, call.root, sequence_);
  }
  return Fail(DeadlineExceeded("{}: after {} rank {} still waits for {}", what, absl::FormatDuration(timeout_), rank_,
                               missing));
}

std::string FrameExchange::DescribeMissing() const {
  std::string out;
  for (int rank = 0; rank < size(); ++rank) {
    const Peer& peer = peers_[rank];
    if (!peer.Sends() && !peer.Receives()) continue;
    absl::StrAppend(&out, out.empty() ? "" : ", ", "rank ", rank);
    if (peer.Receives() && peer.received > 0) absl::StrAppend(&out, " (has come, not all of its bytes)");
    if (!peer.Receives()) absl::StrAppend(&out, " (does not take all bytes)");
  }
  return out;
}

}  // namespace soloist
