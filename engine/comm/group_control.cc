#include "engine/comm/group_control.h"

#include <linux/sockios.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/time/clock.h"
#include "base/check.h"
#include "base/status.h"

namespace soloist {
namespace {

constexpr absl::Duration kSettle = absl::Milliseconds(50);
// For the reason to reach the peers' kernels; a peer that is cut off costs this once.
constexpr absl::Duration kDeliver = absl::Milliseconds(100);
// For a peer's reason to arrive after the end of its data connection: they travel apart.
constexpr absl::Duration kReason = absl::Milliseconds(200);
constexpr size_t kMaxMessage = 2048;

enum FrameKind : uint32_t { kAbort = 0x54524241, kGoodbye = 0x45594247 };

struct Frame {
  uint32_t kind = 0;
  int32_t code = 0;
  int32_t origin = -1;  // the rank whose reason it is
  uint32_t bytes = 0;   // of the message that follows
};

std::string EncodeFrame(FrameKind kind, const absl::Status& reason, int origin) {
  const Frame frame = {.kind = kind,
                       .code = static_cast<int32_t>(reason.code()),
                       .origin = origin,
                       .bytes = static_cast<uint32_t>(reason.message().size())};
  std::string out(reinterpret_cast<const char*>(&frame), sizeof(frame));
  out.append(reason.message().data(), reason.message().size());
  return out;
}

}  // namespace

absl::StatusOr<std::unique_ptr<GroupControl>> GroupControl::Create(int rank, std::vector<Socket> control) {
  Socket epoll(epoll_create1(EPOLL_CLOEXEC)), wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll.valid() || !wake.valid()) return ResourceExhausted("no file descriptor left: {}", strerror(errno));
  for (size_t peer = 0; peer <= control.size(); ++peer) {
    const int fd = peer < control.size() ? control[peer].fd() : wake.fd();
    epoll_event event = {.events = EPOLLIN, .data = {.u64 = peer}};
    if (fd >= 0 && epoll_ctl(epoll.fd(), EPOLL_CTL_ADD, fd, &event) != 0) {
      return ResourceExhausted("cannot watch a connection: {}", strerror(errno));
    }
  }
  return std::unique_ptr<GroupControl>(new GroupControl(rank, std::move(control), std::move(epoll), std::move(wake)));
}

GroupControl::GroupControl(int rank, std::vector<Socket> control, Socket epoll, Socket wake)
    : rank_(rank), epoll_(std::move(epoll)), wake_(std::move(wake)), peers_(control.size()) {
  for (size_t peer = 0; peer < control.size(); ++peer) {
    peers_[peer].closed = !control[peer].valid();
    peers_[peer].socket = std::move(control[peer]);
  }
}

GroupControl::~GroupControl() {
  const std::lock_guard lock(mutex_);
  if (failed()) return;
  Tell(EncodeFrame(kGoodbye, absl::OkStatus(), rank_));
}

absl::Status GroupControl::error() {
  const std::lock_guard lock(mutex_);
  ReadNews(Deadline(absl::ZeroDuration()));
  Settle();
  return error_;
}

void GroupControl::Abort(const absl::Status& reason) {
  CHECK(!reason.ok());
  const std::lock_guard lock(mutex_);
  ReadNews(Deadline(absl::ZeroDuration()));
  if (proposal_.ok()) Propose(reason);
  Settle();
}

absl::Status GroupControl::PeerBroken(int peer, std::string_view what) {
  const std::lock_guard lock(mutex_);
  const Deadline deadline(kReason);
  const Peer& broken = peers_[peer];
  do {
    ReadNews(deadline);
  } while (proposal_.ok() && !broken.goodbye && !broken.closed && !deadline.Passed());
  if (proposal_.ok()) Propose(GoneOrLeft(peer, what));
  Settle();
  return error_;
}

absl::Status GroupControl::SomeoneBroken(std::string_view what) {
  const std::lock_guard lock(mutex_);
  const Deadline deadline(kReason);
  const auto left = [&] {
    return std::find_if(peers_.begin(), peers_.end(), [](const Peer& peer) { return peer.goodbye; });
  };
  do {
    ReadNews(deadline);
  } while (proposal_.ok() && left() == peers_.end() && !deadline.Passed());
  if (proposal_.ok() && left() != peers_.end()) {
    Propose(GoneOrLeft(static_cast<int>(left() - peers_.begin()), what));
  } else if (proposal_.ok()) {
    Propose(Unavailable("rank {} lost a connection: {}", rank_, what));
  }
  Settle();
  return error_;
}

absl::Status GroupControl::GoneOrLeft(int peer, std::string_view what) const {
  if (peers_[peer].goodbye) return Unavailable("rank {} has left", peer);
  return Unavailable("rank {} is gone: {}", peer, what);
}

void GroupControl::ReadNews(const Deadline& deadline) {
  if (failed()) return;
  pollfd entry = {.fd = epoll_.fd(), .events = POLLIN, .revents = 0};
  if (PollUntil({&entry, 1}, deadline) == 0) return;
  epoll_event events[64];
  const int count = epoll_wait(epoll_.fd(), events, static_cast<int>(std::size(events)), 0);
  for (int i = 0; i < count; ++i) {
    if (events[i].data.u64 < peers_.size()) ReadPeer(static_cast<int>(events[i].data.u64));
  }
  // Only now: whoever closed because of a third rank's error has passed that on before.
  for (int peer = 0; peer < std::ssize(peers_); ++peer) {
    if (proposal_.ok() && !peers_[peer].lost.empty()) Propose(GoneOrLeft(peer, peers_[peer].lost));
  }
}

void GroupControl::ReadPeer(int peer) {
  Peer& from = peers_[peer];
  while (!from.closed) {
    char bytes[4096];
    const ssize_t got = recv(from.socket.fd(), bytes, sizeof(bytes), 0);
    if (got > 0) {
      from.unread.append(bytes, static_cast<size_t>(got));
      HandleFrames(peer);
      continue;
    }
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return;
    from.closed = true;
    if (!from.goodbye) from.lost = got == 0 ? "its connection was closed" : strerror(errno);
    epoll_ctl(epoll_.fd(), EPOLL_CTL_DEL, from.socket.fd(), nullptr);
  }
}

void GroupControl::HandleFrames(int peer) {
  std::string& unread = peers_[peer].unread;
  while (unread.size() >= sizeof(Frame)) {
    Frame frame;
    std::memcpy(&frame, unread.data(), sizeof(frame));
    const bool known = (frame.kind == kAbort && frame.code != 0) || frame.kind == kGoodbye;
    if (!known || frame.bytes > kMaxMessage) {
      if (proposal_.ok()) Propose(Internal("rank {} sends what is no control frame", peer));
      unread.clear();
      return;
    }
    if (unread.size() < sizeof(Frame) + frame.bytes) return;
    if (frame.kind == kGoodbye) {
      peers_[peer].goodbye = true;
    } else if (proposal_.ok() || frame.origin < proposed_by_) {
      proposal_ = absl::Status(static_cast<absl::StatusCode>(frame.code), unread.substr(sizeof(Frame), frame.bytes));
      proposed_by_ = frame.origin;
    }
    unread.erase(0, sizeof(Frame) + frame.bytes);
  }
}

// A control frame fits into a socket's buffer: there is no partial send but to a peer that is lost anyway.
void GroupControl::Tell(const std::string& frame) const {
  for (const Peer& peer : peers_) {
    if (!peer.closed) (void)!send(peer.socket.fd(), frame.data(), frame.size(), MSG_NOSIGNAL);
  }
}

void GroupControl::Propose(const absl::Status& reason) {
  proposal_ = absl::Status(reason.code(), reason.message().substr(0, kMaxMessage));
  proposed_by_ = rank_;
  Tell(EncodeFrame(kAbort, proposal_, rank_));
  const Deadline deadline(kDeliver);
  for (const Peer& peer : peers_) {
    int queued = 0;
    while (!peer.closed && ioctl(peer.socket.fd(), SIOCOUTQ, &queued) == 0 && queued > 0 && !deadline.Passed()) {
      absl::SleepFor(absl::Microseconds(200));
    }
  }
}

void GroupControl::Settle() {
  if (failed() || proposal_.ok()) return;
  for (const Deadline deadline(kSettle); !deadline.Passed();) ReadNews(deadline);
  error_ = proposal_;
  // Passed on, in case the rank whose reason it is died while it told the others, and before this rank closes.
  if (proposed_by_ != rank_) Tell(EncodeFrame(kAbort, error_, proposed_by_));
  const uint64_t one = 1;
  (void)!write(wake_.fd(), &one, sizeof(one));
  if (on_failure_) on_failure_();
}

}  // namespace soloist
