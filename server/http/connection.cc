#include "server/http/connection.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <ctime>
#include <utility>

#include "boost/asio/buffer.hpp"
#include "boost/asio/post.hpp"
#include "boost/asio/write.hpp"
#include "boost/beast/http/error.hpp"
#include "boost/beast/http/status.hpp"
#include "fmt/chrono.h"
#include "fmt/format.h"

namespace soloist {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;

// Of requests that came before the answer to an earlier one; more is left in the socket.
constexpr size_t kMaxPipelinedBytes = 64 << 10;
// How long what a client still sends after its last answer is read and dropped: a reset could overtake the answer.
// The second: in all.
constexpr absl::Duration kLinger = absl::Seconds(2), kMaxLinger = absl::Seconds(20);
// What the socket may hold unsent: a reader that does not read is noticed, and the heap holds little for many.
constexpr int kUnsentBytes = 64 << 10;
// A complete answer of many bytes may take longer than the write timeout.
constexpr size_t kSlowestBytesPerSecond = 128 << 10;
constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
constexpr std::string_view kNewLine = "\r\n", kLastChunk = "\r\n0\r\n\r\n";
constexpr size_t kMaxRequestIdBytes = 256;

asio::const_buffer Buffer(std::string_view text) { return {text.data(), text.size()}; }

bool IsToken(std::string_view text) {
  return std::ranges::all_of(text, [](char c) { return c > ' ' && c <= '~'; });
}

std::pair<int, std::string> Explain(const boost::system::error_code& error, const HttpServerOptions& options) {
  if (error == http::error::header_limit) {
    return {431, fmt::format("the request's header has more than {} bytes", options.max_header_bytes)};
  }
  if (error == http::error::body_limit) {
    return {413, fmt::format("the request's body has more than {} bytes", options.max_body_bytes)};
  }
  return {400, "not a well-formed HTTP request: " + error.message()};
}

// Without scheme and authority (which a proxy may leave in) and without the query.
std::string PathOf(std::string_view target) {
  if (const size_t scheme = target.find("://"); scheme != std::string_view::npos && target.front() != '/') {
    const size_t slash = target.find('/', scheme + 3);
    target = slash == std::string_view::npos ? "/" : target.substr(slash);
  }
  return std::string(target.substr(0, target.find_first_of("?#")));
}

}  // namespace

Connection::Connection(std::shared_ptr<ConnectionContext> context, Socket socket)
    : context_(std::move(context)), socket_(std::move(socket)), timer_(socket_.get_executor()) {
  boost::system::error_code ignored;
  socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket_.set_option(asio::socket_base::keep_alive(true), ignored);
  setsockopt(socket_.native_handle(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &kUnsentBytes, sizeof(kUnsentBytes));
}

Connection::~Connection() {
  const std::lock_guard lock(context_->mutex);
  context_->connections.erase(this);
  context_->changed.notify_all();
}

void Connection::Register() {
  const std::lock_guard lock(context_->mutex);
  context_->connections.emplace(this, weak_from_this());
}

void Connection::Start() {
  Register();
  asio::post(socket_.get_executor(),
             [self = shared_from_this()] { self->ExpectRequest(self->context_->options.header_timeout); });
}

void Connection::Refuse(int status, const std::string& message) {
  Register();
  asio::post(socket_.get_executor(), [self = shared_from_this(), status, message] {
    self->RespondError(status, message);
    self->Read();
  });
}

void Connection::Drain() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    if (self->state_ == State::kIdle) self->Break();
  });
}

void Connection::Abort() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] { self->Break(); });
}

void Connection::Post(std::function<void()> job) {
  asio::post(socket_.get_executor(), [self = shared_from_this(), job = std::move(job)] { job(); });
}

// ---- Reading

void Connection::ExpectRequest(absl::Duration deadline) {
  state_ = State::kIdle;
  header_seen_ = is_head_ = is_http10_ = false;
  header_bytes_ = 0;
  request_ = {};
  held_.Set(0);
  more_headers_.clear();
  parser_.emplace();
  parser_->eager(true);
  parser_->header_limit(static_cast<uint32_t>(context_->options.max_header_bytes));
  parser_->body_limit(static_cast<uint64_t>(context_->options.max_body_bytes));
  SetDeadline(deadline);
  Parse();
}

void Connection::Read() {
  if (reading_ || broken_) return;
  if (state_ == State::kHandling && in_.size() >= kMaxPipelinedBytes) return;
  reading_ = true;
  socket_.async_read_some(asio::buffer(arriving_),
                          [self = shared_from_this()](const auto& error, size_t bytes) { self->OnRead(error, bytes); });
}

void Connection::OnRead(const boost::system::error_code& error, size_t bytes) {
  reading_ = false;
  if (broken_) return;
  if (error) return Break();
  in_.commit(asio::buffer_copy(in_.prepare(bytes), asio::buffer(arriving_, bytes)));
  if (state_ == State::kLingering) {
    in_.consume(in_.size());
    SetDeadline(std::min(kLinger, absl::FromChrono(linger_until_ - Clock::now())));
    return Read();
  }
  // Whoever waits for an answer may ask more meanwhile; reading on also tells when it goes away.
  if (state_ == State::kHandling) return Read();
  Parse();
}

void Connection::Parse() {
  while (!broken_ && state_ != State::kHandling && state_ != State::kLingering) {
    if (in_.size() == 0) return Read();
    if (state_ == State::kIdle) {
      state_ = State::kHeader;
      SetDeadline(context_->options.header_timeout);
    }
    boost::system::error_code error;
    const size_t consumed = parser_->put(in_.data(), error);
    in_.consume(consumed);
    // The parser's own limit is that of one field.
    if (!parser_->is_header_done()) header_bytes_ += consumed;
    if (static_cast<int64_t>(header_bytes_) > context_->options.max_header_bytes) error = http::error::header_limit;
    if (error && error != http::error::need_more) {
      const auto [status, message] = Explain(error, context_->options);
      RespondError(status, message);
      return Read();
    }
    if (parser_->is_header_done() && !header_seen_) OnHeader();
    if (state_ == State::kBody && held_.Set(std::ssize(parser_->get().body())) > context_->options.max_held_bytes) {
      RespondError(503, "the requests that are being read and handled fill the memory for them: try again later");
    }
    if (state_ != State::kHandling && parser_->is_done()) Dispatch();
    if (error == http::error::need_more) return Read();
  }
  Read();
}

void Connection::OnHeader() {
  header_seen_ = true;
  const auto& header = parser_->get();
  state_ = State::kBody;
  SetDeadline(context_->options.body_timeout);
  is_http10_ = header.version() < 11;
  is_head_ = header.method() == http::verb::head;
  close_after_ = !header.keep_alive();
  const auto field = [&](auto name) {
    const auto value = header[name];
    return std::string(value.data(), value.size());
  };
  request_.method = std::string(header.method_string());
  request_.path = PathOf({header.target().data(), header.target().size()});
  request_.content_type = field(http::field::content_type);
  request_.trace_parent = field("traceparent");
  request_.request_id = field("X-Request-Id");
  if (request_.request_id.size() > kMaxRequestIdBytes || !IsToken(request_.request_id)) request_.request_id.clear();
  request_.origin = field(http::field::origin);
  request_.preflight = header.count(http::field::access_control_request_method) > 0;
  if (!is_http10_ && header.count(http::field::host) != 1) {
    return RespondError(400, "the request has no Host header field, or several");
  }
  if (const std::string encoding = field(http::field::content_encoding); !encoding.empty() && encoding != "identity") {
    return RespondError(415, fmt::format("Content-Encoding is '{}', only identity is understood", encoding));
  }
  const std::string expect = field(http::field::expect);
  if (!expect.empty() && !parser_->is_done()) {
    interim_ = true;
    Write();
  }
}

void Connection::Dispatch() {
  state_ = State::kHandling;
  deadline_.reset();
  request_.body = std::move(parser_->get().body());
  context_->handler(shared_from_this());
}

// ---- Answering

void Connection::AddHeader(std::string_view name, std::string_view value) {
  more_headers_ += fmt::format("{}: {}\r\n", name, value);
}

void Connection::RespondError(int status, const std::string& message) {
  state_ = State::kHandling;
  close_after_ = true;
  DropBody();
  Respond(context_->error_maker(status, message));
}

void Connection::SetHead(const HttpResponse& response, bool chunked, std::optional<size_t> content_length) {
  if (context_->draining) close_after_ = true;
  head_ = fmt::format("HTTP/1.1 {} {}\r\nDate: {:%a, %d %b %Y %H:%M:%S} GMT\r\n", response.status,
                      std::string_view(http::obsolete_reason(static_cast<http::status>(response.status))),
                      fmt::gmtime(std::time(nullptr)));
  if (!response.content_type.empty()) head_ += fmt::format("Content-Type: {}\r\n", response.content_type);
  for (const auto& [name, value] : response.headers) head_ += fmt::format("{}: {}\r\n", name, value);
  head_ += more_headers_;
  if (chunked) head_ += "Transfer-Encoding: chunked\r\n";
  if (content_length.has_value()) head_ += fmt::format("Content-Length: {}\r\n", *content_length);
  if (close_after_) {
    head_ += "Connection: close\r\n";
  } else if (is_http10_) {
    head_ += "Connection: keep-alive\r\n";
  }
  head_ += "\r\n";
}

void Connection::Listen(std::shared_ptr<Listener> listener) {
  if (broken_) return listener->OnGone();
  listener_ = std::move(listener);
}

void Connection::Respond(HttpResponse response) {
  if (broken_) return;
  SetHead(response, false, response.status == 204 ? std::nullopt : std::optional(response.body.size()));
  body_ = is_head_ ? std::string() : std::move(response.body);
  streaming_ = chunked_ = false;
  Flush(true);
}

void Connection::BeginStream(HttpResponse head, std::string_view heartbeat, absl::Duration heartbeat_every) {
  if (broken_) return;
  chunked_ = !is_http10_;
  close_after_ = close_after_ || is_http10_;
  SetHead(head, chunked_, std::nullopt);
  streaming_ = true;
  heartbeat_ = heartbeat;
  heartbeat_every_ = absl::ToChronoNanoseconds(heartbeat_every);
  last_written_ = Clock::now();
  ArmTimer();
}

void Connection::Flush(bool last) {
  if (broken_) return;
  flush_ = true;
  last_ = last;
  if (last) SetDeadline(context_->options.write_timeout + absl::Seconds(body_.size() / kSlowestBytesPerSecond));
  Write();
}

void Connection::Write() {
  if (writing_ != Writing::kNothing || broken_) return;
  std::array<asio::const_buffer, 4> pieces;
  const auto framed = [&](std::string_view data, std::string_view end) {
    if (chunked_ && !data.empty()) chunk_size_ = fmt::format("{:x}\r\n", data.size());
    pieces = {Buffer(head_), Buffer(chunked_ && !data.empty() ? chunk_size_ : std::string_view()), Buffer(data),
              Buffer(chunked_ ? end : std::string_view())};
  };
  if (interim_) {
    writing_ = Writing::kInterim;
    pieces[0] = Buffer(kContinue);
  } else if (flush_) {
    started_ = true;
    writing_ = Writing::kPiece;
    framed(body_, !last_ ? kNewLine : body_.empty() ? kLastChunk.substr(2) : kLastChunk);
  } else if (heartbeat_due_) {
    started_ = true;
    writing_ = Writing::kHeartbeat;
    framed(heartbeat_, kNewLine);
  } else {
    return;
  }
  asio::async_write(socket_, pieces, [self = shared_from_this(), what = writing_](const auto& error, size_t) {
    self->OnWritten(error, what);
  });
}

void Connection::OnWritten(const boost::system::error_code& error, Writing what) {
  writing_ = Writing::kNothing;
  if (broken_) return;
  if (error) return Break();
  if (what == Writing::kInterim) {
    interim_ = false;
  } else {
    head_.clear();
    heartbeat_due_ = false;
    last_written_ = Clock::now();
  }
  if (what == Writing::kPiece) {
    flush_ = false;
    body_.clear();
    if (last_) return FinishExchange();
    if (listener_ != nullptr) listener_->OnWritten();
  }
  Write();
}

void Connection::FinishExchange() {
  listener_.reset();
  streaming_ = chunked_ = last_ = started_ = false;
  if (body_.capacity() > (1 << 20)) body_.shrink_to_fit();
  if (close_after_ || context_->draining) return Linger();
  ExpectRequest(context_->options.idle_timeout);
}

void Connection::Linger() {
  state_ = State::kLingering;
  in_.consume(in_.size());
  boost::system::error_code ignored;
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  linger_until_ = Clock::now() + absl::ToChronoNanoseconds(kMaxLinger);
  SetDeadline(kLinger);
  Read();
}

void Connection::Break() {
  if (broken_) return;
  broken_ = true;
  boost::system::error_code ignored;
  socket_.close(ignored);
  timer_.cancel();
  if (const auto listener = std::move(listener_)) listener->OnGone();
}

// ---- Time

void Connection::SetDeadline(absl::Duration from_now) {
  deadline_ = Clock::now() + absl::ToChronoNanoseconds(from_now);
  ArmTimer();
}

// A timer that rings early looks again, so that a later time costs nothing here.
void Connection::ArmTimer() {
  std::optional<Clock::time_point> next = deadline_;
  if (streaming_) {
    const auto heartbeat = (writing_ == Writing::kNothing ? last_written_ : Clock::now()) + heartbeat_every_;
    if (!next.has_value() || heartbeat < *next) next = heartbeat;
  }
  if (broken_ || !next.has_value() || (armed_.has_value() && *armed_ <= *next)) return;
  armed_ = next;
  timer_.expires_at(*next);
  timer_.async_wait([self = shared_from_this()](const boost::system::error_code& error) {
    if (error == asio::error::operation_aborted || self->broken_) return;
    self->armed_.reset();
    self->OnTimer();
  });
}

void Connection::OnTimer() {
  const Clock::time_point now = Clock::now();
  if (deadline_.has_value() && now >= *deadline_) {
    deadline_.reset();
    if (state_ == State::kHeader || state_ == State::kBody) {
      RespondError(408, state_ == State::kHeader ? "the request's header did not come in time"
                                                 : "the request's body did not come in time");
    } else {
      return Break();
    }
  }
  if (streaming_ && writing_ == Writing::kNothing && now >= last_written_ + heartbeat_every_) {
    heartbeat_due_ = true;
    Write();
  }
  ArmTimer();
}

}  // namespace soloist
