// FrameExchange: one step of a collective over TCP: this rank sends something to some peers and receives something from
// the same ones, at once. Private to engine/comm.
//
// What goes to a peer is one frame: a header that says which call the sender is in, for AllToAllV a row of sizes, then
// the payload. Nobody asks before sending: an exchange costs one message per peer and direction. The receiver compares
// the header with its own call before it takes the payload, so ranks that disagree find out instead of mixing up bytes.
// The calling thread itself moves the bytes (poll, writev and readv); no other thread ever touches a caller's buffer.
#ifndef SOLOIST_ENGINE_COMM_FRAME_EXCHANGE_H_
#define SOLOIST_ENGINE_COMM_FRAME_EXCHANGE_H_

#include <sys/uio.h>

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/comm/comm_op.h"
#include "engine/comm/gloo_bulk.h"
#include "engine/comm/group_control.h"
#include "engine/comm/tcp_socket.h"

namespace soloist {

// What all ranks of an exchange must agree on.
struct ExchangeCall {
  CommOp op = CommOp::kNone;
  int64_t bytes = 0;  // per rank; 0 for AllToAllV
  int root = 0;       // or the peer of Send and Recv, in messages
  int phase = 0;      // of a call that has several exchanges: 0 to 3
  // AllToAllV: [size] each; else empty.
  std::span<const int64_t> send_bytes = {}, recv_bytes = {};
};

class FrameExchange {
 public:
  // `data` [size]: connections as ConnectMesh makes them. Payloads of at least `bulk_bytes` go through `bulk`, which
  // may be null if bulk_bytes is the largest int64. `control` and `bulk` must outlive this object.
  FrameExchange(int rank, std::vector<Socket> data, GroupControl& control, GlooBulk* bulk, int64_t bulk_bytes,
                absl::Duration timeout);

  int size() const { return static_cast<int>(peers_.size()); }
  Deadline NewDeadline() const { return Deadline(timeout_); }
  // Exchanges with the peers in `parts`, at most one part each and none for this rank. On OK all of this rank's bytes
  // are on their way and all of the peers' are here. Any failure is the group's: DEADLINE_EXCEEDED names who is
  // missing, INTERNAL who disagrees, UNAVAILABLE who is gone.
  absl::Status Run(const ExchangeCall& call, std::span<const ExchangePart> parts, const Deadline& deadline);

 private:
  // On the wire, in the byte order of the host: all ranks run the same binary.
  struct Header {
    uint32_t magic = 0;
    int16_t op = 0;
    int16_t root = 0;
    int32_t phase = 0;
    int32_t sizes = 0;      // how many int64 follow
    uint64_t sequence = 0;  // of calls of all ranks, or of this pair
    int64_t bytes = 0;
    int64_t payload = 0;  // whether it follows or goes through bulk
  };
  struct Peer {
    Socket socket;
    uint64_t pair_sequence = 0;  // Sends and Recvs with it
    // The current exchange:
    bool in_exchange = false;
    ExchangePart part;
    Header out, in;
    std::vector<int64_t> in_sizes;
    bool checked = false;                   // the header
    int64_t sent = 0, received = 0;         // bytes of the frame
    int64_t send_end = 0, receive_end = 0;  // its length
    bool Sends() const { return in_exchange && sent < send_end; }
    bool Receives() const { return in_exchange && received < receive_end; }
  };

  void Begin(const ExchangeCall& call, std::span<const ExchangePart> parts);
  absl::Status MoveFrames(const ExchangeCall& call, const Deadline& deadline);
  absl::Status MoveBulk(const ExchangeCall& call, std::span<const ExchangePart> parts, const Deadline& deadline);
  absl::Status SendSome(int peer);
  absl::Status ReceiveSome(const ExchangeCall& call, int peer);
  absl::Status CheckHeader(const ExchangeCall& call, int peer) const;
  // AllToAllV: every rank has all sizes, so all find the same contradiction, in the same call.
  absl::Status CheckSizes(const ExchangeCall& call) const;
  absl::Status Fail(const absl::Status& status);
  absl::Status FailByDeadline(const ExchangeCall& call, const std::string& missing);
  std::string DescribeMissing() const;
  bool Pairwise(const ExchangeCall& call) const { return call.op == CommOp::kSend || call.op == CommOp::kRecv; }
  bool IsBulk(int64_t bytes) const { return bytes >= bulk_bytes_; }

  const int rank_;
  GroupControl& control_;
  GlooBulk* const bulk_;
  const int64_t bulk_bytes_;
  const absl::Duration timeout_;
  std::vector<Peer> peers_;
  std::vector<int64_t> out_sizes_;  // AllToAllV: send_bytes, then recv_bytes
  uint64_t sequence_ = 0;           // of exchanges of all ranks
  std::vector<pollfd> entries_;
  std::vector<int> entry_peers_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_FRAME_EXCHANGE_H_
