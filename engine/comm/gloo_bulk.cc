#include "engine/comm/gloo_bulk.h"

#include <gloo/transport/address.h>
#include <gloo/transport/context.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace soloist {
namespace {

using std::chrono::milliseconds;

// Keeps SIGPIPE from this thread, and from the threads that it starts, while it lives: Gloo writes to connections that
// may be broken without asking for an error code instead.
class NoSigpipe {
 public:
  NoSigpipe() {
    sigemptyset(&sigpipe_);
    sigaddset(&sigpipe_, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &sigpipe_, &before_);
  }
  ~NoSigpipe() {
    if (sigismember(&before_, SIGPIPE) != 0) return;
    // One that is pending would strike as soon as it is let through.
    const timespec at_once{};
    while (sigtimedwait(&sigpipe_, nullptr, &at_once) == SIGPIPE) continue;
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  NoSigpipe(const NoSigpipe&) = delete;
  NoSigpipe& operator=(const NoSigpipe&) = delete;

 private:
  sigset_t sigpipe_, before_;
};

// Runs `body`, which calls Gloo: what it throws is UNAVAILABLE.
template <typename Body>
absl::Status Guard(Body body) {
  const NoSigpipe no_sigpipe;
  try {
    body();
    return absl::OkStatus();
  } catch (const std::exception& error) {
    return Unavailable("Gloo: {}", error.what());
  }
}

std::string Key(int rank) { return absl::StrCat("gloo/pairs/", rank); }

// Gloo takes 0 for no limit at all, and adds what it gets to the time of day.
milliseconds GlooTimeout(absl::Duration timeout) {
  const absl::Duration bounded = std::clamp(timeout, absl::Milliseconds(1), absl::Hours(100));
  return milliseconds(absl::ToInt64Milliseconds(absl::Ceil(bounded, absl::Milliseconds(1))));
}

// One Gloo buffer covers all places that are received into (or sent from), so that one wait sees every connection.
struct Region {
  char* begin = nullptr;
  char* end = nullptr;
  void Add(const char* data, int64_t bytes) {
    if (bytes == 0) return;
    char* const first = const_cast<char*>(data);
    begin = begin == nullptr ? first : std::min(begin, first);
    end = std::max(end, first + bytes);
  }
  size_t bytes() const { return static_cast<size_t>(end - begin); }
};

}  // namespace

GlooBulk::GlooBulk(int rank, int size) : rank_(rank), size_(size) {}

GlooBulk::~GlooBulk() {
  // In this order, and never throwing.
  (void)Guard([&] {
    context_.reset();
    device_.reset();
  });
}

absl::StatusOr<std::unique_ptr<GlooBulk>> GlooBulk::Create(int rank, int size, BootstrapStore& store,
                                                           const std::string& address, absl::Duration timeout) {
  std::unique_ptr<GlooBulk> bulk(new GlooBulk(rank, size));
  RETURN_IF_ERROR(bulk->Connect(store, address, timeout));
  return bulk;
}

absl::Status GlooBulk::Connect(BootstrapStore& store, const std::string& address, absl::Duration timeout) {
  const Deadline deadline(timeout);
  std::string published;
  size_t address_bytes = 0;  // the same for all
  RETURN_IF_ERROR(Guard([&] {
    device_ = gloo::transport::tcp::CreateDevice(address.c_str());
    context_ = device_->createContext(rank_, size_);
    // connect waits five times as long as it is told.
    context_->setTimeout(GlooTimeout(timeout / 5));
    std::vector<std::vector<char>> addresses;
    for (int peer = 0; peer < size_; ++peer) {
      addresses.emplace_back();
      if (peer != rank_) addresses.back() = context_->createPair(peer)->address().bytes();
      address_bytes = std::max(address_bytes, addresses.back().size());
    }
    for (std::vector<char>& bytes : addresses) {
      bytes.resize(address_bytes);
      published.append(bytes.data(), bytes.size());
    }
  }));
  RETURN_IF_ERROR(store.Set(Key(rank_), published));
  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank_) continue;
    const absl::StatusOr<std::string> its = store.Get(Key(peer), deadline.Left());
    RETURN_IF_ERROR(Annotate(its.status(), fmt::format("waiting for Gloo's addresses of rank {}", peer)));
    if (its->size() != published.size()) {
      return Internal("Gloo's addresses of rank {} have {} bytes, those of rank {} {}", peer, its->size(), rank_,
                      published.size());
    }
    const auto begin = its->begin() + static_cast<int64_t>(address_bytes) * rank_;
    const std::vector<char> bytes(begin, begin + static_cast<int64_t>(address_bytes));
    const absl::Status connected = Guard([&] { context_->getPair(peer)->connect(bytes); });
    RETURN_IF_ERROR(Annotate(connected, fmt::format("rank {} connects to rank {}", rank_, peer)));
  }
  return absl::OkStatus();
}

bool GlooBulk::SetBuffers(std::unique_ptr<gloo::transport::UnboundBuffer> in,
                          std::unique_ptr<gloo::transport::UnboundBuffer> out) {
  {
    const std::lock_guard lock(mutex_);
    std::swap(in_, in);
    std::swap(out_, out);
    if (!interrupted_) return true;
  }
  // The old ones are destroyed here, without the lock: that waits until Gloo's thread has let go of them.
  return false;
}

absl::Status GlooBulk::Exchange(uint64_t slot, std::span<const ExchangePart> parts, const Deadline& deadline,
                                std::vector<int>* missing) {
  Region in, out;
  for (const ExchangePart& part : parts) {
    in.Add(part.recv, part.recv_bytes);
    out.Add(part.send, part.send_bytes);
  }
  bool interrupted = false;
  absl::Status status = Guard([&] {
    interrupted = !SetBuffers(context_->createUnboundBuffer(in.begin, in.bytes()),
                              context_->createUnboundBuffer(out.begin, out.bytes()));
    if (interrupted) return;
    for (const ExchangePart& part : parts) {
      if (part.recv_bytes == 0) continue;
      in_->recv(part.peer, slot, static_cast<size_t>(part.recv - in.begin), static_cast<size_t>(part.recv_bytes));
    }
    for (const ExchangePart& part : parts) {
      if (part.send_bytes == 0) continue;
      out_->send(part.peer, slot, static_cast<size_t>(part.send - out.begin), static_cast<size_t>(part.send_bytes));
    }
  });
  if (status.ok()) status = interrupted ? absl::CancelledError("interrupted") : Wait(parts, deadline, missing);
  (void)Guard([&] { SetBuffers(nullptr, nullptr); });
  return status;
}

absl::Status GlooBulk::Wait(std::span<const ExchangePart> parts, const Deadline& deadline, std::vector<int>* missing) {
  std::vector<bool> receives(static_cast<size_t>(size_)), sends(static_cast<size_t>(size_));
  for (const ExchangePart& part : parts) {
    receives[part.peer] = part.recv_bytes > 0;
    sends[part.peer] = part.send_bytes > 0;
  }
  bool completed = true;
  const absl::Status status = Guard([&] {
    int peer = 0;
    for (auto left = std::count(receives.begin(), receives.end(), true); left > 0 && completed; --left) {
      completed = in_->waitRecv(&peer, GlooTimeout(deadline.Left()));
      if (completed) receives[peer] = false;
    }
    for (auto left = std::count(sends.begin(), sends.end(), true); left > 0 && completed; --left) {
      completed = out_->waitSend(&peer, GlooTimeout(deadline.Left()));
      if (completed) sends[peer] = false;
    }
  });
  if (status.ok()) return completed ? status : absl::CancelledError("interrupted");
  if (!deadline.Passed()) return status;
  for (int peer = 0; peer < size_; ++peer) {
    if (receives[peer] || sends[peer]) missing->push_back(peer);
  }
  return absl::DeadlineExceededError("");
}

void GlooBulk::Interrupt() {
  const std::lock_guard lock(mutex_);
  interrupted_ = true;
  (void)Guard([&] {
    if (in_ != nullptr) in_->abortWaitRecv();
    if (out_ != nullptr) out_->abortWaitSend();
  });
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) (void)Guard([&] { context_->getPair(peer)->close(); });
  }
}

}  // namespace soloist
