#include "server/http/http_server.h"

#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/logging.h"
#include "base/status.h"
#include "boost/asio/executor_work_guard.hpp"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/post.hpp"
#include "boost/asio/steady_timer.hpp"
#include "boost/asio/strand.hpp"
#include "server/http/connection.h"

namespace soloist {
namespace {

namespace asio = boost::asio;
using tcp = asio::ip::tcp;

// Connections beyond the limit that are being told so.
constexpr int32_t kMaxRefusals = 64;
// Between two attempts where the process has no file descriptor left.
constexpr std::chrono::milliseconds kAcceptPause{100};
constexpr absl::Duration kAbortPeriod = absl::Milliseconds(50);

class AsioHttpServer final : public HttpServer {
 public:
  AsioHttpServer(const HttpServerOptions& options, Handler handler, ErrorMaker error_maker)
      : context_(std::make_shared<ConnectionContext>()),
        io_(options.num_threads),
        work_(asio::make_work_guard(io_)),
        acceptor_strand_(asio::make_strand(io_)),
        acceptor_(acceptor_strand_),
        pause_(acceptor_strand_) {
    context_->options = options;
    context_->handler = std::move(handler);
    context_->error_maker = std::move(error_maker);
  }
  ~AsioHttpServer() override { Shutdown(absl::ZeroDuration()); }

  absl::Status Listen(const std::string& address) {
    const size_t colon = address.rfind(':');
    if (colon == std::string::npos || colon == 0 || colon + 1 == address.size()) {
      return InvalidArgument("HTTP address is '{}', expected HOST:PORT", address);
    }
    std::string host = address.substr(0, colon);
    if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
    boost::system::error_code error;
    tcp::resolver resolver(io_);
    const auto found = resolver.resolve(host, address.substr(colon + 1), tcp::resolver::passive, error);
    if (error || found.empty()) return Unavailable("cannot listen at {}: {}", address, error.message());
    const tcp::endpoint endpoint = found.begin()->endpoint();
    acceptor_.open(endpoint.protocol(), error);
    if (!error) acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
    if (!error) acceptor_.bind(endpoint, error);
    if (!error) acceptor_.listen(SOMAXCONN, error);
    if (error) return Unavailable("cannot listen at {}: {}", address, error.message());
    address_ = address.substr(0, colon + 1) + std::to_string(acceptor_.local_endpoint().port());
    asio::post(acceptor_strand_, [this] { Accept(); });
    for (int i = 0; i < context_->options.num_threads; ++i) threads_.emplace_back([this] { io_.run(); });
    return absl::OkStatus();
  }

  const std::string& address() const override { return address_; }

  int32_t connections() const override {
    const std::lock_guard lock(context_->mutex);
    return static_cast<int32_t>(context_->connections.size());
  }

  void Shutdown(absl::Duration grace) override {
    if (context_->draining.exchange(true)) return;
    asio::post(acceptor_strand_, [this] {
      boost::system::error_code ignored;
      acceptor_.close(ignored);
      pause_.cancel();
    });
    for (const auto& connection : context_->Alive()) connection->Drain();
    // Again and again: one may have been accepted meanwhile.
    while (!WaitUntilNone(grace)) {
      for (const auto& connection : context_->Alive()) connection->Abort();
      grace = kAbortPeriod;
    }
    work_.reset();
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  bool WaitUntilNone(absl::Duration timeout) {
    std::unique_lock lock(context_->mutex);
    return context_->changed.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                                      [this] { return context_->connections.empty(); });
  }

  void Accept() {
    acceptor_.async_accept(
        asio::make_strand(io_), [this](const boost::system::error_code& error, Connection::Socket socket) {
          if (context_->draining) return;
          if (error) {
            spdlog::warn("HTTP: accepting a connection: {}", error.message());
            pause_.expires_after(kAcceptPause);
            pause_.async_wait([this](const boost::system::error_code& cancelled) {
              if (!cancelled) Accept();
            });
            return;
          }
          const int32_t open = connections(), limit = context_->options.max_connections;
          if (open < limit + kMaxRefusals) {
            auto connection = std::make_shared<Connection>(context_, std::move(socket));
            if (open < limit) {
              connection->Start();
            } else {
              connection->Refuse(503, fmt::format("{} connections are open, the limit is {}", open, limit));
            }
          }
          Accept();
        });
  }

  const std::shared_ptr<ConnectionContext> context_;
  asio::io_context io_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  Connection::Strand acceptor_strand_;
  asio::basic_socket_acceptor<tcp, Connection::Strand> acceptor_;
  asio::basic_waitable_timer<std::chrono::steady_clock, asio::wait_traits<std::chrono::steady_clock>,
                             Connection::Strand>
      pause_;
  std::string address_;
  std::vector<std::thread> threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Create(const std::string& address,
                                                               const HttpServerOptions& options, Handler handler,
                                                               ErrorMaker error_maker) {
  auto server = std::make_unique<AsioHttpServer>(options, std::move(handler), std::move(error_maker));
  RETURN_IF_ERROR(server->Listen(address));
  return server;
}

}  // namespace soloist
