// TCP sockets as the ranks of a communicator need them: which address to listen on, a listener in a range of ports, and
// dialling with a deadline. Private to engine/comm.
#ifndef SOLOIST_ENGINE_COMM_TCP_SOCKET_H_
#define SOLOIST_ENGINE_COMM_TCP_SOCKET_H_

#include <poll.h>

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace soloist {

// A point on the monotonic clock, or never.
class Deadline {
 public:
  explicit Deadline(absl::Duration from_now);
  bool Passed() const { return Left() <= absl::ZeroDuration(); }
  absl::Duration Left() const;  // not negative; InfiniteDuration for never

 private:
  bool never_;
  std::chrono::steady_clock::time_point at_;
};

// poll(2) that ends at `deadline` at the latest. The number of ready entries; 0 when the deadline has passed.
int PollUntil(std::span<pollfd> entries, const Deadline& deadline);

// Owns a file descriptor. Every socket made here is non-blocking, is not inherited by child processes, and sends at
// once (TCP_NODELAY).
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket();

  int fd() const { return fd_; }
  bool valid() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// Sends and receives whole, small messages by `deadline`. UNAVAILABLE when the peer has closed, else the errno's text.
absl::Status SendAll(const Socket& socket, std::span<const char> bytes, const Deadline& deadline);
absl::Status ReceiveAll(const Socket& socket, std::span<char> bytes, const Deadline& deadline);

// The numeric address of this host to listen on. `interface` (a name such as eth0), if given, decides; else what `host`
// (a name or an address) resolves to, or all addresses ("0.0.0.0" or "::") if it is none of this host's; with neither,
// that of the first interface that is up and not the loopback, or 127.0.0.1. NOT_FOUND names the interface or the host.
absl::StatusOr<std::string> ListenAddress(const std::string& host, const std::string& interface);

struct Listener {
  Socket socket;
  int port = 0;
};
// Listens on the first free port of port_begin .. port_end, both included; any where both are 0. RESOURCE_EXHAUSTED if
// none is free, INVALID_ARGUMENT for what is no range.
absl::StatusOr<Listener> Listen(const std::string& address, int port_begin, int port_end);

// Connects. UNAVAILABLE or DEADLINE_EXCEEDED with host, port and reason.
absl::StatusOr<Socket> Dial(const std::string& host, int port, const Deadline& deadline);

// The next connection. UNAVAILABLE if there is none (any more), RESOURCE_EXHAUSTED if no file can be opened.
absl::StatusOr<Socket> Accept(const Socket& listener);

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_TCP_SOCKET_H_
