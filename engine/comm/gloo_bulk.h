// GlooBulk: moves large payloads through Gloo's TCP transport: unbound buffers, a pair of sockets per peer. Private to
// engine/comm.
//
// Why only payloads, and only large ones: Gloo 20220518 asks before it sends (three messages and two changes of thread
// per payload), ends the process from its own thread when a message is longer than the buffer that waits for it, does
// not wake a receive from any rank when a peer dies, and cannot listen in a range of ports. So frame_exchange.h brings
// the headers, and both sides know that their sizes agree before Gloo sees anything. In exchange Gloo receives on a
// thread of its own, beside the one that sends.
#ifndef SOLOIST_ENGINE_COMM_GLOO_BULK_H_
#define SOLOIST_ENGINE_COMM_GLOO_BULK_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/comm/bootstrap.h"
#include "engine/comm/tcp_socket.h"

namespace gloo::transport {
class Context;
class Device;
class UnboundBuffer;
}  // namespace gloo::transport

namespace soloist {

// What one rank exchanges with one peer.
struct ExchangePart {
  int peer = 0;
  const char* send = nullptr;
  int64_t send_bytes = 0;
  char* recv = nullptr;
  int64_t recv_bytes = 0;
};

class GlooBulk {
 public:
  // Listens on `address` (numeric, of this host), one port per peer that the system chooses. Errors as ConnectMesh.
  static absl::StatusOr<std::unique_ptr<GlooBulk>> Create(int rank, int size, BootstrapStore& store,
                                                          const std::string& address, absl::Duration timeout);
  ~GlooBulk();

  // Exchanges the payloads of `parts` (of 0 bytes: none), whose sizes are known to agree. `slot` is the same on both
  // sides and never used again. On OK the peers' bytes are here and this rank's are in the kernel. DEADLINE_EXCEEDED
  // sets `missing` to the ranks whose bytes have not come; CANCELLED after Interrupt; UNAVAILABLE with Gloo's words
  // when a connection breaks. After an error nothing touches the buffers and the object is of no further use.
  absl::Status Exchange(uint64_t slot, std::span<const ExchangePart> parts, const Deadline& deadline,
                        std::vector<int>* missing);

  // From any thread: ends Exchange, now and in future, here and (their connections break) on the peers.
  void Interrupt();

 private:
  GlooBulk(int rank, int size);
  absl::Status Connect(BootstrapStore& store, const std::string& address, absl::Duration timeout);
  absl::Status Wait(std::span<const ExchangePart> parts, const Deadline& deadline, std::vector<int>* missing);
  // Makes the buffers of the current exchange known to Interrupt. False if there has been one.
  bool SetBuffers(std::unique_ptr<gloo::transport::UnboundBuffer> in,
                  std::unique_ptr<gloo::transport::UnboundBuffer> out);

  const int rank_, size_;
  std::shared_ptr<gloo::transport::Device> device_;  // outlives the context
  std::shared_ptr<gloo::transport::Context> context_;

  std::mutex mutex_;
  bool interrupted_ = false;
  // Of the current exchange; null where there is none. Made and destroyed by the thread that is in it, under mutex_.
  std::unique_ptr<gloo::transport::UnboundBuffer> in_, out_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_COMM_GLOO_BULK_H_
