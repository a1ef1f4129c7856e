#include "engine/comm/tcp_mesh.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <span>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "base/status.h"

namespace soloist {
namespace {

constexpr uint32_t kMagic = 0x314C4F53;  // "SOL1"
// How often a rank that waits for connections looks whether the store has been closed.
constexpr absl::Duration kStorePeriod = absl::Milliseconds(50);
constexpr size_t kMaxUnknown = 256;  // connections that have not said who they are
enum Kind : uint32_t { kData = 0, kControl = 1 };

// What a dialling rank sends first, and gets back with its own token when it is accepted.
struct Hello {
  uint32_t magic = kMagic;
  uint32_t kind = kData;
  int32_t rank = -1;
  int32_t size = 0;
  uint64_t token = 0;  // of the rank that is dialled
};

struct PeerAddress {
  std::string host;
  int port = 0;
  uint64_t token = 0;
  std::string settings;
};

std::string Key(int rank) { return absl::StrCat("comm/address/", rank); }

absl::StatusOr<PeerAddress> ParseAddress(int rank, const std::string& value) {
  const std::vector<std::string> fields = absl::StrSplit(value, ' ');
  PeerAddress out;
  if (fields.size() != 4 || !absl::SimpleAtoi(fields[1], &out.port) || !absl::SimpleAtoi(fields[2], &out.token)) {
    return Internal("the address of rank {} is not to be understood: {}", rank, value.substr(0, 200));
  }
  out.host = fields[0];
  out.settings = fields[3];
  return out;
}

std::string RankList(const std::vector<int>& ranks) {
  std::string out;
  for (const int rank : ranks) absl::StrAppend(&out, out.empty() ? "" : ", ", "rank ", rank);
  return out;
}

class MeshBuilder {
 public:
  MeshBuilder(int rank, int size, BootstrapStore& store, const MeshOptions& options)
      : rank_(rank), size_(size), store_(store), options_(options), deadline_(options.timeout), token_(NewToken()) {
    mesh_.data.resize(static_cast<size_t>(size));
    mesh_.control.resize(static_cast<size_t>(size));
  }

  absl::StatusOr<Mesh> Build() {
    RETURN_IF_ERROR(Publish());
    RETURN_IF_ERROR(FetchAddresses());
    for (int peer = 0; peer < rank_; ++peer) RETURN_IF_ERROR(DialPeer(peer));
    RETURN_IF_ERROR(AcceptPeers());
    for (int peer = 0; peer < rank_; ++peer) RETURN_IF_ERROR(AwaitAnswer(peer));
    return std::move(mesh_);
  }

 private:
  // A connection that has been accepted and has not said yet who it is.
  struct Unknown {
    Socket socket;
    char hello[sizeof(Hello)] = {};
    size_t bytes = 0;
  };

  static uint64_t NewToken() {
    std::random_device random;
    return (static_cast<uint64_t>(random()) << 32) | random();
  }

  Socket& SocketOf(int peer, uint32_t kind) { return kind == kData ? mesh_.data[peer] : mesh_.control[peer]; }

  absl::Status Publish() {
    ASSIGN_OR_RETURN(mesh_.listen_address, ListenAddress(options_.host, options_.interface));
    ASSIGN_OR_RETURN(listener_, Listen(mesh_.listen_address, options_.port_begin, options_.port_end));
    const std::string& host = options_.host.empty() ? mesh_.listen_address : options_.host;
    return Annotate(
        store_.Set(Key(rank_), absl::StrCat(host, " ", listener_.port, " ", token_, " ", options_.settings)),
        fmt::format("publishing the address of rank {}", rank_));
  }

  absl::Status FetchAddresses() {
    std::vector<int> missing;
    for (int peer = 0; peer < size_; ++peer) {
      peers_.emplace_back();
      if (peer == rank_) continue;
      // Once one has not come in time, only who else is missing is still of interest.
      const absl::StatusOr<std::string> value = store_.Get(Key(peer), deadline_.Left());
      if (absl::IsDeadlineExceeded(value.status())) {
        missing.push_back(peer);
        continue;
      }
      RETURN_IF_ERROR(Annotate(value.status(), fmt::format("waiting for the address of rank {}", peer)));
      ASSIGN_OR_RETURN(peers_.back(), ParseAddress(peer, *value));
      if (peers_.back().settings != options_.settings) {
        return FailedPrecondition("rank {} joins with {}, rank {} with {}", rank_, options_.settings, peer,
                                  peers_.back().settings);
      }
    }
    if (missing.empty()) return absl::OkStatus();
    return DeadlineExceeded("after {} rank {} still waits for {} to join the communicator",
                            absl::FormatDuration(options_.timeout), rank_, RankList(missing));
  }

  absl::Status DialPeer(int peer) {
    for (const Kind kind : {kData, kControl}) {
      absl::StatusOr<Socket> socket = Dial(peers_[peer].host, peers_[peer].port, deadline_);
      absl::Status status = socket.status();
      if (status.ok()) {
        const Hello hello = {.kind = kind, .rank = rank_, .size = size_, .token = peers_[peer].token};
        status = SendAll(*socket, {reinterpret_cast<const char*>(&hello), sizeof(hello)}, deadline_);
        SocketOf(peer, kind) = *std::move(socket);
      }
      RETURN_IF_ERROR(Annotate(status, fmt::format("rank {} connects to rank {}", rank_, peer)));
    }
    return absl::OkStatus();
  }

  absl::Status AwaitAnswer(int peer) {
    for (const Kind kind : {kData, kControl}) {
      Hello answer;
      pollfd entry = {.fd = SocketOf(peer, kind).fd(), .events = POLLIN, .revents = 0};
      absl::Status status = PollWhileOpen({&entry, 1});
      if (status.ok()) {
        status = ReceiveAll(SocketOf(peer, kind), {reinterpret_cast<char*>(&answer), sizeof(answer)}, deadline_);
      }
      RETURN_IF_ERROR(Annotate(status, fmt::format("rank {} waits to be accepted by rank {}", rank_, peer)));
      if (answer.magic != kMagic || answer.rank != peer || answer.token != token_) {
        return Internal("rank {} was answered by somebody else than rank {} at {} port {}", rank_, peer,
                        peers_[peer].host, peers_[peer].port);
      }
    }
    return absl::OkStatus();
  }

  // Polls until something is ready, the time is over, or the store has been closed, whose status is returned then.
  absl::Status PollWhileOpen(std::span<pollfd> entries) {
    while (PollUntil(entries, Deadline(std::min(kStorePeriod, deadline_.Left()))) == 0) {
      if (deadline_.Passed()) return absl::DeadlineExceededError("no answer in time");
      const absl::Status open = store_.Get(Key(rank_), absl::ZeroDuration()).status();
      if (!open.ok() && !absl::IsDeadlineExceeded(open)) return open;
    }
    return absl::OkStatus();
  }

  // The ranks above this one that have not connected yet.
  std::vector<int> Awaited() const {
    std::vector<int> out;
    for (int peer = rank_ + 1; peer < size_; ++peer) {
      if (!mesh_.data[peer].valid() || !mesh_.control[peer].valid()) out.push_back(peer);
    }
    return out;
  }

  absl::Status AcceptPeers() {
    while (true) {
      const std::vector<int> awaited = Awaited();
      if (awaited.empty()) return absl::OkStatus();
      std::vector<pollfd> entries = {{.fd = listener_.socket.fd(), .events = POLLIN, .revents = 0}};
      for (const Unknown& unknown : unknown_) {
        entries.push_back({.fd = unknown.socket.fd(), .events = POLLIN, .revents = 0});
      }
      const absl::Status polled = PollWhileOpen(entries);
      if (absl::IsDeadlineExceeded(polled)) {
        return DeadlineExceeded("after {} rank {} still waits for a connection from {}",
                                absl::FormatDuration(options_.timeout), rank_, RankList(awaited));
      }
      RETURN_IF_ERROR(polled);
      std::vector<Unknown> still_unknown;
      for (size_t i = 0; i < unknown_.size(); ++i) {
        const bool keep = entries[i + 1].revents == 0 || ReadHello(unknown_[i]);
        if (keep) still_unknown.push_back(std::move(unknown_[i]));
      }
      unknown_ = std::move(still_unknown);
      if (entries[0].revents == 0) continue;
      absl::StatusOr<Socket> socket = Accept(listener_.socket);
      if (absl::IsResourceExhausted(socket.status())) return socket.status();
      if (socket.ok() && unknown_.size() == kMaxUnknown) unknown_.erase(unknown_.begin());
      if (socket.ok()) unknown_.push_back({.socket = *std::move(socket)});
    }
  }

  // Whether `unknown` may still become a rank. One that has become one has given its socket away.
  bool ReadHello(Unknown& unknown) {
    const ssize_t got = recv(unknown.socket.fd(), unknown.hello + unknown.bytes, sizeof(Hello) - unknown.bytes, 0);
    if (got <= 0) return got < 0 && (errno == EAGAIN || errno == EINTR);
    unknown.bytes += static_cast<size_t>(got);
    if (unknown.bytes < sizeof(Hello)) return true;
    Hello hello;
    std::memcpy(&hello, unknown.hello, sizeof(hello));
    const bool known = hello.magic == kMagic && hello.token == token_ && hello.kind <= kControl &&
                       hello.size == size_ && hello.rank > rank_ && hello.rank < size_ &&
                       !SocketOf(hello.rank, hello.kind).valid();
    if (!known) return false;
    const Hello answer = {.kind = hello.kind, .rank = rank_, .size = size_, .token = peers_[hello.rank].token};
    if (!SendAll(unknown.socket, {reinterpret_cast<const char*>(&answer), sizeof(answer)}, deadline_).ok())
      return false;
    SocketOf(hello.rank, hello.kind) = std::move(unknown.socket);
    return false;
  }

  const int rank_, size_;
  BootstrapStore& store_;
  const MeshOptions& options_;
  const Deadline deadline_;
  const uint64_t token_;
  Listener listener_;
  std::vector<PeerAddress> peers_;
  std::vector<Unknown> unknown_;
  Mesh mesh_;
};

}  // namespace

absl::StatusOr<Mesh> ConnectMesh(int rank, int size, BootstrapStore& store, const MeshOptions& options) {
  CHECK(size >= 1 && rank >= 0 && rank < size);
  return MeshBuilder(rank, size, store, options).Build();
}

}  // namespace soloist
