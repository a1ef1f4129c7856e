#include "engine/comm/tcp_socket.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "base/status.h"

namespace soloist {
namespace {

constexpr int kBacklog = 256;  // two connections of each of 64 ranks, and some strangers
constexpr int kMaxPort = 65535;

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

// `service` is a port, or null.
absl::StatusOr<AddressList> Resolve(const std::string& host, const char* service) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = service != nullptr ? AI_NUMERICSERV : 0;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), service, &hints, &found); error != 0) {
    return NotFound("{} does not resolve: {}", host, gai_strerror(error));
  }
  return AddressList(found, freeaddrinfo);
}

std::string Numeric(const sockaddr* address) {
  char text[NI_MAXHOST] = "";
  const socklen_t bytes = address->sa_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
  getnameinfo(address, bytes, text, sizeof(text), nullptr, 0, NI_NUMERICHOST);
  return text;
}

Socket NewSocket(int family) {
  Socket socket(::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const int on = 1;
  if (socket.valid()) setsockopt(socket.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  return socket;
}

// Whether an interface of this host has it.
bool IsLocal(const addrinfo& address) {
  const Socket socket = NewSocket(address.ai_family);
  return socket.valid() && bind(socket.fd(), address.ai_addr, address.ai_addrlen) == 0;
}

// The address of `name`, or of the first interface that is up where it is empty; IPv4 before IPv6. Empty: none.
std::string InterfaceAddress(const std::string& name) {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return "";
  std::string found;
  for (const int family : {AF_INET, AF_INET6}) {
    for (const ifaddrs* entry = list; entry != nullptr && found.empty(); entry = entry->ifa_next) {
      if (entry->ifa_addr == nullptr || entry->ifa_addr->sa_family != family) continue;
      const bool usable = (entry->ifa_flags & IFF_UP) != 0 && (entry->ifa_flags & IFF_LOOPBACK) == 0;
      if (name.empty() ? !usable : name != entry->ifa_name) continue;
      const std::string address = Numeric(entry->ifa_addr);
      if (address.find('%') == std::string::npos) found = address;  // a link-local one means nothing elsewhere
    }
  }
  freeifaddrs(list);
  return found;
}

}  // namespace

Deadline::Deadline(absl::Duration from_now)
    : never_(from_now >= absl::Hours(24 * 365)),
      at_(std::chrono::steady_clock::now() +
          (never_ ? std::chrono::nanoseconds(0) : absl::ToChronoNanoseconds(from_now))) {}

absl::Duration Deadline::Left() const {
  if (never_) return absl::InfiniteDuration();
  return std::max(absl::ZeroDuration(), absl::FromChrono(at_ - std::chrono::steady_clock::now()));
}

int PollUntil(std::span<pollfd> entries, const Deadline& deadline) {
  while (true) {
    const absl::Duration left = deadline.Left();
    const timespec timeout = left == absl::InfiniteDuration() ? timespec{} : absl::ToTimespec(left);
    const int ready =
        ppoll(entries.data(), entries.size(), left == absl::InfiniteDuration() ? nullptr : &timeout, nullptr);
    if (ready >= 0 || errno != EINTR) return std::max(ready, 0);
  }
}

Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

absl::Status SendAll(const Socket& socket, std::span<const char> bytes, const Deadline& deadline) {
  while (!bytes.empty()) {
    const ssize_t sent = send(socket.fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent >= 0) {
      bytes = bytes.subspan(static_cast<size_t>(sent));
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return Unavailable("{}", strerror(errno));
    pollfd entry = {.fd = socket.fd(), .events = POLLOUT, .revents = 0};
    if (PollUntil({&entry, 1}, deadline) == 0) return DeadlineExceeded("the peer does not read");
  }
  return absl::OkStatus();
}

absl::Status ReceiveAll(const Socket& socket, std::span<char> bytes, const Deadline& deadline) {
  while (!bytes.empty()) {
    const ssize_t got = recv(socket.fd(), bytes.data(), bytes.size(), 0);
    if (got > 0) {
      bytes = bytes.subspan(static_cast<size_t>(got));
      continue;
    }
    if (got == 0) return Unavailable("the connection was closed");
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return Unavailable("{}", strerror(errno));
    pollfd entry = {.fd = socket.fd(), .events = POLLIN, .revents = 0};
    if (PollUntil({&entry, 1}, deadline) == 0) return DeadlineExceeded("the peer does not answer");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ListenAddress(const std::string& host, const std::string& interface) {
  if (!interface.empty()) {
    std::string address = InterfaceAddress(interface);
    if (address.empty()) return NotFound("this host has no interface {} with an address", interface);
    return address;
  }
  if (host.empty()) {
    std::string address = InterfaceAddress("");
    return address.empty() ? "127.0.0.1" : address;
  }
  ASSIGN_OR_RETURN(const AddressList list, Resolve(host, nullptr));
  for (const addrinfo* entry = list.get(); entry != nullptr; entry = entry->ai_next) {
    if (IsLocal(*entry)) return Numeric(entry->ai_addr);
  }
  return list->ai_family == AF_INET6 ? "::" : "0.0.0.0";
}

absl::StatusOr<Listener> Listen(const std::string& address, int port_begin, int port_end) {
  if (port_begin < 0 || port_end > kMaxPort || port_begin > port_end || (port_begin == 0 && port_end != 0)) {
    return InvalidArgument("ports {} to {} are no range within 1 to {}", port_begin, port_end, kMaxPort);
  }
  int error = 0;
  for (int port = port_begin; port <= port_end; ++port) {
    ASSIGN_OR_RETURN(const AddressList list, Resolve(address, std::to_string(port).c_str()));
    Listener listener = {.socket = NewSocket(list->ai_family), .port = port};
    const int on = 1;
    setsockopt(listener.socket.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    // Two that have not begun to listen may be bound to one port: listen decides.
    if (bind(listener.socket.fd(), list->ai_addr, list->ai_addrlen) != 0 ||
        listen(listener.socket.fd(), kBacklog) != 0) {
      error = errno;
      if (error != EADDRINUSE && error != EACCES) break;
      continue;
    }
    sockaddr_storage bound{};
    socklen_t bytes = sizeof(bound);
    getsockname(listener.socket.fd(), reinterpret_cast<sockaddr*>(&bound), &bytes);
    listener.port = ntohs(bound.ss_family == AF_INET ? reinterpret_cast<const sockaddr_in&>(bound).sin_port
                                                     : reinterpret_cast<const sockaddr_in6&>(bound).sin6_port);
    return listener;
  }
  return ResourceExhausted("no port of {} to {} on {} can be listened on: {}", port_begin, port_end, address,
                           strerror(error));
}

absl::StatusOr<Socket> Dial(const std::string& host, int port, const Deadline& deadline) {
  ASSIGN_OR_RETURN(const AddressList list, Resolve(host, std::to_string(port).c_str()));
  absl::Status failure;
  for (const addrinfo* entry = list.get(); entry != nullptr; entry = entry->ai_next) {
    Socket socket = NewSocket(entry->ai_family);
    int error = connect(socket.fd(), entry->ai_addr, entry->ai_addrlen) == 0 ? 0 : errno;
    if (error == EINPROGRESS) {
      pollfd ready = {.fd = socket.fd(), .events = POLLOUT, .revents = 0};
      if (PollUntil({&ready, 1}, deadline) == 0) {
        return DeadlineExceeded("{} port {} does not answer", Numeric(entry->ai_addr), port);
      }
      socklen_t bytes = sizeof(error);
      getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &bytes);
    }
    if (error == 0) return socket;
    failure = Unavailable("{} port {}: {}", Numeric(entry->ai_addr), port, strerror(error));
  }
  return failure;
}

absl::StatusOr<Socket> Accept(const Socket& listener) {
  Socket socket(accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (!socket.valid()) {
    if (errno == EMFILE || errno == ENFILE) return ResourceExhausted("accept: {}", strerror(errno));
    return Unavailable("accept: {}", strerror(errno));
  }
  const int on = 1;
  setsockopt(socket.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  return socket;
}

}  // namespace soloist
