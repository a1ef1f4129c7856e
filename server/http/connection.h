// One HTTP/1.1 connection: reads requests one after another, hands each to the handler, writes its answer.
#ifndef SOLOIST_SERVER_HTTP_CONNECTION_H_
#define SOLOIST_SERVER_HTTP_CONNECTION_H_

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "boost/asio/basic_waitable_timer.hpp"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/strand.hpp"
#include "boost/beast/core/flat_buffer.hpp"
#include "boost/beast/http/parser.hpp"
#include "boost/beast/http/string_body.hpp"
#include "server/http/exchange.h"
#include "server/http/http_server.h"

namespace soloist {

class Connection;

// What the connections of a server share. Thread-safe.
struct ConnectionContext {
  HttpServerOptions options;
  HttpServer::Handler handler;
  HttpServer::ErrorMaker error_maker;
  std::atomic<bool> draining{false};   // answers close their connections
  std::atomic<int64_t> held_bytes{0};  // of requests' bodies

  mutable std::mutex mutex;
  std::condition_variable changed;
  std::unordered_map<Connection*, std::weak_ptr<Connection>> connections;  // mutex

  std::vector<std::shared_ptr<Connection>> Alive() const {
    const std::lock_guard lock(mutex);
    std::vector<std::shared_ptr<Connection>> alive;
    for (const auto& [raw, weak] : connections) {
      if (auto connection = weak.lock()) alive.push_back(std::move(connection));
    }
    return alive;
  }
};

// One connection's part of a sum over all.
class HeldBytes {
 public:
  explicit HeldBytes(std::atomic<int64_t>& sum) : sum_(sum) {}
  ~HeldBytes() { Set(0); }
  HeldBytes(const HeldBytes&) = delete;
  HeldBytes& operator=(const HeldBytes&) = delete;
  // The new sum.
  int64_t Set(int64_t bytes) {
    const int64_t more = bytes - std::exchange(own_, bytes);
    return sum_.fetch_add(more) + more;
  }

 private:
  std::atomic<int64_t>& sum_;
  int64_t own_ = 0;
};

class Connection final : public HttpExchange, public std::enable_shared_from_this<Connection> {
 public:
  using Strand = boost::asio::strand<boost::asio::io_context::executor_type>;
  using Socket = boost::asio::basic_stream_socket<boost::asio::ip::tcp, Strand>;

  Connection(std::shared_ptr<ConnectionContext> context, Socket socket);
  ~Connection() override;

  // One of the two, once; from any thread. Refuse: an error of this status, whatever is asked.
  void Start();
  void Refuse(int status, const std::string& message);
  // Any thread. Drain: closes after the answer that is being made, at once if there is none.
  void Drain();
  void Abort();

  void Post(std::function<void()> job) override;
  HttpRequest& request() override { return request_; }
  void AddHeader(std::string_view name, std::string_view value) override;
  void Listen(std::shared_ptr<Listener> listener) override;
  void Respond(HttpResponse response) override;
  void BeginStream(HttpResponse head, std::string_view heartbeat, absl::Duration heartbeat_every) override;
  bool started() const override { return started_; }
  std::string& buffer() override { return body_; }
  void Flush(bool last) override;
  void LimitWriting(absl::Duration limit) override { SetDeadline(limit); }

 private:
  using Clock = std::chrono::steady_clock;
  using Parser = boost::beast::http::request_parser<boost::beast::http::string_body>;
  enum class State { kIdle, kHeader, kBody, kHandling, kLingering };
  enum class Writing { kNothing, kInterim, kPiece, kHeartbeat };

  void Register();
  void ExpectRequest(absl::Duration deadline);
  void Read();
  void OnRead(const boost::system::error_code& error, size_t bytes);
  void Parse();
  void OnHeader();
  void DropBody() {
    parser_.reset();
    held_.Set(0);
  }
  void Dispatch();
  void RespondError(int status, const std::string& message);
  void SetHead(const HttpResponse& response, bool chunked, std::optional<size_t> content_length);
  void Write();
  void OnWritten(const boost::system::error_code& error, Writing what);
  void FinishExchange();
  void Linger();
  void Break();
  void SetDeadline(absl::Duration from_now);
  void ArmTimer();
  void OnTimer();

  const std::shared_ptr<ConnectionContext> context_;
  Socket socket_;
  boost::asio::basic_waitable_timer<Clock, boost::asio::wait_traits<Clock>, Strand> timer_;
  std::optional<Clock::time_point> armed_, deadline_;

  State state_ = State::kIdle;
  bool reading_ = false, broken_ = false;
  // A read goes on while what came before it is parsed, and in_ moves its bytes when it is consumed.
  std::array<char, 16 << 10> arriving_;
  boost::beast::flat_buffer in_;
  std::optional<Parser> parser_;
  HttpRequest request_;
  size_t header_bytes_ = 0;
  HeldBytes held_{context_->held_bytes};
  bool header_seen_ = false, is_head_ = false, is_http10_ = false, close_after_ = false;

  std::shared_ptr<Listener> listener_;
  Writing writing_ = Writing::kNothing;
  bool interim_ = false;    // "100 Continue" is to be sent
  bool flush_ = false;      // body_ is to be sent
  bool last_ = false;       // and ends the answer
  bool streaming_ = false;  // BeginStream was called
  bool chunked_ = false;
  bool started_ = false;
  bool heartbeat_due_ = false;
  std::string head_;  // to be sent before anything else of the answer
  std::string more_headers_;
  std::string body_;
  std::string chunk_size_;
  std::string heartbeat_;
  Clock::duration heartbeat_every_{};
  Clock::time_point last_written_, linger_until_;
};

}  // namespace soloist

#endif  // SOLOIST_SERVER_HTTP_CONNECTION_H_
