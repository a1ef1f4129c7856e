// MessageStream: one end of the stream between leader and worker, over gRPC's bidirectional reactor of either side. One
// write is in flight; what else is sent waits in order.
//
// gRPC's rules: no StartWrite after the end was asked for, no touch after OnDone. gRPC calls are made outside the
// mutex, since they may run reactions at once; `writing_` keeps writes one at a time.
#ifndef SOLOIST_ENGINE_CLUSTER_MESSAGE_STREAM_H_
#define SOLOIST_ENGINE_CLUSTER_MESSAGE_STREAM_H_

#include <deque>
#include <mutex>
#include <utility>

#include "grpcpp/support/byte_buffer.h"

namespace soloist {

// Reactor: grpc::ServerBidiReactor or grpc::ClientBidiReactor of <ByteBuffer, ByteBuffer>.
template <typename Reactor>
class MessageStream : public Reactor {
 public:
  // Any thread. Puts the message behind those before it, without calling gRPC (locks may be held); Flush writes. After
  // the end nothing is kept.
  void Enqueue(const grpc::ByteBuffer& message) {
    const std::lock_guard lock(mutex_);
    if (!ending_ && !broken_) queue_.push_back(message);
  }
  // Any thread, no lock held.
  void Flush() { Continue(/*write_done=*/false); }
  void Send(const grpc::ByteBuffer& message) {
    Enqueue(message);
    Flush();
  }
  // The stream ends once all that was sent has been written.
  void EndAfterWrites() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    Flush();
  }

  void OnWriteDone(bool ok) override {
    if (!ok) MarkBroken();
    Continue(/*write_done=*/true);
  }
  void OnReadDone(bool ok) override {
    if (ok) {
      OnMessage(incoming_);
      incoming_.Clear();
      this->StartRead(&incoming_);
      return;
    }
    MarkBroken();
    Flush();
  }

 protected:
  void StartReading() { this->StartRead(&incoming_); }
  // Nothing more is written.
  void MarkBroken() {
    const std::lock_guard lock(mutex_);
    broken_ = true;
  }
  bool broken() const {
    const std::lock_guard lock(mutex_);
    return broken_;
  }

  // One at a time, in order.
  virtual void OnMessage(grpc::ByteBuffer& message) = 0;
  // Called once, with no write outstanding: everything was written, or the stream is broken.
  virtual void OnWritesEnded(bool broken) = 0;

 private:
  void Continue(bool write_done) {
    bool write = false, ended = false, broken = false;
    {
      const std::lock_guard lock(mutex_);
      if (write_done) {
        queue_.pop_front();
        writing_ = false;
      }
      if (writing_ || ended_) return;
      broken = broken_;
      write = writing_ = !queue_.empty() && !broken_;
      ended = ended_ = !write && (ending_ || broken_);
    }
    if (write) this->StartWrite(&queue_.front());
    if (ended) OnWritesEnded(broken);
  }

  mutable std::mutex mutex_;
  std::deque<grpc::ByteBuffer> queue_;  // the first is being written while writing_
  bool writing_ = false;
  bool ending_ = false;
  bool broken_ = false;
  bool ended_ = false;
  grpc::ByteBuffer incoming_;
};

}  // namespace soloist

#endif  // SOLOIST_ENGINE_CLUSTER_MESSAGE_STREAM_H_
